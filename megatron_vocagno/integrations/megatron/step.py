"""forward_step and loss_func, as Megatron-LM's pretrain_gpt.py has them. B rows of S positions, P of them on this rank.

    total    sum of w * l_S over the micro-batch                            differentiable
    number   the planned sum of the weights, see objective.planned_kept     the loss of a step is sum(total) / sum(number)
    report   name -> [2], a sum and what it is divided by, added by Megatron over micro-batches and ranks

With `calculate_per_token_loss`, Megatron divides once per step, by the numbers of all micro-batches and data-parallel ranks. This
is the denominator of docs/method.md, 4.

Tensor parallelism: each rank of a group reads the same rows, and the vocabulary-parallel cross-entropy gives each the same
losses, so all choose the same tokens and communicate nothing.
Pipeline parallelism: the last stage chooses, and the stages between the first and the last read no rows.
Context parallelism: a rank has P = S / ranks positions of each row, as Megatron cuts labels. The ranks add up their losses to
whole rows (4 bytes per token), each chooses from the whole rows, and takes the weights of its positions. The selection is
therefore that of one rank, for every unit and scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_vocagno.errors import RunError
from megatron_vocagno.integrations.megatron.dataset import guide_of
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens
from megatron_vocagno.objective.statistics import STATS, fractions

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
"""total [] float32, number [] int32, report."""


@dataclass(frozen=True)
class Guide:
    """The teacher's side of B rows, see dataset.py."""

    loss_BS: Tensor
    first_BS: Tensor
    last_BS: Tensor
    mapped_B: tuple[int, ...]
    unmapped_B: tuple[int, ...]
    """Number of mapped and of unmapped labels of each row, on the host."""


@dataclass(frozen=True)
class MicroBatch:
    """The part of a micro-batch that its loss needs."""

    valid_BS: Tensor
    """bool, whether a position has a label."""
    position_P: Tensor
    """int64, the positions of this rank."""
    guide: Guide | None = None
    """None if the rows have no teacher (evaluation)."""


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module, rule: Rule
) -> tuple[Tensor, Callable[[Tensor], Loss] | None]:
    """One micro-batch through the model, and the function of the model's output that gives its loss. Bind `rule` with `partial`.

    data_iterator  collated rows of GuidedGPTDataset, the same on all tensor- and context-parallel ranks; in evaluation also of
                   AlignedGPTDataset, which give the mean loss of all labels. Not read on stages between the first and the last
    model          GPTModel, wrapped or not
    rule           that of the rows. `group` is set here

    Raises RunError for a model, rows or a layout with which the loss would be another one.
    """
    _require_model(get_model_config(model))
    reads, learns = (get_attr_wrapped_model(model, name) for name in ("pre_process", "post_process"))
    if not (reads or learns):
        return model(None, None, None), None
    assert data_iterator is not None
    rows = next(data_iterator)
    _require_rows(rows, rule, model)
    # on the host: rows of a data loader, so nothing is waited for
    counts = _counts(rows) if "first" in rows else None
    rows = {name: tensor.to(torch.cuda.current_device(), non_blocking=True) for name, tensor in rows.items()}
    position_P = own_positions(rows["tokens"].shape[1], *_context_parallel()).to(rows["tokens"].device)
    tokens_BP, positions_BP, labels_BP = (rows[name][:, position_P] for name in ("tokens", "position_ids", "labels"))
    # a causal model makes its mask itself
    output = model(tokens_BP, positions_BP, None, labels=labels_BP)
    if not learns:
        return output, None
    batch = MicroBatch(rows["loss_mask"] > 0, position_P)
    if counts is not None:
        batch = replace(batch, guide=Guide(rows[guide_of(rule.unit)], rows["first"], rows["last"], *counts))
    return output, partial(loss_func, batch, rule)


def loss_func(batch: MicroBatch, rule: Rule, output_tensor: Tensor) -> Loss:
    """The total, the number and the report of a micro-batch, see above.

    output_tensor  [B, P] float, the student's losses at this rank's positions, nats

    The report has `lm loss`, the loss of the step, and the means of `objective.summarize` as `guidance/…`. A mean over no tokens
    is NaN there. `guidance/share_nonfinite` is the share of labels whose loss is NaN or infinite: a NaN has weight 0, so
    it is not visible in the loss.

    Collective over the context-parallel ranks, and for scope 'global' also over the data-parallel ranks. Raises RunError: scope
    'global' with several micro-batches.
    """
    loss_BP = output_tensor.float()
    ranks, rank = _context_parallel()
    if batch.guide is None:
        weight_BP = batch.valid_BS[:, batch.position_P].float()
        total, number = weighted_loss(loss_BP, weight_BP, 1), weight_BP.sum().int()
        return total, number, {"lm loss": torch.stack([total.detach(), number.float()])}
    guide = batch.guide
    rule, planned, capacity, counts_here = _plan(guide, rule)
    loss_BS = loss_BP.detach()
    if ranks > 1:
        # a sum with zeros is exact
        loss_BS = loss_BS.new_zeros(batch.valid_BS.shape).index_copy_(1, batch.position_P, loss_BS)
        dist.all_reduce(loss_BS, group=parallel_state.get_context_parallel_group())
    selection = select_tokens(loss_BS, guide.loss_BS, guide.first_BS, guide.last_BS, batch.valid_BS, rule, capacity=capacity)
    total = weighted_loss(loss_BP, selection.weight_BS[:, batch.position_P], 1)
    # the rows are those of all context-parallel ranks: their number is counted once
    number = torch.tensor(planned if counts_here and rank == 0 else 0, dtype=torch.int32, device=total.device)
    sums = dict(zip(STATS, selection.stats, strict=True))
    report = {f"guidance/{name}": mean for name, mean in fractions(selection.stats).items() if name != "loss"}
    report["guidance/share_nonfinite"] = torch.stack([sums["nonfinite"], sums["valid"]])
    return total, number, {"lm loss": torch.stack([total.detach(), number.float()])} | report


def own_positions(length: int, ranks: int, rank: int) -> Tensor:
    """[P] int64: the positions of a row that a context-parallel rank has. Of 2 * ranks equal parts, the rank has part `rank` and,
    counted from the end, part `rank`, so that causal attention costs each rank the same.

    Raises RunError: the length is not a multiple of 2 * ranks.

    >>> own_positions(8, ranks=2, rank=0), own_positions(8, ranks=2, rank=1)
    (tensor([0, 1, 6, 7]), tensor([2, 3, 4, 5]))
    """
    if ranks == 1:
        return torch.arange(length)
    if length % (2 * ranks):
        raise RunError(
            f"rows of {length:,} positions on {ranks} context-parallel ranks: --seq-length must be a multiple of {2 * ranks}"
        )
    part_RP = torch.arange(length).view(2 * ranks, -1)
    return part_RP[[rank, 2 * ranks - 1 - rank]].flatten()


def _context_parallel() -> tuple[int, int]:
    """The number of context-parallel ranks, and this rank among them."""
    return parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()


def _counts(rows: dict[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Number of mapped and of unmapped labels of each row."""
    mapped_BS, valid_BS = rows["first"] < rows["last"], rows["loss_mask"] > 0
    return tuple(mapped_BS.sum(1).tolist()), tuple((valid_BS & ~mapped_BS).sum(1).tolist())


def _plan(guide: Guide, rule: Rule) -> tuple[Rule, int, int | None, bool]:
    """The rule with its group, the planned sum of the weights, the capacity (see select_tokens), and whether this data-parallel
    rank counts the sum."""
    planned = planned_kept(guide.mapped_B, guide.unmapped_B, rule)
    if rule.scope == "sequence":
        rows = zip(guide.mapped_B, guide.unmapped_B, strict=True)
        return rule, planned, max(planned_kept([mapped], [unmapped], rule) for mapped, unmapped in rows), True
    if rule.scope == "microbatch" or rule.weighting != "top_k":
        return rule, planned, planned, True
    if (micro_batches := get_num_microbatches()) > 1:
        raise RunError(
            f"--scope global ranks the tokens of a step before its first backward pass, and a step has {micro_batches} "
            "micro-batches: Megatron-LM's schedules learn from each before they have the losses of all.\n"
            "  Use --scope microbatch, or make --global-batch-size the product of --micro-batch-size and the data-parallel ranks."
        )
    group = parallel_state.get_data_parallel_group()
    counts = torch.tensor([sum(guide.mapped_B), sum(guide.unmapped_B)], device=guide.first_BS.device)
    dist.all_reduce(counts, group=group)
    mapped, unmapped = counts.tolist()
    return replace(rule, group=group), planned_kept([mapped], [unmapped], rule), None, dist.get_rank(group) == 0


def _require_model(config: TransformerConfig) -> None:
    if not config.calculate_per_token_loss:
        raise RunError(
            "calculate_per_token_loss is False: Megatron would divide the loss of each micro-batch by its own number of tokens, "
            "and a step would be a mean of means.\n  Add --calculate-per-token-loss."
        )
    if config.mtp_num_layers:
        raise RunError(
            f"mtp_num_layers = {config.mtp_num_layers}: the losses of multi-token prediction have no guide, so they would "
            "count all tokens.\n  Remove --mtp-num-layers."
        )


def _require_rows(rows: dict[str, Tensor], rule: Rule, model: torch.nn.Module) -> None:
    length, longest = rows["tokens"].shape[1], get_attr_wrapped_model(model, "max_sequence_length")
    if length > longest:
        raise RunError(
            f"the dataset gives rows of {length:,} positions, and the model has {longest:,}: seq_length of the dataset is that "
            "of the run, --seq-length"
        )
    guides = [name for name in rows if name.endswith("_guide")]
    if guides != [guide_of(rule.unit)] and (guides or model.training):
        raise RunError(
            f"the rule has unit {rule.unit!r}, the rows have {' and '.join(guides) or 'no guide'}: give GuidedGPTDataset the "
            "rule of forward_step"
        )
