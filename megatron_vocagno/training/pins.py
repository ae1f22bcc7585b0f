"""Pin the models of a run: add to each Hub id the commit that it had when the run first started.

OUTPUT/pins.json stores the commits, so that a resumed run reads the same weights even if a branch on the Hub has moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_vocagno import hub
from megatron_vocagno.config import Run
from megatron_vocagno.engine.collectives import run_on_rank0
from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.folder import cached_snapshot, pinned

PINS = "pins.json"


def pin_models(run: Run) -> Run:
    """The run with a commit in each Hub id whose weights it reads, so that all ranks read the same weights.

    The first rank resolves the ids, and reads no weights. The path of a cached teacher is not pinned, because its weights are not
    read. Collective over the world. Raises SharedError.
    """
    pins = run_on_rank0(lambda: _pins(list(run.weights.values()), run.output / PINS), ModelError, OSError)

    def commit(path: Path | None) -> Path | None:
        return path if path is None else pins.get(path, path)

    # every other field stays the one of this rank: later checks report what differs between ranks
    student = run.student.model_copy(update={"pretrained": commit(run.student.pretrained)})
    teachers = tuple(teacher.model_copy(update={"path": commit(teacher.path)}) for teacher in run.teacher)
    return run.model_copy(update={"student": student, "teacher": teachers})


def hub_notes(paths: Iterable[Path]) -> Iterator[str]:
    """A line for each pinned model from the Hub: its commit, and its folder in the cache."""
    for name in paths:
        if hub.is_id(name):
            yield f"from the Hub: {name}, in {cached_snapshot(name)}"


def _pins(names: list[Path], file: Path) -> dict[Path, Path]:
    return dict(zip(names, pinned(names, file), strict=True))
