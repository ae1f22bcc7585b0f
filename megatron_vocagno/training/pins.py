"""The models of a run, pinned: a Hub id with the commit that it meant when the run first started.

OUTPUT/pins.json holds them, so a resumed run reads the same weights, though a branch may have moved since.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_vocagno import hub
from megatron_vocagno.config import Run
from megatron_vocagno.engine.collectives import run_on_rank0
from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.folder import cached_snapshot, pinned

PINS = "pins.json"


def pin_models(run: Run) -> Run:
    """The same run with a commit in each Hub id that it will read: all ranks read those weights, whatever the Hub does meanwhile.

    The first rank asks; no weights are read. A cached teacher is not read at all. Collective over the world; raises SharedError.
    """
    pins = run_on_rank0(lambda: _pins(run), ModelError, OSError)

    def commit(path: Path | None) -> Path | None:
        return path if path is None else pins.get(path, path)

    # each rank's own run otherwise: what one of them cannot read is told later
    student = run.student.model_copy(update={"pretrained": commit(run.student.pretrained)})
    teachers = tuple(teacher.model_copy(update={"path": commit(teacher.path)}) for teacher in run.teacher)
    return run.model_copy(update={"student": student, "teacher": teachers})


def from_the_hub(run: Run) -> Iterator[str]:
    """A line for each model of a pinned run that came from the Hub: its commit, and where it lies."""
    for name in _read(run):
        if hub.is_id(name):
            yield f"from the Hub: {name}, in {cached_snapshot(name)}"


def _pins(run: Run) -> dict[Path, Path]:
    names = _read(run)
    return dict(zip(names, pinned(names, run.output / PINS), strict=True))


def _read(run: Run) -> list[Path]:
    """What a run reads weights from."""
    asked = run.teacher if run.guidance.needs_teacher else ()
    paths = [run.student.pretrained, *(teacher.path for teacher in asked if teacher.placement != "cached")]
    return [path for path in paths if path is not None]
