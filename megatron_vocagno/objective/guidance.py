"""The guided loss of *Vocabulary-agnostic Teacher Guided Language Modeling* (arXiv 2503.19123).

    g[i] = aggregate of l_T over the teacher tokens that cover student token i       gather_guide
    d[i] = l_S[i] - g[i]                                                             the excess
    w[i] = 1 for the k = ceil(keep * n) mapped tokens of highest d, 0 for the rest   select, kept_count
    w[i] = 1 ('include') or 0 ('exclude') where i is unmapped
    L    = sum(w * l_S) / sum(w)                                                     guided_loss

B rows, S student positions, U teacher positions, G selection groups of T tokens. Losses are float32, in nats. `loss_BS[b, i]`,
`first_BS[b, i]` and `valid_BS[b, i]` speak of the token that position i predicts. No function waits for the device, except
`summarize`, and equal inputs give bitwise equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Aggregate = Literal["max", "mean", "sum", "min"]
Scope = Literal["sequence", "microbatch", "global"]
Unmapped = Literal["include", "exclude"]

# ---------------------------------------------------------------- the guide

_COMBINE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "max": (torch.maximum, -torch.inf),
    "min": (torch.minimum, torch.inf),
    "sum": (torch.add, 0.0),
    "mean": (torch.add, 0.0),
}


@torch.no_grad()
def gather_guide(loss_BU: Tensor, first_BS: Tensor, last_BS: Tensor, how: Aggregate) -> Tensor:
    """g: teacher losses, moved from teacher positions onto student positions.

    loss_BU            [B, U] float, nats; NaN marks a teacher token without a usable loss (no context, broken score)
    first_BS, last_BS  [B, S] int, teacher positions, half-open: [first, last)
    how                'max' | 'mean' | 'sum' | 'min' over the range
    returns            [B, S] float32; NaN exactly where first == last (unmapped) or a loss in the range is NaN. U may be 0

    Raises ValueError: unknown `how`, shapes that do not fit; on the CPU also a range outside of [0, U] (elsewhere the check
    would wait for the device, and such a range is undefined).

    A range is cut into the powers of two of its width, and level by level a table holds the aggregate of the next 1, 2, 4...
    losses: log2(U) gathers serve every width, exactly for max and min, in pairwise order for sums, without asking the device
    for the widest range and without a [B, S, U] mask.
    """
    if how not in _COMBINE:
        raise ValueError(f"unknown aggregate {how!r}: expected one of {', '.join(_COMBINE)}")
    _check_ranges(loss_BU, first_BS, last_BS)
    combine, nothing = _COMBINE[how]
    table_BU, start_BS = loss_BU.float(), first_BS.long()
    width_BS = last_BS.long() - start_BS
    guide_BS = torch.full_like(start_BS, nothing, dtype=torch.float32)
    for level in range(loss_BU.shape[1].bit_length()):
        reach = 1 << level
        part_BS = table_BU.gather(1, start_BS.clamp(max=table_BU.shape[1] - 1))
        guide_BS = torch.where(width_BS & reach != 0, combine(guide_BS, part_BS), guide_BS)
        start_BS = start_BS + (width_BS & reach)
        table_BU = combine(table_BU[:, :-reach], table_BU[:, reach:])
    if how == "mean":
        guide_BS = guide_BS / width_BS
    return guide_BS.masked_fill(width_BS == 0, torch.nan)


def _check_ranges(loss_BU: Tensor, first_BS: Tensor, last_BS: Tensor) -> None:
    if loss_BU.dim() != 2 or first_BS.shape != last_BS.shape or first_BS.shape[:1] != loss_BU.shape[:1]:
        raise ValueError(
            f"gather_guide: losses [B, U] and ranges [B, S] expected, got losses {list(loss_BU.shape)}, "
            f"first {list(first_BS.shape)}, last {list(last_BS.shape)}"
        )
    if loss_BU.device.type == "cpu" and ((first_BS < 0) | (last_BS < first_BS) | (last_BS > loss_BU.shape[1])).any():
        raise ValueError(
            f"gather_guide: ranges reach from {int(first_BS.min())} to {int(last_BS.max())} and must be ordered within "
            f"[0, {loss_BU.shape[1]}]: do the spans belong to this row of the teacher, and count from its first token?"
        )


# ---------------------------------------------------------------- how many are kept


@lru_cache
def _share(keep: float) -> Fraction:
    """`keep` as it was written: 0.4 is 2/5 here, and not the double above it that makes ceil(0.4 * 5) doubtful."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}: expected a share above 0 and at most 1")
    share = Fraction(str(keep))
    if share.denominator > 10**6:  # the product with a count of tokens must stay within int64
        raise ValueError(f"keep = {keep}: expected at most 6 decimals")
    return share


def kept_count(mapped: int, keep: float) -> int:
    """k = ceil(keep * mapped), exactly. Raises ValueError unless 0 < keep <= 1 with at most 6 decimals."""
    share = _share(keep)
    return (mapped * share.numerator + share.denominator - 1) // share.denominator


def planned_kept(
    mapped_rows: Sequence[int], unmapped_rows: Sequence[int], *, keep: float, scope: Scope, unmapped: Unmapped
) -> int:
    """The sum of the weights of one selection, from counts that are known before any loss is.

    mapped_rows, unmapped_rows  valid tokens of each row: the rows of the micro-batch, for 'global' those of all ranks

    The weights may sum to less: with `require_positive`, and where a loss is NaN. No row at all gives 0.
    """
    _check_choices(scope, unmapped)
    kept = sum(kept_count(row, keep) for row in mapped_rows) if scope == "sequence" else kept_count(sum(mapped_rows), keep)
    return kept + (sum(unmapped_rows) if unmapped == "include" else 0)


# ---------------------------------------------------------------- which are kept


def select(
    excess_BS: Tensor,
    eligible_BS: Tensor,
    keep: float,
    scope: Scope,
    group: dist.ProcessGroup | None = None,
    require_positive: bool = False,
) -> Tensor:
    """w of the mapped tokens: the k = ceil(keep * eligible) tokens of highest excess, in each scope.

    excess_BS         [B, S] float, nats; infinities are legal, -0 equals +0, NaN is never eligible
    eligible_BS       [B, S] bool
    scope             'sequence': each row by itself; 'microbatch': all B * S tokens; 'global': the tokens of all ranks of
                      `group` as if their batches were concatenated in the order of the ranks (every rank must call)
    group             heard by 'global' alone; None is this process alone
    require_positive  of the k tokens, keep only those with an excess above 0
    returns           [B, S] float32 of 0 and 1; all 0 where nothing is eligible

    Ties go to the lower index, so exactly k tokens are kept. Raises ValueError: see kept_count; unknown scope; shapes.
    """
    _check_choices(scope)
    if excess_BS.shape != eligible_BS.shape:
        raise ValueError(f"select: excess {list(excess_BS.shape)} and eligible {list(eligible_BS.shape)} differ in shape")
    share = _share(keep)
    ranks = group if scope == "global" else None
    excess_GT = _grouped(excess_BS.float(), scope)
    eligible_GT = _grouped(eligible_BS.bool(), scope) & ~excess_GT.isnan()
    eligible_G1 = _over_ranks(eligible_GT.sum(1, keepdim=True), ranks)
    k_G1 = (eligible_G1 * share.numerator + share.denominator - 1) // share.denominator
    kept_GT = _highest(_sortable(excess_GT, eligible_GT), k_G1, ranks)
    if require_positive:
        kept_GT = kept_GT & (excess_GT > 0)
    return kept_GT.float().view(excess_BS.shape)


def _grouped(x_BS: Tensor, scope: Scope) -> Tensor:
    return x_BS if scope == "sequence" else x_BS.reshape(1, -1)


def _sortable(excess_GT: Tensor, eligible_GT: Tensor) -> Tensor:
    """Integers in the order of the floats: [0, 2^32) in int64, and -1 where not eligible.

    The bits of positive floats are ordered already; those of negative ones run backwards. Adding 0 turns -0 into +0.
    """
    bits_GT = (excess_GT + 0.0).view(torch.int32).long()
    key_GT = torch.where(bits_GT >= 0, bits_GT + 2**31, -1 - bits_GT)
    return key_GT.masked_fill(~eligible_GT, -1)


def _highest(key_GT: Tensor, k_G1: Tensor, ranks: dist.ProcessGroup | None) -> Tensor:
    """True for the k highest keys of each group, ties to the lower index.

    The k-th highest key is found digit by digit, from counts. Counts of several ranks add up, which makes 'global' exact at
    40 KiB a rank, whatever the number of tokens; and integer sums do not depend on an order, so the result repeats bitwise.
    """
    found_G1 = torch.zeros_like(k_G1)
    for shift, width in ((21, 11), (10, 11), (0, 10)):  # 32 bits, in histograms that stay small
        alike_GT = key_GT >> (shift + width) == found_G1
        digit_GT = (key_GT >> shift) & ((1 << width) - 1)
        count_GD = key_GT.new_zeros(len(key_GT), 1 << width).scatter_add_(1, digit_GT, alike_GT.long())
        count_GD = _over_ranks(count_GD, ranks)
        at_least_GD = count_GD.flip(1).cumsum(1).flip(1)
        digit_G1 = (at_least_GD >= k_G1).sum(1, keepdim=True) - 1
        k_G1 = k_G1 - (at_least_GD - count_GD).gather(1, digit_G1)  # so many are still to be found among equal digits
        found_G1 = (found_G1 << width) | digit_G1
    tie_GT = key_GT == found_G1
    nth_GT = tie_GT.cumsum(1) + _on_lower_ranks(tie_GT.sum(), ranks)
    return (key_GT > found_G1) | (tie_GT & (nth_GT <= k_G1))


def _over_ranks(x: Tensor, ranks: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if ranks is not None and dist.get_world_size(ranks) > 1:
        dist.all_reduce(x, op=op, group=ranks)
    return x


def _on_lower_ranks(count: Tensor, ranks: dist.ProcessGroup | None) -> Tensor:
    """The sum of `count`, a scalar, over the ranks before this one."""
    if ranks is None:
        return torch.zeros_like(count)
    counts_R = count.new_zeros(dist.get_world_size(ranks))
    me = dist.get_rank(ranks)
    counts_R[me] = count
    return _over_ranks(counts_R, ranks)[:me].sum()


# ---------------------------------------------------------------- the loss

STATS = (
    "valid",  # tokens: neither padding nor ignored
    "nonfinite",  # valid tokens whose student loss is NaN or infinite
    "mapped",  # valid, student loss not NaN, guide not NaN
    "kept",  # mapped, weight 1
    "unmapped",  # valid, student loss not NaN, guide NaN
    "unmapped_kept",  # unmapped, weight 1
    "student_kept_sum",  # l_S over kept, nats
    "student_dropped_sum",  # l_S over mapped, weight 0
    "student_unmapped_sum",  # l_S over unmapped
    "guide_kept_sum",  # g over kept
    "guide_dropped_sum",  # g over mapped, weight 0
    "weight_sum",
    "weighted_sum",  # weight * l_S
    "threshold_sum",  # the smallest kept excess, over the selection groups that have a finite one; nats
    "thresholds",  # how many groups those are
)
"""What `GuidedLoss.stats` holds, in this order. All are sums: add them over micro-batches, steps and ranks, then `summarize`."""


@dataclass(frozen=True)
class GuidedLoss:
    loss: Tensor
    """Scalar float32, nats. Differentiable, through the student's losses alone."""
    weight_BS: Tensor
    """[B, S] float32 of 0 and 1."""
    stats: Tensor
    """[len(STATS)] float64."""


def guided_loss(
    student_loss_BS: Tensor,
    guide_BS: Tensor,
    valid_BS: Tensor,
    *,
    keep: float,
    scope: Scope,
    unmapped: Unmapped,
    require_positive: bool = False,
    group: dist.ProcessGroup | None = None,
    normalizer: float | Tensor | None = None,
) -> GuidedLoss:
    """L = sum(w * l_S) / denominator, over the tokens of this rank.

    student_loss_BS  [B, S] float, nats; the only input that gets a gradient: w / denominator. A NaN is counted as nonfinite,
                     and its token has weight 0
    guide_BS         [B, S] float, nats, of gather_guide; NaN is unmapped
    valid_BS         [B, S] bool; False (padding, ignored target) has weight 0 and is counted nowhere
    normalizer       the denominator where it is known beforehand, such as planned_kept of a whole step; without it, the sum of
                     the weights: of this rank, for 'global' of all ranks (the ranks' losses then add up to the loss)
    the others       as for select and planned_kept

    Where all weights are 0 the loss is 0 and so is the gradient; a NaN or infinite loss of weight 0 leaks into neither.
    Raises ValueError: see select; unknown policy.
    """
    _check_choices(scope, unmapped)
    _check_same_shape(student_loss_BS, guide_BS, valid_BS)
    student_BS, guide_BS = student_loss_BS.detach().float(), guide_BS.detach().float()
    known_BS = valid_BS.bool() & ~student_BS.isnan()
    mapped_BS = known_BS & ~guide_BS.isnan()
    excess_BS = student_BS - guide_BS
    weight_BS = select(excess_BS, mapped_BS, keep, scope, group, require_positive)
    threshold_G = _thresholds(excess_BS, weight_BS, scope, group)
    if unmapped == "include":
        weight_BS = weight_BS + (known_BS & ~mapped_BS)
    ranks = group if scope == "global" else None
    denominator = _over_ranks(weight_BS.sum(), ranks) if normalizer is None else normalizer
    stats = _stats(student_BS, guide_BS, valid_BS.bool(), weight_BS, threshold_G)
    return GuidedLoss(_weighted(student_loss_BS, weight_BS, denominator), weight_BS, stats)


def clm_loss(student_loss_BS: Tensor, valid_BS: Tensor, normalizer: float | Tensor | None = None) -> GuidedLoss:
    """Plain language modeling: weight 1 for every valid token, and no teacher.

    Arguments and empty case as for guided_loss. In the statistics all tokens are unmapped.
    """
    _check_same_shape(student_loss_BS, student_loss_BS, valid_BS)
    student_BS = student_loss_BS.detach().float()
    weight_BS = (valid_BS.bool() & ~student_BS.isnan()).float()
    no_guide_BS = torch.full_like(student_BS, torch.nan)
    denominator = weight_BS.sum() if normalizer is None else normalizer
    stats = _stats(student_BS, no_guide_BS, valid_BS.bool(), weight_BS, student_BS.new_empty(0))
    return GuidedLoss(_weighted(student_loss_BS, weight_BS, denominator), weight_BS, stats)


def _weighted(loss_BS: Tensor, weight_BS: Tensor, denominator: float | Tensor) -> Tensor:
    """sum(weight * loss) / denominator; 0 where the denominator is 0.

    `where`, because 0 * NaN is NaN in the product and in its gradient; and a denominator of infinity, because a guard after
    the division would come too late for the gradient.
    """
    total = torch.where(weight_BS > 0, loss_BS.float(), 0.0).sum()
    if isinstance(denominator, Tensor):
        return total / denominator.detach().float().masked_fill(denominator == 0, torch.inf)
    return total / (denominator or torch.inf)


def _thresholds(excess_BS: Tensor, weight_BS: Tensor, scope: Scope, group: dist.ProcessGroup | None) -> Tensor:
    """The smallest kept excess of each selection group [G]; +inf where nothing is kept."""
    lowest_G = _grouped(excess_BS.masked_fill(weight_BS == 0, torch.inf), scope).amin(1)
    return _over_ranks(lowest_G, group if scope == "global" else None, dist.ReduceOp.MIN)


def _stats(student_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor, weight_BS: Tensor, threshold_G: Tensor) -> Tensor:
    """The sums named in STATS. A token whose student loss is NaN stands in valid and nonfinite alone."""
    known_BS, weighted_BS = valid_BS & ~student_BS.isnan(), weight_BS > 0
    mapped_BS, unmapped_BS = known_BS & ~guide_BS.isnan(), known_BS & guide_BS.isnan()
    kept_BS, dropped_BS = mapped_BS & weighted_BS, mapped_BS & ~weighted_BS

    def total(x: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, x, 0.0).sum(dtype=torch.float64)

    sums = {
        "valid": valid_BS.sum(),
        "nonfinite": (valid_BS & ~student_BS.isfinite()).sum(),
        "mapped": mapped_BS.sum(),
        "kept": kept_BS.sum(),
        "unmapped": unmapped_BS.sum(),
        "unmapped_kept": (unmapped_BS & weighted_BS).sum(),
        "student_kept_sum": total(student_BS, kept_BS),
        "student_dropped_sum": total(student_BS, dropped_BS),
        "student_unmapped_sum": total(student_BS, unmapped_BS),
        "guide_kept_sum": total(guide_BS, kept_BS),
        "guide_dropped_sum": total(guide_BS, dropped_BS),
        "weight_sum": weight_BS.sum(dtype=torch.float64),
        "weighted_sum": total(student_BS, weighted_BS),
        "threshold_sum": total(threshold_G, threshold_G.isfinite()),
        "thresholds": threshold_G.isfinite().sum(),
    }
    return torch.stack([sums[name].double() for name in STATS])


def summarize(stats: Tensor) -> dict[str, float]:
    """Shares and means of added-up stats, divided here and only here. Losses in nats.

    stats    [len(STATS)] float64
    returns  share_kept (of mapped), share_unmapped (of valid), loss (the weighted mean), threshold; and the mean
             student_loss, guide and excess of `_kept` and of `_dropped` mapped tokens; student_loss_unmapped, and
             student_loss_all. A mean over no tokens is absent

    Copies 15 numbers from the device: the one function here that waits for it.
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


# ---------------------------------------------------------------- refusals


def _check_choices(scope: str, unmapped: str = "include") -> None:
    if scope not in ("sequence", "microbatch", "global"):
        raise ValueError(f"unknown scope {scope!r}: expected sequence, microbatch or global")
    if unmapped not in ("include", "exclude"):
        raise ValueError(f"unknown policy {unmapped!r} for unmapped tokens: expected include or exclude")


def _check_same_shape(student_loss_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor) -> None:
    if not student_loss_BS.shape == guide_BS.shape == valid_BS.shape or student_loss_BS.dim() != 2:
        raise ValueError(
            f"[B, S] three times expected, got student losses {list(student_loss_BS.shape)}, guide {list(guide_BS.shape)}, "
            f"valid {list(valid_BS.shape)}"
        )
