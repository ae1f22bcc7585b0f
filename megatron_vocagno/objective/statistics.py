"""Statistics of a selection: sums that add up over micro-batches, steps and ranks, and are divided once, at the end."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vocagno.objective.rule import Rule, Selection

STATS = (
    "valid",  # tokens: neither padding nor ignored
    "nonfinite",  # valid tokens whose student loss is NaN or infinite
    "mapped",  # valid, student loss not NaN, guide not NaN
    "kept",  # mapped, weight above 0
    "unmapped",  # valid, student loss not NaN, guide NaN
    "unmapped_kept",  # unmapped, weight 1
    "over_capacity",  # would have weight, but exceed the list of tokens: 0 unless losses are NaN
    "student_kept_sum",  # l_S over kept, nats
    "student_dropped_sum",  # l_S over mapped, weight 0
    "student_unmapped_sum",  # l_S over unmapped
    "guide_kept_sum",  # g over kept
    "guide_dropped_sum",  # g over mapped, weight 0
    "weight_sum",
    "weighted_sum",  # weight * l_S
    "threshold_sum",  # the smallest excess that the ranking kept, over the selection groups in which it is finite; nats
    "thresholds",  # the number of these groups
    "units",  # mapped chunks, or tokens for unit 'token', whose excess is not NaN
    "ratio_sum",  # min(r, clip) over units, r = exp(-excess)
    "below_sum",  # units with an excess of at most -threshold
)
"""Names of the sums, in order. Add the sums over micro-batches, steps and ranks, then call `summarize`."""

_DROPPED, _KEPT, _UNMAPPED, _UNMAPPED_KEPT, _NAN = range(1, 6)  # 0: not valid


class Excess(NamedTuple):
    """The excess that a selection computed."""

    excess_BS: Tensor
    """[B, S] float32, nats. The tokens of a chunk have one excess. NaN if there is none."""
    opens_BS: Tensor
    """[B, S] bool, one token of each unit."""
    threshold_G: Tensor
    """[G] float32, the smallest excess that the ranking kept in each group. Infinite if it kept none."""


def tally(
    student_BS: Tensor,
    guide_BS: Tensor,
    valid_BS: Tensor,
    weight_BS: Tensor,
    excess: Excess | None,
    rule: Rule,
    over_capacity: int,
) -> Tensor:
    """The sums named in STATS. A token with a student loss of NaN is counted in valid and nonfinite only.

    student_BS, guide_BS  [B, S] float32, nats. A guide of NaN means unmapped
    valid_BS              [B, S] bool
    weight_BS             [B, S] float32, at least 0. Must be 0 if the student's loss is NaN
    excess                None if there is none: a selection without a teacher
    over_capacity         number of tokens that lost their weight
    returns               [1, len(STATS)] float64

    Each token is of one kind, and each sum is over one or two kinds, so each loss is read once. Waits for the device.
    """
    kind_BS = guide_BS.isnan() * (_UNMAPPED - _DROPPED) + (weight_BS != 0) + _DROPPED
    kind_N = kind_BS.add_(student_BS.isnan(), alpha=_NAN).clamp_(max=_NAN).mul_(valid_BS).flatten()
    count = torch.bincount(kind_N, minlength=6).tolist()
    student = torch.bincount(kind_N, student_BS.flatten().double(), minlength=6).tolist()
    guide = torch.bincount(kind_N, guide_BS.flatten().double(), minlength=6).tolist()
    weight = torch.bincount(kind_N, weight_BS.flatten().double(), minlength=6).tolist()
    # `where`, because 0 * inf is NaN
    product_BS = torch.where(weight_BS != 0, weight_BS.double() * student_BS.double(), 0.0)
    weighted = torch.bincount(kind_N, product_BS.flatten(), minlength=6).tolist()
    # an infinite loss makes the sum over its kind infinite or NaN
    infinite = 0 if all(map(math.isfinite, student[_DROPPED:_NAN])) else int((student_BS.isinf() & valid_BS).sum())
    named = {
        "valid": sum(count[_DROPPED:]),
        "nonfinite": count[_NAN] + infinite,
        "mapped": count[_KEPT] + count[_DROPPED],
        "kept": count[_KEPT],
        "unmapped": count[_UNMAPPED] + count[_UNMAPPED_KEPT],
        "unmapped_kept": count[_UNMAPPED_KEPT],
        "over_capacity": over_capacity,
        "student_kept_sum": student[_KEPT],
        "student_dropped_sum": student[_DROPPED],
        "student_unmapped_sum": student[_UNMAPPED] + student[_UNMAPPED_KEPT],
        "guide_kept_sum": guide[_KEPT],
        "guide_dropped_sum": guide[_DROPPED],
        "weight_sum": weight[_KEPT] + weight[_UNMAPPED_KEPT],
        "weighted_sum": weighted[_KEPT] + weighted[_UNMAPPED_KEPT],
    } | _of_units(excess, valid_BS, rule)
    return torch.tensor([[named[name] for name in STATS]], dtype=torch.float64, device=student_BS.device)


def _of_units(excess: Excess | None, valid_BS: Tensor, rule: Rule) -> dict[str, float]:
    if excess is None:
        return dict.fromkeys(("threshold_sum", "thresholds", "units", "ratio_sum", "below_sum"), 0)
    thresholds = [threshold for threshold in excess.threshold_G.tolist() if math.isfinite(threshold)]
    excess_X = excess.excess_BS[excess.opens_BS & valid_BS]
    excess_X = excess_X[~excess_X.isnan()]
    return {
        "threshold_sum": sum(thresholds),
        "thresholds": len(thresholds),
        "units": len(excess_X),
        "ratio_sum": float(torch.exp(-excess_X.double()).clamp(max=rule.clip).sum()),
        "below_sum": int((excess_X <= -rule.threshold).sum()),
    }


def summarize(*stats: Selection | Tensor) -> dict[str, float]:
    """Shares and means of one or more selections. Losses are in nats.

    stats    selections, or their `stats` [len(STATS)] float64 (for example of earlier micro-batches). They are added first
    returns  share_kept (of mapped), share_unmapped (of valid), weight (mean over mapped), loss (the weighted mean), threshold.
             The mean student_loss, guide and excess of `_kept` and of `_dropped` mapped tokens. student_loss_unmapped and
             student_loss_all. Over units: likelihood_ratio, the mean of min(r, clip), and share_below, at most -threshold. A mean
             over no tokens is left out

    Copies the sums from the device, and waits for it. Raises ValueError: a tensor of another shape.

    Two of five mapped tokens are kept:

    >>> from megatron_vocagno.objective import guided_loss
    >>> first_BS, valid_BS = torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool)
    >>> guided = guided_loss(torch.tensor([[4.0, 0.0, 2.0, 0.0, 0.0]]), torch.zeros(1, 5), first_BS, first_BS + 1, valid_BS)
    >>> summarize(guided)["share_kept"], summarize(guided)["student_loss_kept"]
    (0.4, 3.0)
    >>> summarize()
    {}
    """
    total = torch.zeros(len(STATS), dtype=torch.float64)
    for part in stats:
        sums_K = part.stats if isinstance(part, Selection) else part
        if sums_K.shape != total.shape:
            raise ValueError(f"summarize: expected selections, or the {len(STATS)} sums of each, got shape {list(sums_K.shape)}")
        total += sums_K.cpu()
    means = {name: part.tolist() for name, part in fractions(total).items()}
    return {name: above / below for name, (above, below) in means.items() if below}


def fractions(stats_K: Tensor) -> dict[str, Tensor]:
    """The means of `summarize` before their division, [2] float64 each: a sum, and the number that it is divided by.

    stats_K  [len(STATS)] float64, for example of one selection

    They add up over micro-batches and ranks, and no copy from the device is needed.
    """
    sums = dict(zip(STATS, stats_K, strict=True))
    kept, dropped = sums["kept"], sums["mapped"] - sums["kept"]
    student = sums["student_kept_sum"] + sums["student_dropped_sum"] + sums["student_unmapped_sum"]
    means = {
        "share_kept": (kept, sums["mapped"]),
        "share_unmapped": (sums["unmapped"], sums["valid"]),
        "weight": (sums["weight_sum"] - sums["unmapped_kept"], sums["mapped"]),
        "loss": (sums["weighted_sum"], sums["weight_sum"]),
        "threshold": (sums["threshold_sum"], sums["thresholds"]),
        "student_loss_kept": (sums["student_kept_sum"], kept),
        "guide_kept": (sums["guide_kept_sum"], kept),
        "excess_kept": (sums["student_kept_sum"] - sums["guide_kept_sum"], kept),
        "student_loss_dropped": (sums["student_dropped_sum"], dropped),
        "guide_dropped": (sums["guide_dropped_sum"], dropped),
        "excess_dropped": (sums["student_dropped_sum"] - sums["guide_dropped_sum"], dropped),
        "student_loss_unmapped": (sums["student_unmapped_sum"], sums["unmapped"]),
        "student_loss_all": (student, sums["mapped"] + sums["unmapped"]),
        "likelihood_ratio": (sums["ratio_sum"], sums["units"]),
        "share_below": (sums["below_sum"], sums["units"]),
    }
    return {name: torch.stack(parts) for name, parts in means.items()}
