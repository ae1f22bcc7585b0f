"""What a selection is asked for, and what it answers: the same in torch and in Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from megatron_vocagno.objective.ranking import share

Aggregate = Literal["max", "mean", "sum", "min"]
Scope = Literal["sequence", "microbatch", "global"]
Unmapped = Literal["include", "exclude"]


@dataclass(frozen=True)
class Selection:
    """What a selection answers; see select_tokens. On the device of the student's losses."""

    weight_BS: Tensor
    """[B, S] float32 of 0 and 1."""
    guide_BS: Tensor
    """[B, S] float32, nats; NaN where unmapped."""
    rows_C: Tensor
    """[C] int64, positions b * S + s, each at most once. One list for each row ('sequence') or one for all; in a list those with
    weight, ascending. A GPU, which must know C beforehand, fills each list up to its capacity with tokens of weight 0, ascending.
    """
    stats_PK: Tensor
    """[P, len(STATS)] float64, parts of the sums named in STATS: add over P."""


@dataclass(frozen=True)
class Rule:
    """How tokens are selected; each field is explained in select_tokens. Raises ValueError: unknown choices, keep."""

    keep: float
    scope: Scope
    unmapped: Unmapped
    require_positive: bool = False
    group: dist.ProcessGroup | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        check_choices(self.scope, self.unmapped)
        share(self.keep)
        if self.capacity is not None and (not isinstance(self.capacity, int) or self.capacity < 0):
            raise ValueError(f"capacity = {self.capacity}: expected a number of tokens, or None for room for all")

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """Those whose tokens are ranked together."""
        return self.group if self.scope == "global" else None


def check_choices(scope: str, unmapped: str) -> None:
    """Raises ValueError: none of those that there are."""
    if scope not in ("sequence", "microbatch", "global"):
        raise ValueError(f"unknown scope {scope!r}: expected sequence, microbatch or global")
    if unmapped not in ("include", "exclude"):
        raise ValueError(f"unknown policy {unmapped!r} for unmapped tokens: expected include or exclude")
