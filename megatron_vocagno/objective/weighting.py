"""Weights as functions of the excess, without a ranking (docs/method.md, Beyond the paper).

    D = L_S - L_T        the excess of a chunk (or of a token), nats
    r = exp(-D)          the likelihood ratio p_S / p_T of its text

    threshold            w = 1 if D > -t, else 0
    control_variate      w = 1 - b * min(r, c)

If the text follows the teacher, and no possible chunk is the beginning of another one, the mean of r is 1 for every student. Two
facts follow. The share of chunks with D <= -t is at most exp(-t) (Markov's inequality). And with c = inf, the gradient of w * L_S
has the same mean as the gradient of L_S, because b * r * L_S has a gradient of mean 0 (a control variate). Its variance is
smaller, because text that the student already finds likely has a small weight. If chunks can be beginnings of other chunks in the
student's tokens, both facts are approximate.

The weight of a token depends on no other chunk. It is therefore the same in every layout and every scope.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vocagno.objective.rule import Rule

SMALLEST = 2.0**-24
"""Rounding must not turn the weight of a chunk above the cut into 0."""


def cut(rule: Rule) -> float:
    """An excess has weight if it is above this value. -inf: every excess has weight, -inf included.

    >>> cut(Rule(weighting="threshold")), round(cut(Rule(weighting="control_variate", clip=4)), 4)
    (-2.0, -1.3863)
    """
    if rule.weighting == "threshold":
        return -rule.threshold
    return -math.log(rule.clip) if lowest_weight(rule) == 0 else -math.inf


def lowest_weight(rule: Rule) -> float:
    """The weight of the lowest excess, of weighting 'control_variate': 1 - b * c."""
    return max(0.0, 1 - rule.strength * rule.clip)


def weights(excess: Tensor, rule: Rule) -> Tensor:
    """The weight of each excess, float32, for weighting 'threshold' and 'control_variate'. An excess of NaN has weight 0.

    >>> excess = torch.tensor([-3.0, -1.0, 0.0, 5.0, torch.nan])
    >>> weights(excess, Rule(weighting="threshold", threshold=2))
    tensor([0., 1., 1., 1., 0.])
    >>> weights(excess, Rule(weighting="control_variate", strength=0.25, clip=4))
    tensor([0.0000, 0.3204, 0.7500, 0.9983, 0.0000])
    """
    if rule.weighting == "threshold":
        return (excess > cut(rule)).float()
    # the bound is on the excess, not on exp(-excess), which may be infinite
    weight = (1 - rule.strength * torch.exp(-excess)).clamp(min=SMALLEST)
    weight = weight.where(excess > -math.log(rule.clip), lowest_weight(rule))
    return weight.masked_fill(excess.isnan(), 0.0)
