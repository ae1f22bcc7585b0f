"""The requirements of setup.py, read without running it.

python .ci/dependencies.py lowest torch==2.13.0      each dependency except torch at the lower end of its range
python .ci/dependencies.py highest torch==2.13.0     the ranges of all dependencies except torch
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
TRIED = ("", "train", "fast", "gguf", "ray", "s3", "demo", "evidence", "test")
"""Extras whose range a machine without a GPU can try."""


def requirements() -> dict[str, list[Requirement]]:
    """The requirements by extra. The extra "" contains those of every installation."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"]
    words = {word.arg: word.value for word in calls[0].keywords}
    lines = {"": ast.literal_eval(words["install_requires"])} | ast.literal_eval(words["extras_require"])
    return {extra: [Requirement(line) for line in lines[extra]] for extra in lines}


def lowest(requirement: Requirement) -> Requirement:
    """The requirement with its lowest accepted version."""
    ends = [each.version for each in requirement.specifier if each.operator == ">="]
    pinned = Requirement(str(requirement))
    pinned.specifier = SpecifierSet(f"=={ends[0]}")
    return pinned


if __name__ == "__main__":
    end, *instead = sys.argv[1:]
    given = {Requirement(line).name: line for line in instead}
    asked = requirements()
    for requirement in (each for extra in TRIED for each in asked[extra]):
        print(given.get(requirement.name) or (lowest(requirement) if end == "lowest" else requirement))
