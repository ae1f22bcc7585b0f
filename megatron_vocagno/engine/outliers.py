"""Skip optimizer steps whose loss or gradient norm is an outlier of the last steps.

    step is skipped  if  |x - mean| > sigma * std  for its loss or its gradient norm x

mean and std (unbiased) are those of the last `window` steps before it, skipped outliers included, so that a lasting change is
accepted after a few steps. No step is skipped before max(20, window / 2) steps are known. This is the rule of the
SkipStepOptimizer of OLMo-core.

The decision is made between the gradient norm and the update. The optimizer is then not called, and the step is marked as
overflowed, as DeepSpeed does for a gradient that is not finite: weights, optimizer states and schedule stay as they are.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from megatron_vocagno.config import Training
from megatron_vocagno.engine.settings import DeepSpeedConfig
from megatron_vocagno.errors import RunError

MIN_STEPS = 20
"""The smallest number of steps, the judged one included, from which an outlier is recognized."""


@dataclass(frozen=True)
class Outlier:
    """A step that was skipped, and the steps that it was compared with."""

    compared_steps: int
    loss: float
    grad_norm: float
    loss_mean: float
    loss_std: float
    grad_norm_mean: float
    grad_norm_std: float


def find_outlier(
    loss: float, grad_norm: float, recent: Sequence[tuple[float, float]], window: int, sigma: float
) -> Outlier | None:
    """The outlier, or None if the step is ordinary. recent: losses and gradient norms of at most `window` steps before it."""
    if len(recent) + 1 < max(MIN_STEPS, window // 2):
        return None
    losses, norms = zip(*recent, strict=True)
    loss_mean, loss_std = statistics.fmean(losses), statistics.stdev(losses)
    norm_mean, norm_std = statistics.fmean(norms), statistics.stdev(norms)
    # a comparison with NaN is false
    if abs(loss - loss_mean) <= sigma * loss_std and abs(grad_norm - norm_mean) <= sigma * norm_std:
        return None
    return Outlier(len(recent), loss, grad_norm, loss_mean, loss_std, norm_mean, norm_std)


class OutlierFilter:
    """Decides before each update of an optimizer whether the step is made. All ranks decide as the first one does."""

    def __init__(
        self, window: int, sigma: float, zero_optimizer: Any, step_loss: Callable[[], float], device: torch.device
    ) -> None:
        """
        window, sigma   see find_outlier
        zero_optimizer  DeepSpeed's ZeRO optimizer, of any stage
        step_loss       the loss of the step over all ranks, after its backward passes. Collective over the world
        device          of the tensors that the ranks exchange
        """
        self.window, self.sigma, self.optimizer = window, sigma, zero_optimizer
        self.step_loss, self.device = step_loss, device
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)
        self.last: Outlier | None = None
        """The outlier that the latest step was. None if the step was made."""
        self._judged = False
        inner = zero_optimizer.optimizer
        update = inner.step

        @functools.wraps(update)
        def step(*arguments: Any, **options: Any) -> Any:
            # ZeRO calls it once per group of parameters
            if not self._judged:
                self._judge()
                self._judged = True
            return None if self.last is not None else update(*arguments, **options)

        inner.step = step

    def begin_step(self) -> None:
        """Forget the decision of the step before."""
        self._judged, self.last = False, None

    def _judge(self) -> None:
        # ZeRO has just computed the norm of all gradients, and found that it is finite
        loss, grad_norm = self.step_loss(), float(self.optimizer._global_grad_norm)
        outlier = find_outlier(loss, grad_norm, self.recent, self.window, self.sigma)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.recent.append((loss, grad_norm))
        numbers = [math.nan] * 7 if outlier is None else list(vars(outlier).values())
        decision = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.broadcast(decision, src=0)
        compared, *numbers = decision.tolist()
        self.last = None if math.isnan(compared) else Outlier(int(compared), *numbers)
        if self.last is not None:
            # reset by ZeRO at the start of its next step
            self.optimizer.overflow = True


def check_outliers(training: Training, settings: DeepSpeedConfig) -> None:
    """Raises RunError if outliers are to be skipped, and DeepSpeed changes something before it knows the gradient norm."""
    if training.outlier_sigma is None:
        return
    if str(settings["optimizer"]["type"]).lower() == "muon":
        raise RunError(
            "training.outlier_sigma is not supported with optimizer.type = 'Muon' in the DeepSpeed configuration: DeepSpeed "
            "updates its momentum before the gradient norm is known"
        )
    zero = settings.get("zero_optimization") or {}
    if zero.get("compute_grad_norm") is False:
        raise RunError(
            "training.outlier_sigma needs the gradient norm, but zero_optimization.compute_grad_norm is false in the DeepSpeed "
            "configuration: remove it"
        )
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio != 1.0:
        raise RunError(
            f"training.outlier_sigma is not supported with zero_optimization.offload_optimizer.ratio = {ratio} in the DeepSpeed "
            "configuration: a part of the weights has another optimizer. Use 1.0"
        )
