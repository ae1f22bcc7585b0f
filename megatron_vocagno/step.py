"""One step of a run: read, score, select, learn; and the numbers that are remembered of it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vocagno.batch import pack
from megatron_vocagno.batch.loader import Batch, Batches
from megatron_vocagno.batch.text_losses import Heard, TextLoss, teacher_names
from megatron_vocagno.config import Guidance
from megatron_vocagno.engine.counts import StepCounts, count_step
from megatron_vocagno.engine.hearing import Hearing, heard
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.engine.trainers import Engine
from megatron_vocagno.objective.statistics import STATS, summarize


class Stepper:
    """Takes the steps of a run. Every call is collective over the world."""

    def __init__(
        self,
        batches: Batches,
        scorer: Scorer | None,
        hearing: Hearing,
        engine: Engine,
        guidance: Guidance,
        processes: Processes,
        first_scorer: Scorer | None = None,
    ) -> None:
        """scorer: None where no teacher is asked. first_scorer: for the first step, where only its distributions are."""
        self.batches, self.scorer, self.hearing, self.first_scorer = batches, scorer, hearing, first_scorer
        self.engine, self.guidance, self.processes = engine, guidance, processes
        self.heard = Heard(TextLoss(0.0, 0, 0), ())
        """What both models said of the last step's text."""

    def step(self, first_row: int) -> dict[str, float]:
        """One optimizer step on the rows from `first_row` on; its numbers, by the names of docs/monitoring.md."""
        clock = Clock(self.processes)
        micro_batches = self.batches.step(first_row)
        counts = count_step(micro_batches, self.guidance, self.engine.data_group, self.processes.device)
        clock.start_teacher()
        teacher_losses = self._score(micro_batches)
        sums_N = self.hearing.sums(micro_batches, self._said(micro_batches, teacher_losses))
        clock.start_student()
        learning_rate = self.engine.learning_rate  # of this step: training moves it on
        loss = self.engine.train(micro_batches, teacher_losses, counts)
        seconds = clock.stop()
        stats, student_nats, sums_N = self.engine.objective.take_stats(sums_N)
        self.heard = heard(student_nats, sums_N)
        return self._numbers(loss, learning_rate, counts, stats, seconds)

    def _score(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The teacher's losses, one [B, U] a batch; [B, 0] where there is no teacher."""
        if self.scorer is None:
            return [torch.empty(len(batch.target_BS), 0, device=self.processes.device) for batch in batches]
        return self.scorer.score(batches)

    def _said(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The teacher's losses, once more or for the first step alone; None where there are none."""
        if self.first_scorer is not None:
            scorer, self.first_scorer = self.first_scorer, None
            return scorer.score(batches)
        return teacher_losses if self.scorer is not None and self.guidance.needs_teacher else None

    def _numbers(
        self, loss: float, learning_rate: float, counts: StepCounts, stats: Tensor, seconds: tuple[float, float, float]
    ) -> dict[str, float]:
        """What a step is remembered by."""
        means = summarize(stats)
        whole, teacher, student = seconds
        numbers = {
            "loss/train": loss,
            "loss/nonfinite_tokens": stats[STATS.index("nonfinite")].item(),
            "loss/tokens_over_capacity": stats[STATS.index("over_capacity")].item(),
            "optimizer/learning_rate": learning_rate,
            "optimizer/skipped_steps": self.engine.skipped_steps,
            "throughput/student_tokens_per_second": counts.targets / whole,
            "throughput/step_seconds": whole,
            "throughput/student_seconds": student,
            "throughput/student_tokens": counts.targets,
        }
        if "student_loss_all" in means:
            numbers["loss/all_tokens"] = means.pop("student_loss_all")
        if self.engine.grad_norm is not None:
            numbers["optimizer/grad_norm"] = self.engine.grad_norm
        means.pop("loss", None)
        numbers |= self._of_text()
        numbers |= self.engine.take_numbers(counts)
        if self.guidance.selects:
            without_teacher = () if self.guidance.needs_teacher else ("guide_", "excess_", "threshold")
            numbers |= {f"guidance/{name}": value for name, value in means.items() if not name.startswith(without_teacher)}
            for reason in pack.Mapping:
                if reason != pack.Mapping.MAPPED:
                    numbers[f"guidance/unmapped_{reason.name.lower()}"] = counts.mapping[reason] / counts.targets
            lost = counts.mapping[pack.Mapping.MAPPED] - stats[STATS.index("mapped")].item()
            numbers["guidance/unmapped_nan"] = lost / counts.targets
        if self.scorer is not None and self.guidance.needs_teacher:
            numbers |= {
                "teacher/seconds": teacher,
                "teacher/share_of_time": teacher / whole,
                "teacher/tokens": counts.teacher_tokens,
                "teacher/tokens_per_second": counts.teacher_tokens / teacher,
                "teacher/padding": self.scorer.padding,
            }
        return numbers

    def _of_text(self) -> dict[str, float]:
        """The losses of text, of both models."""
        student, teachers = self.heard
        numbers = {"loss/bits_per_byte": student.bits_per_byte} if student.text_bytes else {}
        # of distributions the first step alone has losses, which make no curve
        for name, said in zip(teacher_names(len(teachers)), teachers, strict=True) if self.scorer is not None else ():
            if said.text_bytes:
                numbers |= {f"loss/{name}_all_tokens": said.per_token, f"loss/{name}_bits_per_byte": said.bits_per_byte}
        return numbers


class Clock:
    """Wall time of a step: reading, the teacher, the student."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.begin = self.teacher = self.student = self._now()

    def start_teacher(self) -> None:
        self.teacher = self._now()

    def start_student(self) -> None:
        self.student = self._now()

    def stop(self) -> tuple[float, float, float]:
        """Seconds of the whole step, of the teacher, of the student."""
        end = self._now()
        return end - self.begin, self.student - self.teacher, end - self.student

    def _now(self) -> float:
        self.processes.synchronize()
        return time.perf_counter()
