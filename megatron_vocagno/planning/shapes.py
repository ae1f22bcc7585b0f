"""Run one micro-batch through a complete model on the meta device, to check that the shapes of all layers fit.

A teacher is built from the student's layers too. The Hugging Face model cannot run here, because it reads values of its mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from megatron_vocagno.model.student import DecoderLayer, Embedding, FinalNorm, Head
from megatron_vocagno.planning.trace import with_sdpa

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ForwardShapes:
    """Shapes of the tensors in a forward pass on B rows of S tokens."""

    ids: Shape
    """[B, S]"""
    hidden: Shape
    """[B, S, H] after every layer. Pipeline stages send tensors of this shape."""
    head: Shape
    """[V, H]"""
    loss: Shape
    """[B, S]"""


def forward_shapes(config: PretrainedConfig, rows: int, length: int, dtype: torch.dtype) -> ForwardShapes:
    """Run the forward pass on `rows` rows of `length` tokens."""
    config = with_sdpa(config)
    with torch.device("meta"), torch.no_grad():
        ids_BS = torch.zeros(rows, length, dtype=torch.long)
        hidden_BSH = Embedding(config).to(dtype)(ids_BS)
        for i in range(config.num_hidden_layers):
            hidden_BSH = DecoderLayer(config, i).to(dtype)(hidden_BSH)
        head = Head(nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)))
        hidden_BSH, head_VH = head(FinalNorm(config).to(dtype)(hidden_BSH))
        # in place of token_loss, whose kernels do not support the meta device; the shapes are the same
        logits_NV = F.linear(hidden_BSH.flatten(0, 1), head_VH)
        loss_BS = F.cross_entropy(logits_NV.float(), ids_BS.flatten(), reduction="none").view(ids_BS.shape)
    return ForwardShapes(*(tuple(tensor.shape) for tensor in (ids_BS, hidden_BSH, head_VH, loss_BS)))
