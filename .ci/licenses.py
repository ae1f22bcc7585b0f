"""Write the table of docs/licenses.md: the requirements of setup.py, and the license in the metadata of each package.

.venv/bin/python .ci/licenses.py        run it in the environment of `make install`
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from dependencies import ROOT, requirements

PAGE = ROOT / "docs" / "licenses.md"
TABLE = re.compile(r"^\| package \| for \|.*?\n(?=\n)", re.DOTALL | re.MULTILINE)
APART = [str(Path(sys.prefix) / folder) for folder in ("quantized", "evaluation")]
"""Folders in which `make install` puts packages that must not be imported by accident."""
NO_WORDS = {
    "tomli": "MIT (only Python 3.10 installs it)",
    "flash-attn": "BSD-3-Clause (in its repository; a build needs a GPU's compiler)",
    "torchao": "BSD-3-Clause (its LICENSE file; its metadata names none)",
}


def license(package: str) -> str | None:
    """In the package's own words; None: it is not installed."""
    if package in NO_WORDS:
        return NO_WORDS[package]
    found = next(iter(metadata.distributions(name=package, path=sys.path + APART)), None)
    if found is None:
        return None
    fields = found.metadata.json
    words = str(fields.get("license_expression") or fields.get("license") or "")
    if words and "\n" not in words:
        return words
    return ", ".join(line.split(" :: ")[-1] for line in fields.get("classifier", []) if line.startswith("License ::"))


def table() -> str:
    """Raises LookupError: a package is not installed, or names no license."""
    lines = ["| package | for | license |", "|---|---|---|"]
    for extra, asked in requirements().items():
        for requirement in asked:
            if not (named := license(requirement.name)):
                raise LookupError(f"{requirement.name}: {'no license in its metadata' if named == '' else 'not installed'}")
            lines.append(f"| {requirement.name} | {extra or 'every installation'} | {named} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
