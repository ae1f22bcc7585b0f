"""Losses of both models -> which tokens the student learns from. One call a micro-batch, and no gradient.

    g[i] = aggregate of l_T over the teacher tokens that cover student token i       gather_guide
    d[i] = l_S[i] - g[i]                                                             the excess
    w[i] = 1 for the k = ceil(keep * n) mapped tokens of highest d, 0 for the rest   select
    w[i] = 1 ('include') or 0 ('exclude') where i is unmapped

A student loss of NaN has weight 0 and is counted. A NaN in the range, as an empty range, makes a token unmapped. Infinite
losses are legal; where both are (d = inf - inf), the token is mapped and never kept.

B rows, S student positions, U teacher positions, N = B * S tokens, G selection groups of T tokens. Losses are float32, in nats.
`loss_BS[b, i]`, `first_BS[b, i]` and `valid_BS[b, i]` speak of the token that position i predicts. What runs on a GPU is in
`selection_triton`, with the same results; below is the method in torch, for every other device. Equal inputs give bitwise
equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron_vocagno.objective.ranking import highest, kept_count, lowest
from megatron_vocagno.objective.rule import Aggregate, Rule, Scope, Selection, Unmapped, check_choices
from megatron_vocagno.objective.statistics import tally


@torch.no_grad()
def select_tokens(
    student_loss_BS: Tensor,
    teacher_loss_BU: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    valid_BS: Tensor,
    *,
    aggregate: Aggregate,
    keep: float,
    scope: Scope,
    unmapped: Unmapped,
    require_positive: bool = False,
    group: dist.ProcessGroup | None = None,
    capacity: int | None = None,
) -> Selection:
    """Weights, the list of the rows that carry them, and sums, from the losses of both models (docs/method.md, 2 and 3).

    student_loss_BS    [B, S] float, nats
    teacher_loss_BU    [B, U] float, nats; NaN marks a teacher token without a usable loss. U may be 0
    first_BS, last_BS  [B, S] int, teacher positions, half-open: [first, last); first == last is unmapped
    valid_BS           [B, S] bool; False (padding, ignored target) has weight 0 and is counted nowhere
    aggregate          of the losses in a range: see gather_guide
    keep               the share of the mapped tokens that is kept, above 0, at most 1, with at most 6 decimals
    scope              'sequence': each row by itself; 'microbatch': all N tokens; 'global': the tokens of all ranks of `group`
                       as if their batches were concatenated in the order of the ranks (every rank must call)
    unmapped           'include': weight 1; 'exclude': weight 0
    require_positive   of the k tokens, keep only those with an excess above 0
    group              heard by 'global' alone; None is this process alone
    capacity           room in the list of rows, for 'sequence' in the list of each row: an upper bound of the tokens with
                       weight, known before any loss is (planned_kept). It holds: where NaN turns mapped tokens into unmapped
                       ones and more would have weight, the last of them lose it and are counted as over_capacity. None is
                       room for all

    Ties go to the lower index; where nothing is eligible, nothing is kept. Raises ValueError: unknown choices, keep, shapes
    that do not fit; on the CPU also ranges outside of the teacher's row.

    Five student tokens, of which the last ends the document and has no teacher tokens; two of the other four are kept, those
    where the student is furthest behind. It does worst on the second; but so does the teacher.

    >>> student_BS = torch.tensor([[2.0, 9.0, 4.0, 3.0, 1.0]])
    >>> teacher_BU = torch.tensor([[1.5, 8.5, 0.5, 1.0]])
    >>> first_BS, last_BS = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4, 4]])
    >>> rule = {"aggregate": "max", "keep": 0.5, "scope": "microbatch", "unmapped": "include"}
    >>> chosen = select_tokens(student_BS, teacher_BU, first_BS, last_BS, torch.ones(1, 5, dtype=torch.bool), **rule)
    >>> student_BS - chosen.guide_BS
    tensor([[0.5000, 0.5000, 3.5000, 2.0000,    nan]])
    >>> chosen.weight_BS, chosen.rows_C
    (tensor([[0., 0., 1., 1., 1.]]), tensor([2, 3, 4]))
    """
    rule = Rule(keep, scope, unmapped, require_positive, group, capacity)
    _check_same_shape(student_loss_BS, first_BS, valid_BS)
    if student_loss_BS.is_cuda:
        from megatron_vocagno.objective import selection_triton

        _check_ranges(teacher_loss_BU, first_BS, last_BS, aggregate)
        return selection_triton.select(
            student_loss_BS, selection_triton.Spans(teacher_loss_BU, first_BS, last_BS, aggregate), valid_BS, rule
        )
    return _select(student_loss_BS, gather_guide(teacher_loss_BU, first_BS, last_BS, aggregate), valid_BS, rule)


@torch.no_grad()
def select_by_guide(student_loss_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor, rule: Rule) -> Selection:
    """select_tokens where the guide [B, S] is known: float, nats, NaN where unmapped.

    Raises ValueError: shapes that differ.
    """
    _check_same_shape(student_loss_BS, guide_BS, valid_BS)
    if student_loss_BS.is_cuda:
        from megatron_vocagno.objective import selection_triton

        return selection_triton.select(student_loss_BS, guide_BS, valid_BS, rule)
    return _select(student_loss_BS, guide_BS, valid_BS, rule)


def _select(student_loss_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor, rule: Rule) -> Selection:
    student_BS, guide_BS, valid_BS = student_loss_BS.float(), guide_BS.float(), valid_BS.bool()
    weight_BS, threshold_G = _keep(student_BS - guide_BS, valid_BS, rule)
    if rule.unmapped == "include":
        weight_BS = weight_BS | (valid_BS & guide_BS.isnan() & ~student_BS.isnan())
    over_capacity = 0
    if rule.capacity is not None:
        room_BS = _first(weight_BS, rule.capacity, rule)
        over_capacity = int((weight_BS ^ room_BS).sum())
        weight_BS = room_BS
    stats_PK = tally(student_BS, guide_BS, valid_BS, weight_BS, threshold_G, over_capacity)
    return Selection(weight_BS.float(), guide_BS, weight_BS.flatten().nonzero().squeeze(1), stats_PK)


def _keep(excess_BS: Tensor, eligible_BS: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """[B, S] bool: the k highest in each scope; [G]: the lowest of them. NaN is not eligible, whatever is said."""
    excess_GT, eligible_GT = _grouped(excess_BS, rule), _grouped(eligible_BS & (excess_BS == excess_BS), rule)
    kept_GT, lowest_G = highest(excess_GT, eligible_GT, rule.keep, rule.ranks)
    if rule.require_positive:
        kept_GT = kept_GT & (excess_GT > 0)
        lowest_G = lowest(excess_GT, kept_GT, rule.ranks)
    return kept_GT.view(excess_BS.shape), lowest_G


def _first(weight_BS: Tensor, capacity: int, rule: Rule) -> Tensor:
    """The first `capacity` of the tokens with weight, in each list."""
    weight_GT = _grouped(weight_BS, rule)
    return (weight_GT & (weight_GT.cumsum(1) <= capacity)).view(weight_BS.shape)


def _grouped(x_BS: Tensor, rule: Rule) -> Tensor:
    """[B, S] -> [G, T]: the groups of a scope on this rank, which are the lists of rows too."""
    return x_BS if rule.scope == "sequence" else x_BS.reshape(1, -1)


# ---------------------------------------------------------------- the guide

_COMBINE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, torch.dtype]] = {
    "max": (torch.maximum, -torch.inf, torch.float32),
    "min": (torch.minimum, torch.inf, torch.float32),
    "sum": (torch.add, 0.0, torch.float64),
    "mean": (torch.add, 0.0, torch.float64),
}


@torch.no_grad()
def gather_guide(loss_BU: Tensor, first_BS: Tensor, last_BS: Tensor, how: Aggregate) -> Tensor:
    """g: teacher losses, moved from teacher positions onto student positions (docs/method.md, 2).

    loss_BU            [B, U] float, nats; NaN marks a teacher token without a usable loss (no context, broken score)
    first_BS, last_BS  [B, S] int, teacher positions, half-open: [first, last)
    how                'max' | 'mean' | 'sum' | 'min' over the range; sums and means add in float64 and round once
    returns            [B, S] float32; NaN exactly where first == last (unmapped) or a loss in the range is NaN. U may be 0

    Raises ValueError: unknown `how`, shapes that do not fit; on the CPU also a range outside of [0, U] (elsewhere the check
    would wait for the device, and such a range is undefined).

    A range is cut into the powers of two of its width, and level by level a table holds the aggregate of the next 1, 2, 4...
    losses: log2 of the widest range gathers serve every width, exactly for max and min, in pairwise order for sums, and
    without a [B, S, U] mask. Only on the CPU is the widest range asked for; elsewhere it is U.

    Three teacher tokens; the student's first token needs two of them, its second shares one, its third has none.

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
    # columns of `nothing` on the left, for the ranges that lack a level: its first is there at every level
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


# ---------------------------------------------------------------- the parts, and how many


def select(
    excess_BS: Tensor,
    eligible_BS: Tensor,
    keep: float,
    scope: Scope,
    group: dist.ProcessGroup | None = None,
    require_positive: bool = False,
) -> Tensor:
    """w of the mapped tokens: the k = ceil(keep * eligible) tokens of highest excess, in each scope (docs/method.md, 3).

    excess_BS    [B, S] float, nats; NaN is never eligible
    eligible_BS  [B, S] bool
    the others   as for select_tokens
    returns      [B, S] float32 of 0 and 1; all 0 where nothing is eligible

    Raises ValueError: see kept_count; unknown scope; shapes.

    >>> excess_BS, eligible_BS = torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.2, 0.1]]), torch.ones(2, 3, dtype=torch.bool)
    >>> select(excess_BS, eligible_BS, 0.5, "microbatch")
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    >>> select(excess_BS, eligible_BS, 0.5, "sequence")
    tensor([[1., 0., 1.],
            [1., 1., 0.]])
    """
    rule = Rule(keep, scope, "exclude", require_positive, group)
    if excess_BS.shape != eligible_BS.shape:
        raise ValueError(f"select: excess {list(excess_BS.shape)} and eligible {list(eligible_BS.shape)} differ in shape")
    weight_BS, _ = _keep(excess_BS.detach().float(), eligible_BS.bool(), rule)
    return weight_BS.float()


def planned_kept(
    mapped_rows: Sequence[int], unmapped_rows: Sequence[int], *, keep: float, scope: Scope, unmapped: Unmapped
) -> int:
    """The sum of the weights of one selection, from counts that are known before any loss is.

    mapped_rows, unmapped_rows  valid tokens of each row: the rows of the micro-batch, for 'global' those of all ranks

    The weights may sum to less: with `require_positive`, and where a loss is NaN. No row at all gives 0. It is the denominator of
    docs/method.md, 4. Raises ValueError: unknown choices, keep.

    Of 5 + 3 mapped tokens 40 % are 3.2, so 4; row by row 2 + 2. The two unmapped ones come on top.

    >>> planned_kept([5, 3], [1, 1], keep=0.4, scope="microbatch", unmapped="include")
    6
    >>> planned_kept([5, 3], [1, 1], keep=0.4, scope="sequence", unmapped="exclude")
    4
    """
    check_choices(scope, unmapped)
    kept = sum(kept_count(row, keep) for row in mapped_rows) if scope == "sequence" else kept_count(sum(mapped_rows), keep)
    return kept + (sum(unmapped_rows) if unmapped == "include" else 0)


# ---------------------------------------------------------------- refusals


def _check_ranges(loss_BU: Tensor, first_BS: Tensor, last_BS: Tensor, how: str) -> int:
    """An upper bound of the ranges' widths: on the CPU the widest, elsewhere U."""
    if how not in _COMBINE:
        raise ValueError(f"unknown aggregate {how!r}: expected one of {', '.join(_COMBINE)}")
    longest = loss_BU.shape[-1]
    if loss_BU.dim() != 2 or first_BS.shape != last_BS.shape or first_BS.shape[:1] != loss_BU.shape[:1]:
        raise ValueError(
            f"gather_guide: losses [B, U] and ranges [B, S] expected, got losses {list(loss_BU.shape)}, "
            f"first {list(first_BS.shape)}, last {list(last_BS.shape)}"
        )
    if first_BS.is_floating_point() or last_BS.is_floating_point():
        raise ValueError(f"gather_guide: ranges of integers expected, got {first_BS.dtype} and {last_BS.dtype}")
    if loss_BU.device.type != "cpu" or not first_BS.numel():
        return longest
    least, widest = map(int, (last_BS - first_BS).aminmax())
    begin, end = int(first_BS.amin()), int(last_BS.amax())
    if begin < 0 or least < 0 or end > longest:
        raise ValueError(
            f"gather_guide: ranges reach from {begin} to {end} and must be ordered within [0, {longest}]: "
            "do the spans belong to this row of the teacher, and count from its first token?"
        )
    return widest


def _check_same_shape(student_loss_BS: Tensor, guide_BS: Tensor, valid_BS: Tensor) -> None:
    if not student_loss_BS.shape == guide_BS.shape == valid_BS.shape or student_loss_BS.dim() != 2:
        raise ValueError(
            f"[B, S] three times expected, got student losses {list(student_loss_BS.shape)}, guide or ranges "
            f"{list(guide_BS.shape)}, valid {list(valid_BS.shape)}"
        )
