"""Show the figures of a benchmark, with their goals, on the terminal and in the documentation.

Each benchmark owns the section of a page between its two markers, and rewrites only that section. The heading of the section
and its introduction stand before the markers, and are written by hand.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
APPENDIX = DOCS / "performance" / "appendix.md"
"""Long tables."""
GOALS = "0 all goals are met, 1 a goal is missed, 2 an error that you can fix, 130 Ctrl-C"
"""Exit codes of a benchmark that has goals."""
WRITE = f"page to write the table into (default: docs/{PAGE.name})"
"""Help of an option --write that accepts a page."""


@dataclass(frozen=True)
class Figure:
    """One line of a table. Without a goal, `met` stays None."""

    label: str
    measured: str
    goal: str = ""
    met: bool | None = None


def show(figures: Sequence[Figure]) -> None:
    table = Table("", "measured", "goal", "")
    for figure in figures:
        table.add_row(figure.label, figure.measured, figure.goal, {None: "", True: "met", False: "MISSED"}[figure.met])
    Console().print(table)


def markdown(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table."""
    rows = [f"| {x.label} | {x.measured} | {x.goal}{'' if x.met is not False else ' MISSED'} |" for x in figures]
    return "\n".join(["| | measured | goal |", "|---|---|---|", *rows])


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replace the section `name` of the page, or append it if the page has no such section."""
    old = page.read_text(encoding="utf-8") if page.exists() else "# Performance\n"
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->\n"
    pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- end of {name} -->\n", re.DOTALL)
    new = pattern.sub(lambda _: section, old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}"
    page.write_text(new, encoding="utf-8")


def circumstances(*packages: str) -> str:
    """Date, processor and versions, for the line above a table."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{date.today().isoformat()}, {_processor()}, Python {platform.python_version()}, {versions}."


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()
