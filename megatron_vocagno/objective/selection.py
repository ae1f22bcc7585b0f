"""Losses of both models -> the tokens that the student learns from. One call per micro-batch, without a gradient.

    g[i] = aggregate of l_T over the teacher tokens that cover student token i       gather_guide
    d[i] = l_S[i] - g[i]                                                             the excess
    w[i] = 1 for the k = ceil(keep * n) mapped tokens of highest d, 0 for the rest   ranking.highest
    w[i] = 1 ('include') or 0 ('exclude') if i is unmapped

With unit 'chunk', d is the excess of the token's chunk (`chunks`). With another weighting than 'top_k', w is a function of d
(`weighting`).

A token with a student loss of NaN has weight 0 and is counted. A token is unmapped if its range is empty or contains a NaN.
Infinite losses are legal. If both losses are infinite (d = inf - inf), the token is mapped but never kept.

B rows, S student positions, U teacher positions, N = B * S tokens, G selection groups of T tokens. Losses are float32, in nats.
`loss_BS[b, i]`, `first_BS[b, i]` and `valid_BS[b, i]` belong to the token that position i predicts. This file is the method in
torch. `selection_triton` is the GPU backend, with the same results. Equal inputs give bitwise equal weights, and with weighting
'control_variate' equal up to the rounding of an exponential.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_vocagno.objective.chunks import compare_chunks
from megatron_vocagno.objective.ranking import highest, kept_count, lowest
from megatron_vocagno.objective.rule import PAPER, Aggregate, Rule, Selection
from megatron_vocagno.objective.statistics import Excess, tally
from megatron_vocagno.objective.weighting import weights


@torch.no_grad()
def select_tokens(
    student_loss_BS: Tensor,
    teacher_loss_BU: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    valid_BS: Tensor,
    rule: Rule = PAPER,
    *,
    capacity: int | None = None,
) -> Selection:
    """Weights, the positions of the tokens with weight, and statistics (docs/method.md, 2 and 3).

    student_loss_BS    [B, S] float, nats
    teacher_loss_BU    [B, U] float, nats. NaN marks a teacher token without a usable loss. U may be 0
    first_BS, last_BS  [B, S] int, teacher positions, half-open: [first, last). A token with first == last is unmapped
    valid_BS           [B, S] bool. A False token (padding, ignored target) has weight 0 and is not counted
    rule               how tokens are selected. By default the paper's values
    capacity           length of the list of tokens (for scope 'sequence', of each row's list): an upper bound of the tokens with
                       weight that is known before the losses, see planned_kept. More tokens can have weight only if a NaN turned
                       a mapped token into an unmapped one. The last of them then lose their weight and are counted as
                       over_capacity. None means no bound

    Ties go to the lower index. If no token is eligible, none is kept. With unit 'chunk', the tokens of a chunk have one excess
    and one weight, except if the k-th token of a ranking is inside a chunk. Raises ValueError: shapes or a capacity that do not
    fit. On the CPU also ranges outside of the teacher's row, and for unit 'chunk' ranges that are not ascending.

    Five student tokens. The last one ends the document and has no teacher token. Two of the other four are kept, those with the
    largest excess. The student's loss is largest for the second token, but so is the teacher's:

    >>> student_BS = torch.tensor([[2.0, 9.0, 4.0, 3.0, 1.0]])
    >>> teacher_BU = torch.tensor([[1.5, 8.5, 0.5, 1.0]])
    >>> first_BS, last_BS = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4, 4]])
    >>> valid_BS = torch.ones(1, 5, dtype=torch.bool)
    >>> selection = select_tokens(student_BS, teacher_BU, first_BS, last_BS, valid_BS, Rule(keep=0.5))
    >>> student_BS - selection.guide_BS
    tensor([[0.5000, 0.5000, 3.5000, 2.0000,    nan]])
    >>> selection.weight_BS, selection.tokens_C
    (tensor([[0., 0., 1., 1., 1.]]), tensor([2, 3, 4]))
    """
    _check(student_loss_BS, first_BS, valid_BS, capacity)
    if student_loss_BS.is_cuda:
        from megatron_vocagno.objective import selection_triton

        _check_ranges(teacher_loss_BU, first_BS, last_BS, rule.aggregate)
        return selection_triton.select_tokens(
            student_loss_BS, teacher_loss_BU, first_BS, last_BS, valid_BS, rule, capacity=capacity
        )
    student_BS, valid_BS = student_loss_BS.float(), valid_BS.bool()
    excess_BS, guide_BS, opens_BS = _compare(student_BS, teacher_loss_BU, first_BS, last_BS, valid_BS, rule)
    threshold_G = excess_BS.new_empty(0)
    if rule.weighting == "top_k":
        kept_BS, threshold_G = _keep(excess_BS, valid_BS, rule)
        weight_BS = kept_BS.float()
    else:
        weight_BS = weights(excess_BS, rule).masked_fill_(~valid_BS, 0.0)
    if rule.unmapped == "include":
        weight_BS.masked_fill_(valid_BS & guide_BS.isnan() & ~student_BS.isnan(), 1.0)
    over_capacity = 0
    if capacity is not None:
        beyond_BS = (weight_BS != 0) & ~_first(weight_BS != 0, capacity, rule)
        over_capacity = int(beyond_BS.sum())
        weight_BS.masked_fill_(beyond_BS, 0.0)
    excess = Excess(excess_BS, opens_BS, threshold_G)
    stats_PK = tally(student_BS, guide_BS, valid_BS, weight_BS, excess, rule, over_capacity)
    return Selection(weight_BS, guide_BS, weight_BS.flatten().nonzero().squeeze(1), stats_PK)


def _compare(
    student_BS: Tensor, teacher_BU: Tensor, first_BS: Tensor, last_BS: Tensor, valid_BS: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """The excess and the guide of each token, and which tokens open a unit: see compare_chunks. A token is a unit by itself."""
    if rule.unit == "chunk":
        _check_ranges(teacher_BU, first_BS, last_BS, "sum")
        return compare_chunks(student_BS, teacher_BU, first_BS, last_BS, valid_BS)
    guide_BS = gather_guide(teacher_BU, first_BS, last_BS, rule.aggregate)
    return student_BS - guide_BS, guide_BS, torch.ones_like(valid_BS)


def _keep(excess_BS: Tensor, eligible_BS: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """[B, S] bool, the k highest of each group; and [G], the lowest of them. An excess of NaN is never eligible."""
    excess_GT, eligible_GT = _grouped(excess_BS, rule), _grouped(eligible_BS & (excess_BS == excess_BS), rule)
    kept_GT, lowest_G = highest(excess_GT, eligible_GT, rule.keep, rule.ranks)
    if rule.require_positive:
        kept_GT = kept_GT & (excess_GT > 0)
        lowest_G = lowest(excess_GT, kept_GT, rule.ranks)
    return kept_GT.view(excess_BS.shape), lowest_G


def _first(weight_BS: Tensor, capacity: int, rule: Rule) -> Tensor:
    """The first `capacity` tokens with weight of each list."""
    weight_GT = _grouped(weight_BS, rule)
    return (weight_GT & (weight_GT.cumsum(1) <= capacity)).view(weight_BS.shape)


def _grouped(x_BS: Tensor, rule: Rule) -> Tensor:
    """[B, S] -> [G, T]: the selection groups on this rank. They are the lists of tokens as well."""
    return x_BS if rule.scope == "sequence" else x_BS.reshape(1, -1)


# ---------------------------------------------------------------- guide

_COMBINE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, torch.dtype]] = {
    "max": (torch.maximum, -torch.inf, torch.float32),
    "min": (torch.minimum, torch.inf, torch.float32),
    "sum": (torch.add, 0.0, torch.float64),
    "mean": (torch.add, 0.0, torch.float64),
}


@torch.no_grad()
def gather_guide(loss_BU: Tensor, first_BS: Tensor, last_BS: Tensor, how: Aggregate) -> Tensor:
    """The guide g: teacher losses, gathered from teacher positions to student positions (docs/method.md, 2).

    loss_BU            [B, U] float, nats. NaN marks a teacher token without a usable loss (no context, broken score)
    first_BS, last_BS  [B, S] int, teacher positions, half-open: [first, last)
    how                'max' | 'mean' | 'sum' | 'min' over the range. Sums and means add in float64 and round once
    returns            [B, S] float32. NaN if first == last (unmapped) or if a loss in the range is NaN. U may be 0

    Raises ValueError: unknown `how`, shapes that do not fit. On the CPU also a range outside of [0, U]. On other devices this
    check would wait for the device, and the result for such a range is undefined.

    A range is divided into the powers of two of its width. At each level, a table holds the aggregate of the next 1, 2, 4, ...
    losses. The number of gathers is log2 of the widest range, and no [B, S, U] mask is needed. The result is exact for max and
    min, and in pairwise order for sums. On the CPU the widest range is computed; on other devices it is taken to be U.

    Three teacher tokens. The student's first token is covered by two of them, its second token shares one of these, and its third
    token has none:

    >>> teacher_BU = torch.tensor([[0.5, 2.0, 1.0]])
    >>> first_BS, last_BS = torch.tensor([[0, 1, 3]]), torch.tensor([[2, 3, 3]])
    >>> gather_guide(teacher_BU, first_BS, last_BS, "max")
    tensor([[2., 2., nan]])
    >>> gather_guide(teacher_BU, first_BS, last_BS, "mean")
    tensor([[1.2500, 1.5000,    nan]])
    """
    levels = _check_ranges(loss_BU, first_BS, last_BS, how).bit_length()
    combine, nothing, dtype = _COMBINE[how]
    width_BS = last_BS.long() - first_BS
    # a range that has no part at a level reads column 0, which is `nothing` at every level
    table_BU = pad(loss_BU.to(dtype), (1 << levels, 0), value=nothing)
    start_BS = first_BS.long() + (1 << levels)
    guide_BS = torch.full_like(width_BS, nothing, dtype=dtype)
    for level in range(levels):
        if level:
            half = 1 << (level - 1)
            table_BU = combine(table_BU[:, :-half], table_BU[:, half:])
        has_BS = (width_BS >> level) & 1
        guide_BS = combine(guide_BS, table_BU.gather(1, start_BS * has_BS))
        start_BS.add_(has_BS, alpha=1 << level)
    if how == "mean":
        guide_BS = guide_BS / width_BS
    return guide_BS.float().masked_fill_(width_BS == 0, torch.nan)


# ---------------------------------------------------------------- counts


def planned_kept(mapped_B: Sequence[int], unmapped_B: Sequence[int], rule: Rule = PAPER) -> int:
    """The sum of the weights of one selection, from counts that are known before the losses. The denominator of docs/method.md,
    4.

    mapped_B, unmapped_B  valid tokens of each row of the micro-batch. For scope 'global', of the rows of all ranks
    returns               the sum. 0 if there are no rows

    The weights can sum to less: with `require_positive`, or if a loss is NaN. With another weighting than 'top_k', the result is
    the number of tokens, of which each can have weight: see docs/method.md, Beyond the paper.

    40 % of 5 + 3 mapped tokens is 3.2, so 4 are kept. With scope 'sequence' it is 2 + 2. The two unmapped tokens are added:

    >>> planned_kept([5, 3], [1, 1])
    6
    >>> planned_kept([5, 3], [1, 1], Rule(scope="sequence", unmapped="exclude"))
    4
    """
    if rule.weighting != "top_k":
        kept = sum(mapped_B)
    elif rule.scope == "sequence":
        kept = sum(kept_count(n, rule.keep) for n in mapped_B)
    else:
        kept = kept_count(sum(mapped_B), rule.keep)
    return kept + (sum(unmapped_B) if rule.unmapped == "include" else 0)


# ---------------------------------------------------------------- checks


def _check_ranges(loss_BU: Tensor, first_BS: Tensor, last_BS: Tensor, how: str) -> int:
    """An upper bound of the ranges' widths: the widest range on the CPU, U on other devices."""
    if how not in _COMBINE:
        raise ValueError(f"gather_guide: unknown aggregate {how!r}: expected one of {', '.join(_COMBINE)}")
    longest = loss_BU.shape[-1]
    if loss_BU.dim() != 2 or first_BS.shape != last_BS.shape or first_BS.shape[:1] != loss_BU.shape[:1]:
        raise ValueError(
            f"gather_guide: expected losses [B, U] and ranges [B, S], got losses {list(loss_BU.shape)}, "
            f"first {list(first_BS.shape)}, last {list(last_BS.shape)}"
        )
    if first_BS.is_floating_point() or last_BS.is_floating_point():
        raise ValueError(f"gather_guide: expected ranges of integers, got {first_BS.dtype} and {last_BS.dtype}")
    if loss_BU.device.type != "cpu" or not first_BS.numel():
        return longest
    least, widest = map(int, (last_BS - first_BS).aminmax())
    begin, end = int(first_BS.amin()), int(last_BS.amax())
    if begin < 0 or least < 0 or end > longest:
        raise ValueError(
            f"gather_guide: ranges from {begin} to {end}, expected ordered ranges within [0, {longest}]: "
            "do the spans belong to this row of the teacher, and count from its first token?"
        )
    return widest


def _check(student_loss_BS: Tensor, first_BS: Tensor, valid_BS: Tensor, capacity: int | None) -> None:
    if not student_loss_BS.shape == first_BS.shape == valid_BS.shape or student_loss_BS.dim() != 2:
        raise ValueError(
            f"select_tokens: expected [B, S] three times, got student losses {list(student_loss_BS.shape)}, ranges "
            f"{list(first_BS.shape)}, valid {list(valid_BS.shape)}"
        )
    if capacity is not None and (not isinstance(capacity, int) or capacity < 0):
        raise ValueError(f"select_tokens: capacity = {capacity}: expected a number of tokens, or None for no bound")
