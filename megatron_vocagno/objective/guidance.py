"""The guided loss of *Vocabulary-agnostic Teacher Guided Language Modeling* (arXiv 2503.19123).

    L = sum(w * l_S) / sum(w)

The weights w are those of `selection`. The training engine calls `select_tokens` and `weighted_loss`. `guided_loss` is both in
one call, for other training loops. B rows, S student positions, U teacher positions. Losses are float32, in nats. No function
waits for a GPU, except `summarize`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vocagno.objective.ranking import over_ranks
from megatron_vocagno.objective.rule import Aggregate, Rule, Scope, Selection, Unit, Unmapped, Weighting
from megatron_vocagno.objective.selection import select_tokens
from megatron_vocagno.objective.statistics import STATS


@dataclass(frozen=True)
class GuidedLoss(Selection):
    """Result of guided_loss: the selection, and the loss of its tokens."""

    loss: Tensor
    """Scalar float32, nats. Differentiable with respect to the student's losses only."""


def guided_loss(
    student_loss_BS: Tensor,
    teacher_loss_BU: Tensor,
    first_BS: Tensor,
    last_BS: Tensor,
    valid_BS: Tensor,
    *,
    keep: float = 0.4,
    aggregate: Aggregate = "max",
    scope: Scope = "microbatch",
    unmapped: Unmapped = "include",
    require_positive: bool = False,
    group: dist.ProcessGroup | None = None,
    unit: Unit = "token",
    weighting: Weighting = "top_k",
    threshold: float = 2.0,
    strength: float = 0.25,
    clip: float = 4.0,
    normalizer: float | Tensor | None = None,
) -> GuidedLoss:
    """L = sum(w * l_S) / denominator, over the tokens of this rank (docs/method.md, 3 and 4).

    student_loss_BS    [B, S] float, nats. The only input with a gradient, w / denominator. If a loss is NaN, its token is counted
                       as nonfinite and has weight 0
    teacher_loss_BU    [B, U] float, nats. NaN marks a teacher token without a usable loss. U may be 0
    first_BS, last_BS  [B, S] int, teacher positions, half-open: [first, last). A token with first == last is unmapped
    valid_BS           [B, S] bool. A False token (padding, ignored target) has weight 0 and is not counted
    keep ... clip      the fields of Rule; the defaults are the paper's values
    normalizer         the denominator, if it is known in advance, for example planned_kept of a whole step. By default it is the
                       sum of the weights of this rank, or without a ranking the number of its tokens that can have weight. For
                       scope 'global' it is the sum over all ranks, and the loss is the sum of the ranks' losses
    returns            the loss, the weights and the guide [B, S], and sums that `summarize` turns into shares and means

    If all weights are 0, the loss and its gradient are 0. A NaN or infinite loss of weight 0 reaches neither of them.
    Raises ValueError: see select_tokens.

    Half of four mapped tokens are kept, those with the largest student_loss - guide, 2 and 1.5 nats. The last token is unmapped:

    >>> student_BS = torch.tensor([[2.0, 3.0, 1.0, 4.0, 0.5]], requires_grad=True)
    >>> teacher_BU = torch.tensor([[1.5, 1.0, 2.0, 2.5]])
    >>> first_BS, last_BS = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 4, 4]])
    >>> valid_BS = torch.ones(1, 5, dtype=torch.bool)
    >>> guided = guided_loss(student_BS, teacher_BU, first_BS, last_BS, valid_BS, keep=0.5)
    >>> guided.loss.item(), guided.weight_BS
    (2.5, tensor([[0., 1., 0., 1., 1.]]))
    >>> guided.guide_BS
    tensor([[1.5000, 1.0000, 2.0000, 2.5000,    nan]])
    >>> guided.loss.backward()
    >>> student_BS.grad
    tensor([[0.0000, 0.3333, 0.0000, 0.3333, 0.3333]])
    >>> from megatron_vocagno.objective import summarize
    >>> summarize(guided)["excess_kept"], summarize(guided)["excess_dropped"]
    (1.75, -0.25)
    """
    rule = Rule(keep, aggregate, scope, unmapped, require_positive, group, unit, weighting, threshold, strength, clip)
    selection = select_tokens(student_loss_BS, teacher_loss_BU, first_BS, last_BS, valid_BS, rule)
    if normalizer is None:
        normalizer = _normalizer(selection, rule)
    return GuidedLoss(**vars(selection), loss=weighted_loss(student_loss_BS, selection.weight_BS, normalizer))


def _normalizer(selection: Selection, rule: Rule) -> Tensor:
    """The default denominator: see guided_loss."""
    total = selection.weight_BS.sum()
    if rule.weighting != "top_k":
        sums = dict(zip(STATS, selection.stats, strict=True))
        total = sums["mapped"] + (sums["unmapped"] if rule.unmapped == "include" else 0)
    return over_ranks(total, rule.group if rule.scope == "global" else None)


def weighted_loss(student_loss_BS: Tensor, weight_BS: Tensor, normalizer: float | Tensor) -> Tensor:
    """sum(weight * loss) / normalizer, scalar float32, nats. 0 if the normalizer is 0 (docs/method.md, 4).

    student_loss_BS  [B, S] float, nats
    weight_BS        [B, S] float, for example of select_tokens
    normalizer       if a step has several micro-batches, the planned_kept of all of them: the loss of the step is then the sum of
                     their losses

    >>> weighted_loss(torch.tensor([[2.0, torch.nan, 4.0]]), torch.tensor([[1.0, 0.0, 1.0]]), 2)
    tensor(3.)
    """
    # `where`, because 0 * NaN is NaN in the product and in its gradient
    total = torch.where(weight_BS != 0, weight_BS * student_loss_BS.float(), 0.0).sum()
    # a denominator of infinity, because a guard after the division would come too late for the gradient
    if isinstance(normalizer, Tensor):
        return total / normalizer.detach().float().masked_fill(normalizer == 0, torch.inf)
    return total / (normalizer or torch.inf)
