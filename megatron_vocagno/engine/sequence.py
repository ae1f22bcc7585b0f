"""Sequence parallelism: N ranks share each row, and each of them has an equal part of its positions.

Only the student's activations are divided. Each of the N ranks has the complete batches, spans, teacher losses and selections.
The ranks exchange the student's losses (one float per token), and all of them compute the same selection as one rank would, also
for chunks that belong to two parts. Targets are shifted before rows are divided, so the target of a part's last position is the
first token of the next part.

DeepSpeed sees data-parallel ranks only. Under every ZeRO stage, it averages gradients over all of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from deepspeed import comm as dist
from torch import Tensor
from transformers import PretrainedConfig

from megatron_vocagno.engine.collectives import run_on_all_ranks
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.attention import ULYSSES
from megatron_vocagno.model.proof import TOKENS, shrunk
from megatron_vocagno.model.student import DecoderLayer, build_layer
from megatron_vocagno.model.ulysses import exchange_over, register_ulysses

SAME = 1e-3
"""Largest allowed difference between a divided and a whole row, relative to the largest value."""


@dataclass(frozen=True)
class RowParts:
    """The ranks that share rows, and the part of this rank: positions [rank * S / ranks, (rank + 1) * S / ranks)."""

    group: dist.ProcessGroup | None = None
    """None: this rank has whole rows."""
    rank: int = 0
    ranks: int = 1

    def part(self, x_BS: Tensor) -> Tensor:
        """This rank's part [B, S / ranks] of whole rows."""
        return x_BS if self.group is None else x_BS.chunk(self.ranks, 1)[self.rank].contiguous()

    def whole(self, x_BP: Tensor) -> Tensor:
        """Whole rows [B, S], from the parts of all ranks. Collective over the group."""
        if self.group is None:
            return x_BP
        parts = [torch.empty_like(x_BP) for _ in range(self.ranks)]
        dist.all_gather(parts, x_BP.contiguous(), group=self.group)
        return torch.cat(parts, 1)


WHOLE_ROWS = RowParts()


def divide_ranks(ranks: int) -> tuple[RowParts, dist.ProcessGroup]:
    """Form groups of `ranks` neighboring ranks that share rows. Collective over the world.

    Returns the group of this rank, and the ranks that have the same part of all other rows (those with which it shares the step).
    """
    if ranks == 1:
        return WHOLE_ROWS, dist.get_world_group()
    world, me = dist.get_world_size(), dist.get_rank()
    # all ranks must create all groups, in the same order
    sharing = [dist.new_group(list(range(first, first + ranks))) for first in range(0, world, ranks)]
    others = [dist.new_group(list(range(part, world, ranks))) for part in range(ranks)]
    return RowParts(sharing[me // ranks], me % ranks, ranks), others[me % ranks]


def use_ulysses(parts: RowParts, config: PretrainedConfig, device: torch.device) -> None:
    """Register the attention of divided rows, and prove it. config: the student's. Collective over the world.

    Raises SharedError.
    """
    if parts.group is not None:
        register_ulysses(exchange_over(parts.group), parts.ranks)
        differences = _differences(parts, config, device)
        run_on_all_ranks(lambda: _require_same(differences, parts.ranks), RunError)


def _differences(parts: RowParts, config: PretrainedConfig, device: torch.device) -> dict[str, float]:
    """How far a decoder layer with the student's heads is from its result on whole rows, relative to the largest value.

    A narrow layer with random weights computes two rows, once divided and once whole. Collective over the group.
    """
    small = shrunk(config)
    small.num_attention_heads, small.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
    if hasattr(small, "sliding_window"):
        small.sliding_window = None  # the windows of the student are not shorter than its rows
    generator = torch.Generator().manual_seed(0)
    shape = (2, TOKENS * parts.ranks, small.hidden_size)
    hidden_BSH, gradient_BSH = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    whole, divided = (
        _run_layer(small, attention, cut, device, hidden_BSH, gradient_BSH)
        for attention, cut in (("sdpa", WHOLE_ROWS), (ULYSSES, parts))
    )
    whole = parts.part(whole[0]), parts.part(whole[1]), whole[2]
    names = ("output", "gradient of the input", "gradient of the weights")
    return {name: float((a - b).abs().max() / a.abs().max()) for name, a, b in zip(names, whole, divided, strict=True)}


def _run_layer(
    config: PretrainedConfig, attention: str, cut: RowParts, device: torch.device, hidden_BSH: Tensor, gradient_BSH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of a decoder layer, gradient of its input, and gradient of its weights over all ranks.

    Collective over the group of `cut`.
    """
    config = copy.copy(config)
    config._attn_implementation = attention
    layer = build_layer(config, 1, seed=0).to(device)
    assert isinstance(layer, DecoderLayer)
    for parameter in layer.parameters():
        parameter.data *= 10  # so that attention is far from uniform
    position_1S = torch.arange(hidden_BSH.shape[1], dtype=torch.int32, device=device)[None]
    inputs_BPH = cut.part(hidden_BSH).clone().requires_grad_()
    out_BPH, _ = layer((inputs_BPH, cut.part(position_1S)))
    out_BPH.backward(cut.part(gradient_BSH))
    weights_N = torch.cat([parameter.grad.flatten() for parameter in layer.parameters() if parameter.grad is not None])
    if cut.group is not None:
        dist.all_reduce(weights_N, group=cut.group)
    assert inputs_BPH.grad is not None
    return out_BPH.detach(), inputs_BPH.grad, weights_N


def _require_same(differences: dict[str, float], ranks: int) -> None:
    for name, apart in differences.items():
        if not apart <= SAME:
            raise RunError(
                f"parallel.sequence = {ranks}: the {name} of a decoder layer on divided rows differs from that on whole rows by "
                f"{apart:.2g} of its largest value (at most {SAME:g}). Does this version of transformers call attention in "
                "another way, or does the backend exchange tensors wrongly?"
            )
