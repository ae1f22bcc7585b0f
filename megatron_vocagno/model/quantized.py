"""A teacher's decoder with 8-bit weights, by torchao: half the memory of bfloat16 for a model that only runs forward.

Only weights are quantized. The forward pass still multiplies in the teacher's own dtype. Embedding, norms and head are not
quantized: the losses come directly from the head, and `token_loss` reads it in tiles.
"""

from typing import Literal

import torch
from torch import nn

from megatron_vocagno.errors import ModelError

Quantization = Literal["none", "int8", "fp8"]


def quantize(decoder: nn.Module, quantization: Literal["int8", "fp8"], device: torch.device | str) -> None:
    """Quantize the weights of all linear layers, one layer after the other, and move each to `device`.

    int8  symmetric, one scale per matrix row
    fp8   float8_e4m3fn, one scale per matrix row

    Raises ModelError: torchao is not installed, the weights are sharded, or the architecture has no linear layers.
    """
    if any(hasattr(parameter, "ds_id") for parameter in decoder.parameters()):
        raise ModelError(
            f"teacher.quantization = '{quantization}' with teacher.placement = 'zero3': quantized weights cannot be sharded. "
            "Use placement 'replicated', or quantization 'none'."
        )
    if not any(isinstance(module, nn.Linear) for module in decoder.modules()):
        raise ModelError(f"teacher.quantization = '{quantization}': the teacher's decoder has no torch linear layers. Use 'none'")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f"teacher.quantization = '{quantization}' needs torchao ({error}): pip install torchao, or use 'none'"
        ) from error
    quantize_(decoder, Int8WeightOnlyConfig() if quantization == "int8" else Float8WeightOnlyConfig(), device=device)
