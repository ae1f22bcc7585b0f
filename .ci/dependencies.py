"""The requirements of setup.py, read without running it."""

from __future__ import annotations

import ast
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def requirements() -> dict[str, list[Requirement]]:
    """The requirements by extra. The extra "" contains those of every installation."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"]
    words = {word.arg: word.value for word in calls[0].keywords}
    lines = {"": ast.literal_eval(words["install_requires"])} | ast.literal_eval(words["extras_require"])
    return {extra: [Requirement(line) for line in lines[extra]] for extra in lines}
