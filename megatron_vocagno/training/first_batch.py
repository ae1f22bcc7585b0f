"""The losses of both models on the first batch: a line, and a warning if a model seems to read wrongly.

Only the first batch after a start is checked. Later, a guided student may legitimately know its text better than its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vocagno.batch.text_losses import NEAR_CHANCE, BatchTextLosses, TextLoss, teacher_names
from megatron_vocagno.config import Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import read_manifest
from megatron_vocagno.training.monitor import Monitor

NEAR_STUDENT = 0.99
"""A teacher above this share of the student's bits per byte is not better. Rounding makes a smaller difference."""
ADVICE = (
    "  Likely causes: a wrong prefix ({prefix}) or wrong tokens between documents, ids of another tokenizer, damaged\n"
    "  weights, or a text that the model does not know. How to find the cause:\n"
    "  docs/troubleshooting.md#the-teacher-is-no-better-than-its-student-or-than-chance"
)


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a model that are compared with its losses."""

    vocabulary: int
    """Number of ids of its tokenizer."""
    parameters: int | None
    """Number of parameters. None for a teacher whose losses are cached."""
    trained: bool = True
    """False for a student that starts from scratch."""


def teacher_facts(data: AlignedDataset, further: Sequence[Teacher], parameters: int | None) -> list[ModelFacts]:
    """The facts of all teachers, in the order of the run.

    data        a training dataset, which was aligned for the first teacher
    further     the teachers after the first one
    parameters  number of the loaded teacher's parameters, None if the losses are cached
    """
    others = [read_manifest(teacher.data[0]).teacher.vocab_size for teacher in further]
    return [ModelFacts(vocabulary, parameters) for vocabulary in (data.teacher_tokenizer.vocab_size, *others)]


class FirstBatch:
    """Checks the first batch after a start."""

    def __init__(self, student: ModelFacts, teachers: Sequence[ModelFacts]) -> None:
        """teachers: empty, or one per teacher of the losses that report will get."""
        self.student, self.teachers = student, teachers

    def report(self, step: int, losses: BatchTextLosses, monitor: Monitor) -> None:
        """Report the line and the warnings. step: the step that read the batch."""
        if line := describe(losses):
            monitor.first_batch(step, line, list(warnings(losses, self.student, self.teachers)))


def describe(losses: BatchTextLosses) -> str | None:
    """One line with the losses of all models. None if the batch contains no text."""
    models = [*zip(_names(losses), losses.teachers, strict=True), ("student", losses.student)]
    with_text = [(name, loss) for name, loss in models if loss.tokens and loss.text_bytes]
    if not with_text:
        return None
    nats = ", ".join(f"{name} {loss.per_token:.2f}" for name, loss in with_text)
    *bits, last = (f"{loss.bits_per_byte:.2f}" for _, loss in with_text)
    return f"first batch: {nats} nats per token, {', '.join(bits)}{' and ' if bits else ''}{last} bits per byte"


def warnings(losses: BatchTextLosses, student: ModelFacts, teachers: Sequence[ModelFacts]) -> Iterator[str]:
    """A warning for each model that seems to read wrongly, with the evidence and likely causes.

    teachers  empty, or one per teacher of the losses
    """
    for name, loss, facts in zip(_names(losses), losses.teachers, teachers, strict=True):
        findings = [*_against_chance(loss, facts), *_against_student(loss, facts, losses.student, student)]
        yield from _warning(f"the {name}" if len(teachers) == 1 else name, findings, "teacher.bos")
    yield from _warning("the student", list(_against_chance(losses.student, student)), "student.bos")


def _warning(model: str, findings: Sequence[str], prefix: str) -> Iterator[str]:
    if findings:
        yield "\n".join([*(f"warning: {model}{finding}" for finding in findings), ADVICE.format(prefix=prefix)])


def _against_chance(loss: TextLoss, facts: ModelFacts) -> Iterator[str]:
    chance = math.log(facts.vocabulary)
    if loss.tokens and not math.isfinite(loss.nats):
        yield " has losses that are not finite on the first batch: does its dtype overflow?"
    elif facts.trained and loss.per_token > NEAR_CHANCE * chance:
        yield (
            f" is hardly better than chance on the first batch: {loss.per_token:.2f} nats per token; a guess among its "
            f"{facts.vocabulary:,} tokens costs {chance:.2f}."
        )


def _against_student(loss: TextLoss, facts: ModelFacts, student: TextLoss, student_facts: ModelFacts) -> Iterator[str]:
    """Yields nothing if a loss is NaN, or if the teacher is smaller than the student."""
    if not math.isfinite(loss.nats) or not loss.bits_per_byte > NEAR_STUDENT * student.bits_per_byte:
        return
    bits = f"{loss.bits_per_byte:.2f} and {student.bits_per_byte:.2f} bits per byte"
    both = f"is no better than its student on the first batch: {bits}"
    if facts.parameters is None:
        yield f" {both}. Its losses are cached, so its size is not known here: a small teacher may be worse than its student."
    elif facts.parameters >= (student_facts.parameters or 0):
        sizes = f" ({facts.parameters:,} parameters, its student {student_facts.parameters:,})"
        yield f"{sizes} {both}. This can be correct if the student was trained on such text."


def _names(losses: BatchTextLosses) -> list[str]:
    return [name.replace("_", " ") for name in teacher_names(len(losses.teachers))]
