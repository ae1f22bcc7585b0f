"""The metrics that a run records for a step. docs/monitoring.md explains each."""

from __future__ import annotations

import time
from typing import NamedTuple

from torch import Tensor

from megatron_vocagno.batch import pack
from megatron_vocagno.batch.text_losses import BatchTextLosses, teacher_names
from megatron_vocagno.config import Guidance
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.engine.step_counts import StepCounts
from megatron_vocagno.objective.statistics import STATS, summarize


class Seconds(NamedTuple):
    """Wall time of a step."""

    step: float
    teacher: float
    student: float


class Optimizer(NamedTuple):
    """The optimizer's state at a step."""

    learning_rate: float
    skipped_steps: int
    """Steps that DeepSpeed has skipped so far."""
    grad_norm: float | None


def step_numbers(
    loss: float,
    stats: Tensor,
    text_losses: BatchTextLosses,
    counts: StepCounts,
    seconds: Seconds,
    optimizer: Optimizer,
    guidance: Guidance,
    scorer: Scorer | None,
) -> dict[str, float]:
    """The metrics of a step, by name.

    loss    mean loss of the selected tokens, nats
    stats   sums over all ranks, in the order of objective.statistics.STATS
    scorer  None if no teacher scores the steps
    """
    means = summarize(stats)
    numbers = {
        "loss/train": loss,
        "loss/nonfinite_tokens": stats[STATS.index("nonfinite")].item(),
        "loss/tokens_over_capacity": stats[STATS.index("over_capacity")].item(),
        "optimizer/learning_rate": optimizer.learning_rate,
        "optimizer/skipped_steps": optimizer.skipped_steps,
        "throughput/student_tokens_per_second": counts.targets / seconds.step,
        "throughput/step_seconds": seconds.step,
        "throughput/student_seconds": seconds.student,
        "throughput/student_tokens": counts.targets,
    }
    if "student_loss_all" in means:
        numbers["loss/all_tokens"] = means.pop("student_loss_all")
    if optimizer.grad_norm is not None:
        numbers["optimizer/grad_norm"] = optimizer.grad_norm
    means.pop("loss", None)
    numbers |= _text_numbers(text_losses, scorer)
    if guidance.selects:
        of_teacher = ("guide_", "excess_", "threshold", "weight", "likelihood_ratio", "share_below")
        without_teacher = () if guidance.needs_teacher else of_teacher
        numbers |= {f"guidance/{name}": value for name, value in means.items() if not name.startswith(without_teacher)}
        for reason in pack.MappingStatus:
            if reason != pack.MappingStatus.MAPPED and (guidance.unit == "chunk" or reason != pack.MappingStatus.CUT_CHUNK):
                numbers[f"guidance/unmapped_{reason.name.lower()}"] = counts.mapping[reason] / counts.targets
        without_guide = counts.mapping[pack.MappingStatus.MAPPED] - stats[STATS.index("mapped")].item()
        numbers["guidance/unmapped_nan"] = without_guide / counts.targets
    if scorer is not None and guidance.needs_teacher:
        numbers |= {
            "teacher/seconds": seconds.teacher,
            "teacher/share_of_time": seconds.teacher / seconds.step,
            "teacher/tokens": counts.teacher_tokens,
            "teacher/tokens_per_second": counts.teacher_tokens / seconds.teacher,
            "teacher/padding": scorer.padding,
        }
    return numbers


def _text_numbers(text_losses: BatchTextLosses, scorer: Scorer | None) -> dict[str, float]:
    """The losses of both models over text."""
    student, teachers = text_losses
    numbers = {"loss/bits_per_byte": student.bits_per_byte} if student.text_bytes else {}
    # without a scorer for every step, the teacher's losses are only known for the first step
    for name, teacher in zip(teacher_names(len(teachers)), teachers, strict=True) if scorer is not None else ():
        if teacher.text_bytes:
            numbers |= {f"loss/{name}_all_tokens": teacher.per_token, f"loss/{name}_bits_per_byte": teacher.bits_per_byte}
    return numbers


class Clock:
    """Measures the wall time of a step: in total, in the teacher and in the student."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.begin = self.teacher = self.student = self._now()

    def start_teacher(self) -> None:
        self.teacher = self._now()

    def start_student(self) -> None:
        self.student = self._now()

    def stop(self) -> Seconds:
        end = self._now()
        return Seconds(end - self.begin, self.student - self.teacher, end - self.student)

    def _now(self) -> float:
        self.processes.synchronize()
        return time.perf_counter()
