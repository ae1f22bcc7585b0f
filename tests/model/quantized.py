"""What a quantized teacher is, measured: a program, as torchao must not be imported by the tests' own process.

transformers imports torchao wherever it is installed, which every process that starts would pay for; so it lies in a folder of
its own, and only this program has that on its path.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vocagno.model.teacher import Teacher, open_teacher
from tests.model.tiny import batch


def decoder_bytes(teacher: Teacher) -> int:
    """Of its matrices: what quantized tensors hold counts, not what they stand for."""
    held = 0
    for module in teacher.decoder.modules():
        if isinstance(module, nn.Linear):
            weight: Any = module.weight
            whole = type(weight.data) is Tensor
            parts = [weight] if whole else [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
            held += sum(part.numel() * part.element_size() for part in parts)
    return held


def measure(folder: Path, weights: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Of the teacher in `folder`, against itself as it is."""
    input_BU, target_BU = batch(4, 60)
    whole, small = open_teacher(folder, dtype, "cpu"), open_teacher(folder, dtype, "cpu", quantization=weights)
    exact_N, rough_N = (teacher.loss(input_BU, target_BU)[target_BU != -100] for teacher in (whole, small))
    return {
        "folder": folder.name,
        "weights": weights,
        "dtype": str(dtype),
        "error": float((rough_N - exact_N).abs().mean() / exact_N.std()),
        "bytes": decoder_bytes(small) / decoder_bytes(whole),
        "same_head": torch.equal(small.head.weight, whole.head.weight),
        "same_count": small.parameters_count == whole.parameters_count,
    }


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    kinds = [(weights, dtype) for weights in ("int8", "fp8") for dtype in (torch.bfloat16, torch.float16)]
    print(json.dumps([measure(folder, weights, dtype) for folder in folders for weights, dtype in kinds]))
