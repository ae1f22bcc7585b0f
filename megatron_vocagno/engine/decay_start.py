"""Start a run that only decays from a checkpoint of another run.

The new run must be the old one with another end: the same data, seed, student, teacher, guidance, precision and type of
optimizer, and a learning rate that continues where the old one was. Only the end of the schedule, the layout and what is reported
may differ. The other values of the DeepSpeed configuration are not in a checkpoint, so they cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vocagno.config import Schedule
from megatron_vocagno.engine.manifest import CheckpointManifest, changes
from megatron_vocagno.errors import RunError

MAY_CHANGE = (
    *("output", "parallel", "eval", "checkpoint", "logging"),
    *("training.steps", "training.tokens", "training.schedule", "training.max_minutes", "training.max_nonfinite_steps"),
    *("training.outlier_sigma", "training.outlier_window"),
    *("data.train", "data.valid"),  # paths: the fingerprints of the datasets are compared by check_resumable
)
"""Fields of the run file that may differ from the old run."""


@dataclass(frozen=True)
class DecayStart:
    """The checkpoint from which a run starts, and where its decay begins."""

    folder: Path
    steps: int
    """Number of the run's last step."""
    decay_steps: int

    def check(
        self,
        manifest: CheckpointManifest,
        before: dict[str, Any],
        run: dict[str, Any],
        next_rate: float | None,
        peak: float,
        report: Callable[[str], None],
    ) -> None:
        """Raises RunError if the run would be more than a decay of the old one.

        before, run  the resolved old and new run, as in run.json
        next_rate    learning rate of the step after the checkpoint; None if an earlier release wrote it
        peak         the learning rate from which this run decays
        report       gets lines for the user
        """
        done = manifest.position.step
        if done + self.decay_steps != self.steps:
            raise RunError(
                f"training.schedule.decay_from = {self.folder} is of step {done:,}, but with {self.steps:,} steps and "
                f"decay_steps = {self.decay_steps:,}, the decay begins after step {self.steps - self.decay_steps:,}.\n"
                f"  To decay in {self.decay_steps:,} steps from there, set training.steps = {done + self.decay_steps}."
            )
        differences = [line for line in changes(before, run) if not _is_allowed(line.partition(" = ")[0])]
        if differences:
            raise RunError(
                f"training.schedule.decay_from = {self.folder} belongs to another run than this one: {'; '.join(differences)}.\n"
                "  A run that only decays changes nothing else. Restore the old values, or start another run from the exported "
                "weights (student.pretrained)."
            )
        if next_rate is None:
            report(f"note: {self.folder} does not record its learning rate: check that its next step would have {peak:g}")
        elif not math.isclose(next_rate, peak, rel_tol=1e-6):
            raise RunError(
                f"training.schedule.decay_from = {self.folder} would continue with learning rate {next_rate:g}, this run decays "
                f"from {peak:g}: the learning rate would jump.\n"
                "  Likely causes: another optimizer.params.lr, or a checkpoint of the warm-up or of a decay."
            )


def decay_start(schedule: Schedule, steps: int) -> DecayStart | None:
    """The start of a run with `decay_from`, else None. steps: number of the run's last step."""
    if schedule.decay_from is None or schedule.decay_steps is None:
        return None
    return DecayStart(schedule.decay_from, steps, schedule.decay_steps)


def _is_allowed(field: str) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in MAY_CHANGE)
