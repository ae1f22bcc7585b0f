"""What a benchmark shows: figures with their goals, on the terminal and in docs/performance.md.

On the page each benchmark owns the section between its two markers, and rewrites no other.
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

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
GOALS = "0 all goals are met; 1 one is missed; 2 something for you to mend; 130 Ctrl-C"
"""The exit codes of a benchmark that has goals."""


@dataclass(frozen=True)
class Figure:
    """One line of a table. met: None where there is no goal."""

    what: str
    measured: str
    goal: str = ""
    met: bool | None = None


def show(figures: Sequence[Figure]) -> None:
    table = Table("", "measured", "goal", "")
    for figure in figures:
        table.add_row(figure.what, figure.measured, figure.goal, {None: "", True: "met", False: "MISSED"}[figure.met])
    Console().print(table)


def markdown(figures: Sequence[Figure]) -> str:
    """The same as a table of the page."""
    rows = [f"| {x.what} | {x.measured} | {x.goal}{'' if x.met is not False else ' MISSED'} |" for x in figures]
    return "\n".join(["| | measured | goal |", "|---|---|---|", *rows])


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replaces the section `name` of the page, or appends it."""
    old = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    section = f"<!-- {name} -->\n{text.strip()}\n<!-- end of {name} -->\n"
    pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- end of {name} -->\n", re.DOTALL)
    new = pattern.sub(lambda _: section, old) if pattern.search(old) else f"{old.rstrip()}\n\n{section}"
    page.write_text(new, encoding="utf-8")


def circumstances(*packages: str) -> str:
    """Date, processor, versions."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{date.today().isoformat()}, {_processor()}, Python {platform.python_version()}, {versions}."


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()
