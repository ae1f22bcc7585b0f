"""The k = ceil(keep * n) highest of n values, exactly. Ties go to the lower index.

G groups of T values. Values are float32. Infinities are legal, -0 equals +0, and NaN is never eligible. Nothing is rounded:
counts are integers, the share is a fraction, and a threshold is one of the values. Equal inputs therefore give equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor


@lru_cache
def share(keep: float) -> Fraction:
    """`keep` as the decimal fraction that was written: 0.4 is 2/5, not the nearest double, with which ceil(0.4 * 5) could be 3.

    Raises ValueError unless 0 < keep <= 1 with at most 6 decimals.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}: expected a share above 0 and at most 1")
    written = Fraction(str(keep))
    if written.denominator > 10**6:  # the product with a count of tokens must stay within int64
        raise ValueError(f"keep = {keep}: expected at most 6 decimals")
    return written


def kept_count(mapped: int, keep: float) -> int:
    """k = ceil(keep * mapped), exactly. Raises ValueError: see share.

    >>> kept_count(5, 0.4), kept_count(6, 0.4), kept_count(0, 0.4)
    (2, 3, 0)
    """
    part = share(keep)
    return (mapped * part.numerator + part.denominator - 1) // part.denominator


def highest(value_GT: Tensor, eligible_GT: Tensor, keep: float, ranks: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The k highest eligible values of each group, and the lowest of them.

    value_GT     [G, T] float32
    eligible_GT  [G, T] bool. Must be False if the value is NaN
    ranks        the ranks that hold the other values of a group. None means this process only
    returns      [G, T] bool; and [G] float32, over all ranks, +inf if k is 0

    Reads k on the host, which is free on a CPU. With several ranks, nothing is read.
    """
    if spans_ranks(ranks):
        kept_GT = _highest_over_ranks(_sortable(value_GT, eligible_GT), keep, ranks)
        return kept_GT, lowest(value_GT, kept_GT, ranks)
    return _highest_here(value_GT, eligible_GT, keep)


def lowest(value_GT: Tensor, kept_GT: Tensor, ranks: dist.ProcessGroup | None) -> Tensor:
    """The lowest kept value of each group over all ranks, [G] float32. +inf if no value is kept."""
    value_GT = torch.where(kept_GT, value_GT, torch.inf)
    lowest_G = value_GT.amin(1) if value_GT.shape[1] else value_GT.new_full(value_GT.shape[:1], torch.inf)
    return over_ranks(lowest_G, ranks, dist.ReduceOp.MIN)


def _highest_here(value_GT: Tensor, eligible_GT: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Keep the values that reach the k-th highest. If ties make more than k of them, drop the last ties."""
    k_G = [kept_count(n, keep) for n in eligible_GT.sum(1).tolist()]
    # an ineligible value can only tie with an eligible -inf, and eligible_GT distinguishes the two
    ranked_GT = torch.where(eligible_GT, value_GT, -torch.inf)
    none = value_GT.new_tensor(torch.inf)
    threshold_G = [row.topk(k, sorted=False).values.amin() if k else none for row, k in zip(ranked_GT, k_G, strict=True)]
    if not threshold_G:
        return eligible_GT, value_GT.new_empty(0)
    threshold_G1 = torch.stack(threshold_G)[:, None]
    kept_GT = eligible_GT & (ranked_GT >= threshold_G1)
    if kept_GT.sum(1).tolist() != k_G:
        above_GT, tie_GT = ranked_GT > threshold_G1, kept_GT & (ranked_GT == threshold_G1)
        missing_G1 = torch.tensor(k_G, device=value_GT.device)[:, None] - above_GT.sum(1, keepdim=True)
        kept_GT = above_GT | (tie_GT & (tie_GT.cumsum(1) <= missing_G1))
    return kept_GT, threshold_G1.squeeze(1)


def _sortable(value_GT: Tensor, eligible_GT: Tensor) -> Tensor:
    """Integers in the order of the floats: [0, 2^32) in int64, or -1 if not eligible.

    The bits of positive floats are in order already. Those of negative floats are in reverse order. Adding 0 turns -0 into +0.
    """
    bits_GT = (value_GT + 0.0).view(torch.int32).long()
    key_GT = torch.where(bits_GT >= 0, bits_GT + 2**31, -1 - bits_GT)
    return key_GT.masked_fill(~eligible_GT, -1)


def _highest_over_ranks(key_GT: Tensor, keep: float, ranks: dist.ProcessGroup | None) -> Tensor:
    """True for the k highest keys of each group. Ties go to the lower rank, then to the lower index."""

    def count_digits(found_G1: Tensor, shift: int, width: int) -> Tensor:
        alike_GT = key_GT >> (shift + width) == found_G1
        digit_GT = (key_GT >> shift) & ((1 << width) - 1)
        return key_GT.new_zeros(len(key_GT), 1 << width).scatter_add_(1, digit_GT, alike_GT.long())

    threshold_G1, missing_G1 = threshold_from_digits(count_digits, key_GT.new_zeros(len(key_GT), 1), keep, ranks)
    tie_GT = key_GT == threshold_G1
    nth_GT = tie_GT.cumsum(1) + on_lower_ranks(tie_GT.sum(), ranks)
    return (key_GT > threshold_G1) | (tie_GT & (nth_GT <= missing_G1))


def threshold_from_digits(
    count_digits: Callable[[Tensor, int, int], Tensor], found_G1: Tensor, keep: float, ranks: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The k-th highest key of each group, and how many of the keys equal to it are among the k. Both [G, 1] int64.

    count_digits  (found_G1, shift, width) -> [G, 2^width] int64: a histogram of the next `width` bits, over this rank's eligible
                  keys (32 bits) whose bits above shift + width equal `found`
    found_G1      zeros [G, 1] int64, on the device of the keys

    The key is found digit by digit, from counts. Counts of several ranks add up, so the result is exact with 40 KiB per rank for
    any number of tokens. Integer sums do not depend on the order of addition, so the result is bitwise reproducible.
    """
    part, k_G1 = share(keep), None
    for shift, width in ((21, 11), (10, 11), (0, 10)):  # histograms that stay small
        count_GD = over_ranks(count_digits(found_G1, shift, width), ranks)
        if k_G1 is None:
            k_G1 = (count_GD.sum(1, keepdim=True) * part.numerator + part.denominator - 1) // part.denominator
        at_least_GD = count_GD.flip(1).cumsum(1).flip(1)
        digit_G1 = (at_least_GD >= k_G1).sum(1, keepdim=True) - 1
        k_G1 = k_G1 - (at_least_GD - count_GD).gather(1, digit_G1)  # the number still to be found among equal digits
        found_G1 = (found_G1 << width) | digit_G1
    assert k_G1 is not None
    return found_G1, k_G1


def spans_ranks(ranks: dist.ProcessGroup | None) -> bool:
    """True if counts must be added over several ranks."""
    return ranks is not None and dist.get_world_size(ranks) > 1


def over_ranks(x: Tensor, ranks: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce `x` over the ranks, in place. The default operation is a sum."""
    if spans_ranks(ranks):
        dist.all_reduce(x, op=op, group=ranks)
    return x


def on_lower_ranks(count: Tensor, ranks: dist.ProcessGroup | None) -> Tensor:
    """Sum of the scalar `count` over the ranks below this one."""
    if not spans_ranks(ranks):
        return torch.zeros_like(count)
    counts_R = count.new_zeros(dist.get_world_size(ranks))
    me = dist.get_rank(ranks)
    counts_R[me] = count
    return over_ranks(counts_R, ranks)[:me].sum()
