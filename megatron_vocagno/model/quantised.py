"""A teacher's decoder with matrices of 8 bits, by torchao: half the memory of bfloat16 for a model that only ever goes forward.

Weights alone: a forward still multiplies in the teacher's own dtype. Embedding, norms and head stay as they are; the losses come
straight from the head, and `token_loss` reads it in tiles.
"""

from typing import Literal

import torch
from torch import nn

from megatron_vocagno.errors import ModelError

Weights = Literal["as-is", "int8", "fp8"]


def quantise(decoder: nn.Module, weights: Literal["int8", "fp8"], device: torch.device | str) -> None:
    """Replace the matrices of all linear layers, one after the other, leaving each on `device`.

    int8  one scale for each row: 8 bits between its largest magnitudes
    fp8   float8_e4m3fn, one scale for each row

    Raises ModelError: torchao is not installed, the weights are sharded, or the architecture has no linear layers.
    """
    if any(hasattr(parameter, "ds_id") for parameter in decoder.parameters()):
        raise ModelError(
            f"teacher.weights = '{weights}' with teacher.placement = 'zero3': a quantised matrix cannot be sharded. "
            "Use 'replicated', which takes half as much with it, or 'as-is'."
        )
    if not any(isinstance(module, nn.Linear) for module in decoder.modules()):
        raise ModelError(f"teacher.weights = '{weights}': this teacher's decoder has no linear layers of torch. Use 'as-is'")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f"teacher.weights = '{weights}' needs torchao ({error}): pip install torchao, or use teacher.weights = 'as-is'"
        ) from error
    quantize_(decoder, Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig(), device=device)
