"""The record of a part: the rows of its table. It is written after each row, so a part that is killed keeps its rows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_vocagno.files import replacing

CPU, GPU = "cpu", "cuda"


class Skipped(Exception):
    """This part cannot run here. The text is the reason."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    case: str
    arm: str = ""
    numbers: dict[str, float | None] = field(default_factory=dict)
    """By name. Names are units (`ms`, `GiB`, `tokens/s`) or say what is a share of what. None: not finite."""
    result: str = ""
    """For example `passed` or `out of memory`. Empty for a figure."""
    failed: bool = False


@dataclass
class Record:
    """The rows and facts that a part has found so far."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """By name, for example the versions of packages."""
    notes: list[str] = field(default_factory=list)
    """Sentences."""
    skipped: str = ""
    """The reason, if the part cannot run here."""

    @staticmethod
    def read(file: Path) -> Record:
        """An empty record if the part has not written the file."""
        if not file.exists():
            return Record()
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Record(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})


class Task:
    """The work of a part: its time and its device. The part adds rows to its record."""

    def __init__(self, file: Path, seconds: float, rehearse: bool) -> None:
        """file: the record. The records of earlier parts are in the same folder."""
        self.file, self.rehearse = file, rehearse
        self.record = Record()
        self._until = time.monotonic() + seconds
        self.write()

    @property
    def device(self) -> str:
        """`cpu` in a rehearsal."""
        return CPU if self.rehearse else GPU

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return self._until - time.monotonic()

    def earlier(self, part: str) -> Record:
        """The record of an earlier part."""
        return Record.read(self.file.with_name(f"{part}.json"))

    def add(
        self, case: str, arm: str = "", numbers: Mapping[str, float] | None = None, result: str = "", failed: bool = False
    ) -> None:
        """Add a row, and write the record."""
        finite = {name: value if math.isfinite(value) else None for name, value in (numbers or {}).items()}
        self.record.rows.append(Row(case, arm, finite, result, failed))
        self.write()

    def check(self, case: str, passed: bool, numbers: Mapping[str, float] | None = None, why: str = "") -> None:
        """Add the row of a check. why: added to the result if it failed."""
        self.add(case, "", numbers, "passed" if passed else f"FAILED {why}".strip(), failed=not passed)

    def note(self, sentence: str) -> None:
        self.record.notes.append(sentence)
        self.write()

    def skip(self, reason: str) -> None:
        self.record.skipped = reason
        self.write()

    def write(self) -> None:
        """Replace the file as a whole."""
        with replacing(self.file) as temporary:
            temporary.write_text(json.dumps(asdict(self.record), allow_nan=False), encoding="utf-8")
