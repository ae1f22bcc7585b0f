"""The functions that training calls, on a real GPU: results, gradients, and that they do not wait. Not for the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.reference import errors, factors, gradients_without_waiting

SHAPE = (1024, 256, 5003)
GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_losses_and_gradients_are_those_of_dense_float64(softcap: float | None, dtype: torch.dtype) -> None:
    found = errors(factors(*SHAPE, dtype, GPU), softcap)
    assert found.loss <= 1 and found.gradients <= 1, found


@pytest.mark.parametrize("scope", ["sequence", "microbatch"])
def test_nothing_waits_between_the_forward_and_the_gradients(scope: str) -> None:
    results = gradients_without_waiting(factors(*SHAPE, torch.bfloat16, GPU), scope)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))
