"""One micro-batch through a whole model on the meta device: no weights, no numbers, every layer's own code.

The layers are the student's; a teacher of the same families is made of them too, as its own forward asks its mask for numbers.
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
class Passage:
    """Shapes of what passes through a model, B rows of S tokens."""

    ids: Shape
    """[B, S]"""
    hidden: Shape
    """[B, S, H], after every layer alike; what a pipeline's stages hand on."""
    head: Shape
    """[V, H]"""
    loss: Shape
    """[B, S]"""


def passage(config: PretrainedConfig, rows: int, length: int, dtype: torch.dtype) -> Passage:
    """Run `rows` rows of `length` tokens, forward."""
    config = with_sdpa(config)
    with torch.device("meta"), torch.no_grad():
        ids_BS = torch.zeros(rows, length, dtype=torch.long)
        hidden_BSH = Embedding(config).to(dtype)(ids_BS)
        for i in range(config.num_hidden_layers):
            hidden_BSH = DecoderLayer(config, i).to(dtype)(hidden_BSH)
        head = Head(nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)))
        hidden_BSH, head_VH = head(FinalNorm(config).to(dtype)(hidden_BSH))
        # not token_loss, whose kernels have no meta device; its shapes are these
        logits_NV = F.linear(hidden_BSH.flatten(0, 1), head_VH)
        loss_BS = F.cross_entropy(logits_NV.float(), ids_BS.flatten(), reduction="none").view(ids_BS.shape)
    return Passage(*(tuple(tensor.shape) for tensor in (ids_BS, hidden_BSH, head_VH, loss_BS)))
