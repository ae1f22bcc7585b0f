"""The results of all parts as a table, a page and a JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

from benchmarks.gpu.record import Record, Row
from megatron_vocagno.files import replacing

State = Literal["finished", "skipped", "time limit", "crashed"]
MEANINGLESS = "This is a rehearsal on a CPU with tiny shapes, and the kernels ran in an interpreter. Every figure is meaningless."


@dataclass(frozen=True)
class Part:
    """A part that has ended."""

    name: str
    state: State
    reason: str
    """The reason, if it was skipped or did not finish."""
    seconds: float
    record: Record
    must_end: bool = False
    """Whether its checks are incomplete if it reached its time limit."""

    @property
    def failed(self) -> bool:
        incomplete = self.state == "time limit" and self.must_end
        return self.state == "crashed" or incomplete or any(row.failed for row in self.record.rows)


@dataclass
class Report:
    """The parts that have ended so far."""

    command: str
    day: date
    rehearsal: bool
    seconds: float = 0.0
    parts: list[Part] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, str]:
        return {name: value for part in self.parts for name, value in part.record.facts.items()}

    @property
    def name(self) -> str:
        """DATE-CARD, for the names of the files."""
        return f"{self.day.isoformat()}-{'rehearsal' if self.rehearsal else slug(self.facts['card'])}"

    @property
    def heading(self) -> str:
        if self.rehearsal:
            return MEANINGLESS
        return f"{self.facts['card']}, {self.day.isoformat()}, {self.seconds:.0f} s"

    def write(self, folder: Path) -> None:
        """Write NAME.json and NAME.md. Files of an earlier run on this day are replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", self.json()), (".md", self.page())):
            with replacing(folder / f"{self.name}{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")

    def json(self) -> str:
        fields = {
            "command": self.command,
            "date": self.day.isoformat(),
            "rehearsal": self.rehearsal,
            "seconds": round(self.seconds, 1),
            "facts": self.facts,
            "parts": [asdict(part) for part in self.parts],
        }
        return json.dumps(fields, indent=1, allow_nan=False) + "\n"

    def page(self) -> str:
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        title = "A rehearsal of the GPU check" if self.rehearsal else f"{self.facts['card']}, {self.day.isoformat()}"
        head = f"`{self.command}`, {self.seconds:.0f} s." + (f"\n\n**{MEANINGLESS}**" if self.rehearsal else "")
        notes = "\n".join(f"- {part.name}: {note}" for part in self.parts for note in part.record.notes)
        # between markers, because the prose of a generated page is not checked
        return f"# {title}\n\n<!-- gpu -->\n{head}\n\n{facts}\n\n{table(self.parts)}\n\n{notes}\n<!-- end of gpu -->\n"


def slug(card: str) -> str:
    """The name of a card, for a file: `NVIDIA H100 80GB HBM3` is `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def table(parts: Sequence[Part]) -> str:
    """One Markdown table of all rows. A part that did not finish has a row with the reason."""
    lines = ["| part | case | arm | ms | GiB | other figures | result |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for part in parts for cells in _lines(part))])


def _lines(part: Part) -> Iterator[list[str]]:
    before = ""
    for row in part.record.rows:
        yield [part.name, "" if row.case == before else row.case, *_cells(row)]
        before = row.case
    if part.state != "finished":
        reason = part.reason.replace("\n", " / ").replace("|", "\\|")
        yield [part.name, "", "", "", "", "", f"{part.state}: {reason}"]


def _cells(row: Row) -> list[str]:
    others = {name: value for name, value in row.numbers.items() if name not in ("ms", "GiB")}
    ms, gib = (row.numbers.get(name) for name in ("ms", "GiB"))
    return [
        row.arm,
        "" if ms is None else f"{ms:.3f}",
        "" if gib is None else f"{gib:.2f}",
        ", ".join(f"{_shown(name, value)} {name}" for name, value in others.items()),
        row.result.replace("\n", " / ").replace("|", "\\|"),
    ]


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    if name.startswith(("share", "MFU")):
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
