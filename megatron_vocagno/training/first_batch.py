"""What both models know of the first batch: a line for a person, and a warning where the teacher seems to read wrongly.

Only the first batch of a start is judged. Later a guided student may well know its text better than its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vocagno.batch.text_losses import BatchTextLosses, TextLoss, teacher_names
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import read_manifest
from megatron_vocagno.training.monitor import Monitor

NEAR_CHANCE = 0.9
"""Of ln(vocabulary): a mean loss above it is hardly better than chance."""
NEAR_STUDENT = 0.99
"""Of the student's bits per byte: a teacher above it is no better. Rounding alone makes less difference."""
ADVICE = (
    "  Likely causes: it does not read what it was trained to read before a text (BOS: teacher.bos) or between documents;\n"
    "  its ids are of another tokenizer; its weights are damaged; it does not know this text. What to look at:\n"
    "  docs/troubleshooting.md#the-teacher-is-no-better-than-its-student-or-than-chance"
)


@dataclass(frozen=True)
class Facts:
    """What a run knows of a model besides its losses."""

    vocabulary: int
    """Ids of its tokenizer."""
    parameters: int | None
    """None of a teacher whose losses are cached."""
    trained: bool = True
    """False of a student that starts from nothing."""


def teacher_facts(run: Run, data: AlignedDataset, parameters: int | None) -> list[Facts]:
    """Of the teachers that a run asks, in their order. parameters: of the one that is loaded."""
    if not run.guidance.needs_teacher:
        return []
    further = [read_manifest(asked.data[0]).teacher.vocab_size for asked in run.teacher[1:]]
    return [Facts(vocabulary, parameters) for vocabulary in (data.teacher_tokenizer.vocab_size, *further)]


class FirstBatch:
    """Judges the first batch of a start."""

    def __init__(self, student: Facts, teachers: Sequence[Facts]) -> None:
        """teachers: none, or as many as will be heard."""
        self.student, self.teachers = student, teachers

    def report(self, step: int, heard: BatchTextLosses, monitor: Monitor) -> None:
        """step: the one that read the batch."""
        if line := described(heard):
            monitor.first_batch(step, line, list(warnings(heard, self.student, self.teachers)))


def described(heard: BatchTextLosses) -> str | None:
    """One line; None where the batch has no text."""
    models = [*zip(_names(heard), heard.teachers, strict=True), ("student", heard.student)]
    spoken = [(name, said) for name, said in models if said.tokens and said.text_bytes]
    if not spoken:
        return None
    nats = ", ".join(f"{name} {said.per_token:.2f}" for name, said in spoken)
    *bits, last = (f"{said.bits_per_byte:.2f}" for _, said in spoken)
    return f"first batch: {nats} nats a token, {', '.join(bits)}{' and ' if bits else ''}{last} bits a byte"


def warnings(heard: BatchTextLosses, student: Facts, teachers: Sequence[Facts]) -> Iterator[str]:
    """For each model that seems to read wrongly, what shows it, and what to look at.

    teachers  none, or as many as were heard
    """
    models = [
        (f"the {name}" if len(teachers) == 1 else name, said, list(_against_student(said, facts, heard.student, student)), facts)
        for name, said, facts in zip(_names(heard), heard.teachers, teachers, strict=True)
    ]
    models.append(("the student", heard.student, [], student))
    for name, said, besides, facts in models:
        if findings := [f"warning: {name}{finding}" for finding in (*_alone(said, facts), *besides)]:
            yield "\n".join([*findings, ADVICE])


def _alone(said: TextLoss, facts: Facts) -> Iterator[str]:
    chance = math.log(facts.vocabulary)
    if said.tokens and not math.isfinite(said.nats):
        yield " has losses that are not finite on the first batch: does its dtype overflow?"
    elif facts.trained and said.per_token > NEAR_CHANCE * chance:
        yield (
            f" is hardly better than chance on the first batch: {said.per_token:.2f} nats a token, where a guess among its "
            f"{facts.vocabulary:,} tokens costs {chance:.2f}."
        )


def _against_student(said: TextLoss, facts: Facts, student: TextLoss, student_facts: Facts) -> Iterator[str]:
    """Nothing where a loss is NaN."""
    if not math.isfinite(said.nats) or not said.bits_per_byte > NEAR_STUDENT * student.bits_per_byte:
        return
    both = (
        f"is no better than its student on the first batch: {said.bits_per_byte:.2f} and {student.bits_per_byte:.2f} bits a byte"
    )
    if facts.parameters is None:
        yield f" {both}. Its losses are cached, so its size is not known here: a small teacher may be behind its student."
    elif facts.parameters >= (student_facts.parameters or 0):
        sizes = f" ({facts.parameters:,} parameters, its student {student_facts.parameters:,})"
        yield f"{sizes} {both}. This can be right where the student was trained on such text."


def _names(heard: BatchTextLosses) -> list[str]:
    return [name.replace("_", " ") for name in teacher_names(len(heard.teachers))]
