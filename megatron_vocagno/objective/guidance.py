"""The guided loss of *Vocabulary-agnostic Teacher Guided Language Modeling* (arXiv 2503.19123).

    L = sum(w * l_S) / sum(w)

`selection` says which tokens have weight, and why; training calls `select_tokens` and `weighted_loss`. guided_loss is both
in one, for loops of one's own. B rows, S student positions; losses are float32, in nats. No function waits for a GPU,
except `summarize`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vocagno.objective.ranking import over_ranks
from megatron_vocagno.objective.rule import Rule, Scope, Unmapped
from megatron_vocagno.objective.selection import select_by_guide


@dataclass(frozen=True)
class GuidedLoss:
    """A loss, and what it was computed from; see guided_loss."""

    loss: Tensor
    """Scalar float32, nats. Differentiable, through the student's losses alone."""
    weight_BS: Tensor
    """[B, S] float32 of 0 and 1."""
    stats: Tensor
    """[len(STATS)] float64: sums, which `summarize` turns into shares and means."""


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
    """L = sum(w * l_S) / denominator, over the tokens of this rank (docs/method.md, 3 and 4).

    student_loss_BS  [B, S] float, nats; the only input that gets a gradient: w / denominator. A NaN is counted as nonfinite,
                     and its token has weight 0
    guide_BS         [B, S] float, nats, of gather_guide; NaN is unmapped
    valid_BS         [B, S] bool; False (padding, ignored target) has weight 0 and is counted nowhere
    normalizer       the denominator where it is known beforehand, such as planned_kept of a whole step; without it, the sum of
                     the weights: of this rank, for 'global' of all ranks (the ranks' losses then add up to the loss)
    the others       as for select_tokens

    Where all weights are 0 the loss is 0 and so is the gradient; a NaN or infinite loss of weight 0 leaks into neither.
    Raises ValueError: see select; unknown policy.

    Of four mapped tokens half are kept, those with the largest student_loss - guide, 2 and 1.5 nats:

    >>> student_BS = torch.tensor([[2.0, 3.0, 1.0, 4.0]], requires_grad=True)
    >>> guide_BS, valid_BS = torch.tensor([[1.5, 1.0, 2.0, 2.5]]), torch.ones(1, 4, dtype=torch.bool)
    >>> guided = guided_loss(student_BS, guide_BS, valid_BS, keep=0.5, scope="microbatch", unmapped="include")
    >>> guided.loss.item(), guided.weight_BS
    (3.5, tensor([[0., 1., 0., 1.]]))
    >>> guided.loss.backward()
    >>> student_BS.grad
    tensor([[0.0000, 0.5000, 0.0000, 0.5000]])
    >>> from megatron_vocagno.objective import summarize
    >>> summarize(guided.stats)["excess_kept"], summarize(guided.stats)["excess_dropped"]
    (1.75, -0.25)
    """
    rule = Rule(keep, scope, unmapped, require_positive, group)
    selection = select_by_guide(student_loss_BS, guide_BS, valid_BS, rule)
    if normalizer is None:
        normalizer = over_ranks(selection.weight_BS.sum(), rule.ranks)
    loss = weighted_loss(student_loss_BS, selection.weight_BS, normalizer)
    return GuidedLoss(loss, selection.weight_BS, selection.stats_PK.sum(0))


def weighted_loss(student_loss_BS: Tensor, weight_BS: Tensor, normalizer: float | Tensor) -> Tensor:
    """sum(weight * loss) / normalizer, scalar float32, nats; 0 where the normalizer is 0 (docs/method.md, 4).

    student_loss_BS  [B, S] float, nats
    weight_BS        [B, S] float, as of select_tokens
    normalizer       of a step with several micro-batches the planned_kept of all of them: their losses then add up to the step's

    >>> weighted_loss(torch.tensor([[2.0, torch.nan, 4.0]]), torch.tensor([[1.0, 0.0, 1.0]]), 2)
    tensor(3.)

    `where`, because 0 * NaN is NaN in the product and in its gradient; and a denominator of infinity, because a guard after
    the division would come too late for the gradient.
    """
    total = torch.where(weight_BS != 0, weight_BS * student_loss_BS.float(), 0.0).sum()
    if isinstance(normalizer, Tensor):
        return total / normalizer.detach().float().masked_fill(normalizer == 0, torch.inf)
    return total / (normalizer or torch.inf)
