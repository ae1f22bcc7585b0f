"""What both models know of the first batch: a line for a person, and a warning where the teacher seems to read wrongly.

Only the first batch of a start is judged. Later a guided student may well know its text better than its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vocagno.batch.text_losses import Heard, TextLoss, teacher_names
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import read_manifest
from megatron_vocagno.monitor import Monitor

NEAR_CHANCE = 0.9
"""Of ln(vocabulary): a mean loss above it is hardly better than chance."""
NEAR_STUDENT = 0.99
"""Of the student's bits per byte: a teacher above it is no better. Rounding alone makes less difference."""
ADVICE = (
    "  Likely causes: the teacher does not read what it was trained to read before a text (teacher.bos) or between documents;\n"
    "  its ids are of another tokenizer; its weights are damaged; it does not know this text. What to look at:\n"
    "  docs/troubleshooting.md#the-teacher-is-no-better-than-its-student-or-than-chance"
)


@dataclass(frozen=True)
class TeacherFacts:
    """What a run knows of a teacher besides its losses."""

    vocabulary: int
    """Ids of its tokenizer."""
    parameters: int | None
    """None where its losses are cached."""


def known_teachers(run: Run, data: AlignedDataset, parameters: int | None) -> list[TeacherFacts]:
    """The teachers that a run asks, in their order. parameters: of the one that is loaded."""
    if not run.guidance.needs_teacher:
        return []
    further = [read_manifest(asked.data[0]).teacher.vocab_size for asked in run.teacher[1:]]
    return [TeacherFacts(vocabulary, parameters) for vocabulary in (data.teacher_tokenizer.vocab_size, *further)]


class FirstBatch:
    """Judges the first batch of a start."""

    def __init__(self, teachers: Sequence[TeacherFacts], student_parameters: int) -> None:
        """teachers: none, or as many as will be heard."""
        self.teachers, self.student_parameters = teachers, student_parameters

    def tell(self, step: int, heard: Heard, monitor: Monitor) -> None:
        """step: the one that read the batch."""
        if line := described(heard):
            monitor.first_batch(step, line, list(warnings(heard, self.teachers, self.student_parameters)))


def described(heard: Heard) -> str | None:
    """One line; None where the batch has no text."""
    models = [*zip(_names(heard), heard.teachers, strict=True), ("student", heard.student)]
    spoken = [(name, said) for name, said in models if said.tokens and said.text_bytes]
    if not spoken:
        return None
    nats = ", ".join(f"{name} {said.per_token:.2f}" for name, said in spoken)
    *bits, last = (f"{said.bits_per_byte:.2f}" for _, said in spoken)
    return f"first batch: {nats} nats a token, {', '.join(bits)}{' and ' if bits else ''}{last} bits a byte"


def warnings(heard: Heard, teachers: Sequence[TeacherFacts], student_parameters: int) -> Iterator[str]:
    """For each teacher that seems to read wrongly, what shows it, and what to look at.

    teachers  none, or as many as were heard
    """
    for name, said, facts in zip(_names(heard), heard.teachers, teachers, strict=True):
        if said.tokens and said.text_bytes and heard.student.text_bytes:
            findings = list(_findings(name, said, heard.student, facts, student_parameters))
            if findings:
                yield "\n".join([*(f"warning: {finding}" for finding in findings), ADVICE])


def _findings(name: str, said: TextLoss, student: TextLoss, facts: TeacherFacts, student_parameters: int) -> Iterator[str]:
    if not math.isfinite(said.nats):
        yield f"some losses of the {name} are not finite on the first batch: does teacher.dtype overflow?"
        return
    chance = math.log(facts.vocabulary)
    if said.per_token > NEAR_CHANCE * chance:
        yield (
            f"the {name} is hardly better than chance on the first batch: {said.per_token:.2f} nats a token, where a guess among "
            f"its {facts.vocabulary:,} tokens costs {chance:.2f}."
        )
    if said.bits_per_byte <= NEAR_STUDENT * student.bits_per_byte:
        return
    both = f"{said.bits_per_byte:.2f} and {student.bits_per_byte:.2f} bits a byte"
    if facts.parameters is None:
        yield (
            f"the {name} is no better than its student on the first batch: {both}. How large it is, its cached losses do not "
            "say: a teacher smaller than its student may be right."
        )
    elif facts.parameters >= student_parameters:
        yield (
            f"the {name} ({facts.parameters:,} parameters) is no better than its student ({student_parameters:,}) on the first "
            f"batch: {both}. A student that was trained on such text may be right."
        )


def _names(heard: Heard) -> list[str]:
    return [name.replace("_", " ") for name in teacher_names(len(heard.teachers))]
