"""Input and result of a selection. The torch and the Triton backend share both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch.distributed as dist
from torch import Tensor

from megatron_vocagno.objective.ranking import share

Aggregate = Literal["max", "mean", "sum", "min"]
Scope = Literal["sequence", "microbatch", "global"]
Unmapped = Literal["include", "exclude"]
Unit = Literal["token", "chunk"]
Weighting = Literal["top_k", "threshold", "control_variate"]


@dataclass(frozen=True)
class Rule:
    """How tokens get their weights. The defaults are the paper's values. `weighting` and `chunks` have the equations.

    Raises ValueError: an unknown choice, or a number out of range.

    >>> Rule(keep=0.6).keep, Rule(unit="chunk", weighting="threshold").threshold
    (0.6, 2.0)
    """

    keep: float = 0.4
    """Share of the mapped tokens that is kept: above 0, at most 1, with at most 6 decimals. Only for weighting 'top_k'."""
    aggregate: Aggregate = "max"
    """How the teacher's losses in a token's range become one guide: see gather_guide. Only for unit 'token'."""
    scope: Scope = "microbatch"
    """Which tokens are ranked together. 'sequence': each row separately. 'microbatch': all tokens of the call. 'global': the
    tokens of all ranks of `group`, as if their batches were concatenated in rank order. Every rank of the group must then make
    the call."""
    unmapped: Unmapped = "include"
    """'include': unmapped tokens have weight 1. 'exclude': they have weight 0."""
    require_positive: bool = False
    """Of the k highest tokens, keep only those with an excess above 0. Only for weighting 'top_k'."""
    group: dist.ProcessGroup | None = None
    """Used by scope 'global' only. None means this process only."""
    unit: Unit = "token"
    """The stretch of text over which both models are compared. 'token': the student's loss of a token with the guide of the
    teacher tokens that cover it. 'chunk': the losses of both models over the same bytes, see chunks.py."""
    weighting: Weighting = "top_k"
    """How the excess becomes a weight. 'top_k': 1 for the highest, by rank. 'threshold' and 'control_variate': a function of the
    excess. The scope then makes no difference to the weights."""
    threshold: float = 2.0
    """t in nats, at least 0. With weighting 'threshold', an excess above -t has weight 1. The statistics count the rest."""
    strength: float = 0.25
    """b of weighting 'control_variate': w = 1 - b * min(r, c). Above 0."""
    clip: float = 4.0
    """c of weighting 'control_variate', for which strength * clip is at most 1, so that no weight is negative. Also of the
    statistics."""

    def __post_init__(self) -> None:
        choices = {"aggregate": Aggregate, "scope": Scope, "unmapped": Unmapped, "unit": Unit, "weighting": Weighting}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in get_args(known):
                raise ValueError(f"Rule: {name} = {value!r}: expected one of {', '.join(get_args(known))}")
        share(self.keep)
        self._check_numbers()
        if self.require_positive and self.weighting != "top_k":
            raise ValueError(f"Rule: require_positive applies only to weighting 'top_k' (weighting is {self.weighting!r})")

    def _check_numbers(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise ValueError(
                f"Rule: threshold = {self.threshold}: expected nats, at least 0: an excess above -threshold has weight"
            )
        for name in ("strength", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Rule: {name} = {getattr(self, name)}: expected a number above 0")
        if self.weighting == "control_variate" and (product := self.strength * self.clip) > 1 + 1e-9:
            raise ValueError(
                f"Rule: strength = {self.strength}, clip = {self.clip}: expected a product of at most 1, because the smallest "
                f"weight is 1 - strength * clip = {1 - product:g}"
            )

    @property
    def ranks(self) -> dist.ProcessGroup | None:
        """The ranks whose tokens are ranked together."""
        return self.group if self.scope == "global" and self.weighting == "top_k" else None


PAPER = Rule()
"""The paper's values."""


@dataclass(frozen=True)
class Selection:
    """Result of select_tokens, on the device of the student's losses."""

    weight_BS: Tensor
    """[B, S] float32, from 0 to 1. Weighting 'top_k' and 'threshold': 0 or 1."""
    guide_BS: Tensor
    """[B, S] float32, nats. NaN if the token is unmapped. Unit 'chunk': the teacher's loss of the chunk, divided by the chunk's
    number of student tokens, so that sums over tokens are sums over chunks."""
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
