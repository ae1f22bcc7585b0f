"""Evaluation on held-out text: bits per byte, and the sample rows token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import evaluation_batches
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.collectives import all_reduce_max
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.engine.step_counts import sum_over_ranks
from megatron_vocagno.errors import SharedError
from megatron_vocagno.training.monitor import Monitor
from megatron_vocagno.training.sample_files import summary
from megatron_vocagno.training.samples import Samples
from megatron_vocagno.training.stop_signal import StopSignal


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of a run."""

    data: AlignedDataset
    """`data.valid`."""
    row_length: int
    rows: int | None
    """Number of rows to evaluate, from the start of the dataset. None for all."""
    front: Front
    """Prefix of the student."""


class Evaluator:
    """Evaluates the student on held-out text."""

    def __init__(
        self,
        engine: TrainEngine,
        held_out: HeldOut | None,
        samples: Samples | None,
        scorer: Scorer | None,
        processes: Processes,
        stop_signal: StopSignal,
    ) -> None:
        """held_out, samples: None if the run has none. scorer: scores the sample rows; None if no teacher is used."""
        self.engine, self.held_out, self.samples, self.scorer = engine, held_out, samples, scorer
        self.processes, self.stop_signal = processes, stop_signal

    def evaluate(self, step: int, monitor: Monitor) -> None:
        """Evaluate after a step and report the metrics. Does nothing without held-out text. Collective over the world."""
        if self.held_out is None:
            return
        metrics = self._bits_per_byte(self.held_out)
        if self.samples is not None and metrics:
            sample = self.samples.evaluate(step, self.engine, self.scorer, self._stop_requested)
            if sample is not None:
                metrics |= summary(self.samples.rows, sample)
                monitor.sample(self.samples.rows, sample)
        monitor.evaluation(step, metrics)

    def _stop_requested(self) -> int:
        """The largest StopSignal.requested of all ranks: 0 if the run continues. Collective over the world."""
        return all_reduce_max(self.stop_signal.requested, self.processes.device)

    def _bits_per_byte(self, held_out: HeldOut) -> dict[str, float]:
        """Bits per byte, and the mean loss per token in nats. Empty if a stop is requested before the end.

        Collective over the world. Raises SharedError if the rows contain no text.
        """
        engine, data = self.engine, held_out.data
        nats, text_bytes, tokens = 0.0, 0, 0
        rows = data, data.student_byte_lengths, held_out.row_length
        steps = evaluation_batches(*rows, engine.layout, engine.data_rank, held_out.rows, held_out.front)
        for step in steps:
            if self._stop_requested():
                return {}
            nats += engine.evaluate(step.batches)
            text_bytes += step.text_bytes
            tokens += step.tokens
        # the losses are summed over all ranks already, but the counts only cover the rows of this rank
        text_bytes, tokens = sum_over_ranks([text_bytes, tokens], engine.data_group, self.processes.device)
        if not text_bytes:
            raise SharedError(f"{data.path}: the rows to evaluate contain no text (eval.rows = {held_out.rows})")
        return {"eval/bits_per_byte": nats / math.log(2) / text_bytes, "eval/loss": nats / tokens}
