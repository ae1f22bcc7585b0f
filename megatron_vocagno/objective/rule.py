"""Input and result of a selection. The torch and the Triton backend share both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch.distributed as dist
from torch import Tensor

from megatron_vocagno.objective.ranking import share

Aggregate = Literal["max", "mean", "sum", "min"]
Scope = Literal["sequence", "microbatch", "global"]
Unmapped = Literal["include", "exclude"]


@dataclass(frozen=True)
class Rule:
    """How tokens are selected. The defaults are the paper's values.

    Raises ValueError: an unknown choice, or `keep` out of range.

    >>> Rule(keep=0.6)
    Rule(keep=0.6, aggregate='max', scope='microbatch', unmapped='include', require_positive=False, group=None)
    """

    keep: float = 0.4
    """Share of the mapped tokens that is kept: above 0, at most 1, with at most 6 decimals."""
    aggregate: Aggregate = "max"
    """How the teacher's losses in a token's range become one guide: see gather_guide."""
    scope: Scope = "microbatch"
    """Which tokens are ranked together. 'sequence': each row separately. 'microbatch': all tokens of the call. 'global': the
    tokens of all ranks of `group`, as if their batches were concatenated in rank order. Every rank of the group must then make
    the call."""
    unmapped: Unmapped = "include"
    """'include': unmapped tokens have weight 1. 'exclude': they have weight 0."""
    require_positive: bool = False
    """Of the k highest tokens, keep only those with an excess above 0."""
    group: dist.ProcessGroup | None = None
    """Used by scope 'global' only. None means this process only."""

    def __post_init__(self) -> None:
        for name, choices in (("aggregate", Aggregate), ("scope", Scope), ("unmapped", Unmapped)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"Rule: {name} = {value!r}: expected one of {', '.join(get_args(choices))}")
        share(self.keep)

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """The ranks whose tokens are ranked together."""
        return self.group if self.scope == "global" else None


PAPER = Rule()
"""The paper's values."""


@dataclass(frozen=True)
class Selection:
    """Result of select_tokens, on the device of the student's losses."""

    weight_BS: Tensor
    """[B, S] float32, 0 or 1."""
    guide_BS: Tensor
    """[B, S] float32, nats. NaN if the token is unmapped."""
    tokens_C: Tensor
    """[C] int64, positions b * S + s, each at most once. Scope 'sequence' has one list per row, the other scopes have one list. A
    list contains the tokens with weight, ascending. On a GPU, C must be known in advance: each list is filled up to its capacity
    with tokens of weight 0, ascending.
    """
    stats_PK: Tensor
    """[P, K] float64: the sums in parts, K = len(statistics.STATS). Add them over P."""

    @property
    def stats(self) -> Tensor:
        """[K] float64, sums over the tokens. Add them over micro-batches and ranks, and pass the total to `summarize`."""
        return self.stats_PK.sum(0)
