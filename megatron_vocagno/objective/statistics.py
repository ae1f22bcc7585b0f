"""What a selection did, as sums that add up over micro-batches, steps and ranks; divided once, at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STATS = (
    "valid",  # tokens: neither padding nor ignored
    "nonfinite",  # valid tokens whose student loss is NaN or infinite
    "mapped",  # valid, student loss not NaN, guide not NaN
    "kept",  # mapped, weight 1
    "unmapped",  # valid, student loss not NaN, guide NaN
    "unmapped_kept",  # unmapped, weight 1
    "over_capacity",  # would have weight 1, and did not find room in the list of rows: 0 unless losses were NaN
    "student_kept_sum",  # l_S over kept, nats
    "student_dropped_sum",  # l_S over mapped, weight 0
    "student_unmapped_sum",  # l_S over unmapped
    "guide_kept_sum",  # g over kept
    "guide_dropped_sum",  # g over mapped, weight 0
    "weight_sum",
    "weighted_sum",  # weight * l_S
    "threshold_sum",  # the smallest excess that the ranking kept, over the selection groups that have a finite one; nats
    "thresholds",  # how many groups those are
)
"""The sums' names, in their order. Add them over micro-batches, steps and ranks, then `summarize`."""

_DROPPED, _KEPT, _UNMAPPED, _UNMAPPED_KEPT, _NAN = range(1, 6)  # and 0: not valid


def tally(
    student_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor, weight_BS: Tensor, threshold_G: Tensor, over_capacity: int
) -> Tensor:
    """The sums named in STATS. A token whose student loss is NaN stands in valid and nonfinite alone.

    student_BS, guide_BS  [B, S] float32, nats; a guide of NaN is unmapped
    valid_BS, weight_BS   [B, S] bool; where the student is NaN there is no weight
    threshold_G           [G] float32, the smallest excess that the ranking kept in each group; infinite where there is none
    over_capacity         tokens that lost their weight
    returns               [1, len(STATS)] float64

    Every token is of one kind, and a sum is over one or two kinds: so each loss is read once. The device is waited for.
    """
    kind_BS = guide_BS.isnan() * (_UNMAPPED - _DROPPED) + weight_BS + _DROPPED
    kind_N = kind_BS.add_(student_BS.isnan(), alpha=_NAN).clamp_(max=_NAN).mul_(valid_BS).flatten()
    count = torch.bincount(kind_N, minlength=6).tolist()
    student = torch.bincount(kind_N, student_BS.flatten().double(), minlength=6).tolist()
    guide = torch.bincount(kind_N, guide_BS.flatten().double(), minlength=6).tolist()
    # an infinite loss shows in the sum over its kind
    infinite = 0 if all(map(math.isfinite, student[_DROPPED:_NAN])) else int((student_BS.isinf() & valid_BS).sum())
    thresholds = [threshold for threshold in threshold_G.tolist() if math.isfinite(threshold)]
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
        "weight_sum": count[_KEPT] + count[_UNMAPPED_KEPT],
        "weighted_sum": student[_KEPT] + student[_UNMAPPED_KEPT],
        "threshold_sum": sum(thresholds),
        "thresholds": len(thresholds),
    }
    return torch.tensor([[named[name] for name in STATS]], dtype=torch.float64, device=student_BS.device)


def summarize(stats: Tensor) -> dict[str, float]:
    """Shares and means of added-up stats, divided here and only here. Losses in nats.

    stats    [len(STATS)] float64
    returns  share_kept (of mapped), share_unmapped (of valid), loss (the weighted mean), threshold; and the mean
             student_loss, guide and excess of `_kept` and of `_dropped` mapped tokens; student_loss_unmapped, and
             student_loss_all. A mean over no tokens is absent

    Copies the sums from the device, and waits for it. Raises ValueError: not one vector of sums.

    >>> stats = torch.zeros(len(STATS), dtype=torch.float64)
    >>> summarize(stats)
    {}
    >>> stats[STATS.index("mapped")], stats[STATS.index("kept")], stats[STATS.index("student_kept_sum")] = 5, 2, 6.0
    >>> summarize(stats)["share_kept"], summarize(stats)["student_loss_kept"]
    (0.4, 3.0)
    """
    if stats.shape != (len(STATS),):
        raise ValueError(f"summarize: expected the {len(STATS)} sums of STATS, got shape {list(stats.shape)}")
    sums = dict(zip(STATS, stats.tolist(), strict=True))
    kept, dropped = sums["kept"], sums["mapped"] - sums["kept"]
    student = sums["student_kept_sum"] + sums["student_dropped_sum"] + sums["student_unmapped_sum"]
    ratios = {
        "share_kept": (kept, sums["mapped"]),
        "share_unmapped": (sums["unmapped"], sums["valid"]),
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
    }
    return {name: above / below for name, (above, below) in ratios.items() if below}
