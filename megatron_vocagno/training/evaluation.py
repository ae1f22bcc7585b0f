"""What a run says of held-out text: bits per byte, and the sample rows token by token."""

from __future__ import annotations

import math

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import evaluation_batches
from megatron_vocagno.config import Run
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


class Evaluator:
    """`data.valid` of a run, and its first rows as samples."""

    def __init__(
        self,
        engine: TrainEngine,
        run: Run,
        valid: AlignedDataset | None,
        samples: Samples | None,
        scorer: Scorer | None,
        processes: Processes,
        stop_signal: StopSignal,
        front: Front,
    ) -> None:
        """front: of the student."""
        self.engine, self.run, self.valid, self.samples, self.scorer = engine, run, valid, samples, scorer
        self.processes, self.stop_signal, self.front = processes, stop_signal, front

    def evaluate(self, step: int, monitor: Monitor) -> None:
        """An evaluation after a step; nothing where there is no held-out text. Collective over the world."""
        if self.valid is None:
            return
        numbers = self._bits_per_byte(self.valid)
        if self.samples is not None and numbers:
            sample = self.samples.look(step, self.engine, self.scorer, self._asked)
            if sample is not None:
                numbers |= summary(self.samples.rows, sample)
                monitor.sample(self.samples.rows, sample)
        monitor.evaluation(step, numbers)

    def _asked(self) -> int:
        """The signal that asked any rank to stop, or 0. Collective over the world."""
        return all_reduce_max(self.stop_signal.requested, self.processes.device)

    def _bits_per_byte(self, valid: AlignedDataset) -> dict[str, float]:
        """Bits per byte, and the mean loss per token in nats; empty if a rank is asked to stop meanwhile.

        Collective over the world.
        """
        engine, run = self.engine, self.run
        nats, text_bytes, tokens = 0.0, 0, 0
        rows = valid, valid.student_byte_lengths, run.data.row_length
        steps = evaluation_batches(*rows, engine.layout, engine.data_rank, run.eval.rows, self.front)
        for step in steps:
            if self._asked():
                return {}
            nats += engine.evaluate(step.batches)
            text_bytes += step.text_bytes
            tokens += step.tokens
        # the losses are summed over all ranks already, the counts are of this rank's rows
        text_bytes, tokens = sum_over_ranks([text_bytes, tokens], engine.data_group, self.processes.device)
        if not text_bytes:
            raise SharedError(f"{run.data.valid}: the rows to evaluate hold no text (eval.rows = {run.eval.rows})")
        return {"eval/bits_per_byte": nats / math.log(2) / text_bytes, "eval/loss": nats / tokens}
