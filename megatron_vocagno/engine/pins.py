"""The models of a run, pinned: a Hub id with the commit that it means when the run starts."""

from __future__ import annotations

from megatron_vocagno.config import Run
from megatron_vocagno.engine.agreement import from_first_rank
from megatron_vocagno.model.folder import ModelError, pinned


def pin_models(run: Run) -> Run:
    """The same run with a commit in each Hub id that it will read: all ranks read those weights, whatever the Hub does meanwhile.

    The first rank asks; no weights are read. A cached teacher is not read at all. Collective over the world; raises SharedError.
    """
    return from_first_rank(lambda: _pinned(run), ModelError)


def _pinned(run: Run) -> Run:
    student = run.student
    if student.pretrained is not None:
        student = student.model_copy(update={"pretrained": pinned(student.pretrained)})
    if not run.guidance.needs_teacher:
        return run.model_copy(update={"student": student})
    teachers = tuple(
        teacher
        if teacher.path is None or teacher.placement == "cached"
        else teacher.model_copy(update={"path": pinned(teacher.path)})
        for teacher in run.teacher
    )
    return run.model_copy(update={"student": student, "teacher": teachers})
