"""The prefixes that the models of a run read in front of text, and the lines about them at the start of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.config import Run, Student, Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset, TokenizerInfo
from megatron_vocagno.corpus.front import describe_front, front_of
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.teacher import teacher_folder


def student_front(student: Student, data: AlignedDataset, vocab_size: int, by_document: bool) -> Front:
    """The student's prefix, from its own tokenizer or else from the dataset's.

    vocab_size   vocab_size in the student's configuration
    by_document  whether attention stops at document borders: then each document gets the prefix

    Raises RunError if the vocabulary does not contain an id, or if a prefix of several ids would go before each document.
    """
    own = [student.pretrained] if student.pretrained is not None else []
    ids = front_of(student.bos, [*own, data.student_tokenizer.path], "student.bos", vocab_size)
    return _front(ids, by_document, "student")


def teacher_front(teacher: Teacher | None, data: AlignedDataset, vocab_size: int, by_document: bool) -> Front:
    """The prefix of the loaded teacher, see student_front. Empty if no teacher is loaded (None)."""
    if teacher is None:
        return NO_FRONT
    assert teacher.path is not None
    tokenizers = [teacher_folder(teacher.path), data.teacher_tokenizer.path]
    return _front(front_of(teacher.bos, tokenizers, "teacher.bos", vocab_size), by_document, "teacher")


def _front(ids: tuple[int, ...], by_document: bool, model: str) -> Front:
    if by_document and len(ids) > 1:
        raise RunError(
            f"data.attention = 'document' puts one id before each document, but the {model}'s tokenizer puts {len(ids)} in front "
            f"of a text: {list(ids)}. Use data.attention = 'row', or choose one id: {model}.bos = {ids[-1]}"
        )
    return Front(ids, by_document)


def describe_fronts(run: Run, data: AlignedDataset, student: Front, teacher: Front) -> Iterator[str]:
    """One line per model: the tokens that it reads in front of text and after each document.

    student, teacher: their prefixes. That of the teacher is ignored if no teacher is loaded.
    """
    yield _line("student", data.student_tokenizer, student.ids, student.each_document)
    if run.cached:
        ids, unit = data.scoring.front if data.scoring is not None else (), "window"
    elif run.loaded_teacher is not None:
        ids, unit = teacher.ids, "row"
    else:
        return
    tokenizer = data.teacher_tokenizer
    if ids:
        yield _line("teacher", tokenizer, ids, teacher.each_document, unit)
    else:
        why = "teacher.bos is 'none'" if run.teacher[0].bos == "none" else "its tokenizer puts nothing in front of a text"
        yield f"the teacher reads {tokenizer.eos_token} ({tokenizer.eos_id}) in front of each document, because {why}"


def _line(model: str, tokenizer: TokenizerInfo, ids: Sequence[int], each_document: bool, unit: str = "row") -> str:
    return (
        f"the {model} reads {describe_front(ids, tokenizer.path)} in front of each {unit}{' and document' * each_document}, "
        f"{tokenizer.eos_token} ({tokenizer.eos_id}) after each document"
    )
