"""What a run's models read in front of text, and what it says of that."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import describe_front, front_of
from megatron_vocagno.engine.cached import is_cached
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.teacher import teacher_folder


def open_fronts(run: Run, data: AlignedDataset, student: PretrainedConfig, teacher_rows: int | None) -> tuple[Front, Front]:
    """Of the student, and of a teacher that is loaded.

    data          whose tokenizers are asked where a model's folder has none
    teacher_rows  of the loaded teacher's embedding; None without one

    Raises RunError: an id that a model does not have, or more than one id before each document.
    """
    own = [run.student.pretrained] if run.student.pretrained is not None else []
    ids = front_of(run.student.bos, [*own, data.student_tokenizer.path], "student.bos", student.vocab_size)
    return _front(ids, run, "student"), _teacher_front(run, data, teacher_rows)


def _teacher_front(run: Run, data: AlignedDataset, rows: int | None) -> Front:
    if rows is None:
        return NO_FRONT
    asked = run.teacher[0]
    assert asked.path is not None
    tokenizers = [teacher_folder(asked.path), data.teacher_tokenizer.path]
    return _front(front_of(asked.bos, tokenizers, "teacher.bos", rows), run, "teacher")


def _front(ids: tuple[int, ...], run: Run, whose: str) -> Front:
    if run.data.by_document and len(ids) > 1:
        raise RunError(
            f"data.attention = 'document' puts one id before each document, and the {whose}'s tokenizer puts {len(ids)} in front "
            f"of a text: {list(ids)}. Use data.attention = 'row', or name one id: {whose}.bos = {ids[-1]}"
        )
    return Front(ids, run.data.by_document)


def reading(run: Run, data: AlignedDataset, fronts: tuple[Front, Front]) -> Iterator[str]:
    """A line: what each model reads in front of text, and between documents."""
    yield _sentence("student", fronts[0].ids, data, run)
    if run.guidance.needs_teacher:
        cached = data.scoring.front if is_cached(run) and data.scoring is not None else None
        yield _sentence("teacher", fronts[1].ids if cached is None else cached, data, run)


def _sentence(side: str, ids: tuple[int, ...], data: AlignedDataset, run: Run) -> str:
    tokenizer = data.student_tokenizer if side == "student" else data.teacher_tokenizer
    head = "row" if not run.data.by_document else "row and document"
    if side == "teacher" and is_cached(run):
        head = "window"
    return (
        f"the {side} reads {describe_front(ids, tokenizer.path)} in front of each {head}, "
        f"{tokenizer.eos_token} ({tokenizer.eos_id}) after each document"
    )
