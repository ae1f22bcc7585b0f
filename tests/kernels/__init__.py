"""Tests of what both backends compute: torch, and Triton on a GPU or in Triton's interpreter.

The interpreter needs a process of its own, because Triton reads its variable when a kernel is defined.
tests/objective/test_triton.py starts that process.
"""

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TRITON = ["triton"] if INTERPRETED or torch.cuda.is_available() else []
BACKENDS = TRITON if INTERPRETED else ["torch", *TRITON]
"""Backends that can run in this process."""

HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
"""The 16-bit types that can run. The interpreter computes bfloat16 wrongly, without an error."""


@dataclass(frozen=True)
class Backend:
    name: str

    @property
    def triton(self) -> bool:
        return self.name == "triton"

    @property
    def interpreted(self) -> bool:
        """The interpreter is slow: tests run fewer cases."""
        return self.triton and INTERPRETED

    @property
    def device(self) -> torch.device:
        """The interpreter's tensors are on the CPU."""
        return torch.device("cuda" if self.triton and not INTERPRETED else "cpu")

    @property
    def tiles(self) -> ModuleType:
        """update_online_softmax, dlogits_tile."""
        if self.triton:
            from megatron_vocagno.objective import linear_ce_triton

            return linear_ce_triton
        from megatron_vocagno.objective import linear_ce_tiles

        return linear_ce_tiles

    @property
    def select_tokens(self) -> Any:
        if self.triton:
            from megatron_vocagno.objective import selection_triton

            return selection_triton.select_tokens
        from megatron_vocagno.objective import selection

        return selection.select_tokens
