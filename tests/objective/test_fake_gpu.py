"""Training on a GPU, without one: fake tensors go through the functions that training calls, and kernels through the compiler.

Shapes, dtypes and launches are real. Values are not: tests/kernels checks them. test_compile.py has more cases and more GPUs.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.offline import SHARED_LIMIT, TARGETS, Launch, compiled_for
from megatron_vocagno.objective.linear_ce import SelectedTokens, _Options, _TokenLoss
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import select_tokens
from megatron_vocagno.objective.statistics import STATS
from tests.kernels import INTERPRETED
from tests.runs import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")]
GPU = torch.device("cuda")
OF_LOSS = {"_update_online_softmax", "_dlogits_tile"}
OF_SELECTION = {
    "sequence": {"select_row": 1},
    "microbatch": {"keys": 1, "threshold": 1, "weights": 1},
    "global": {"keys": 1, "histogram": 3, "count": 1, "weights": 1},
    "any, without a ranking": {"keys": 1, "count_above": 1, "weights": 1},
}
"""Kernels and their launches."""


def all_kernels() -> set[str]:
    """Names of the functions that are called as kernel[grid](...) or module.kernel[grid](...)."""
    modules = list((REPOSITORY / "megatron_vocagno" / "objective").glob("*_triton.py"))
    nodes = (node for module in modules for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    calls = (node.func for node in nodes if isinstance(node, ast.Call))
    kernels = {ast.unparse(call.value).rpartition(".")[2] for call in calls if isinstance(call, ast.Subscript)}
    assert len(modules) >= 2 and len(kernels) >= 8, kernels
    return kernels


def fits(launch: Launch) -> bool:
    """Nothing spills: a spilled register costs a memory access per thread. A block that does not fit is refused at its launch."""
    return (
        launch.spilled == 0
        and launch.shared <= SHARED_LIMIT[launch.target]
        and 0 < launch.registers <= 255
        and launch.warps * TARGETS[launch.target].warp_size <= 1024
        and all(0 < size < 2**16 for size in launch.grid[1:])
        and 0 < launch.grid[0] < 2**31
    )


def test_every_kernel_that_is_launched_compiles() -> None:
    """Those of the tests below, which compile them."""
    assert all_kernels() == OF_LOSS.union(*OF_SELECTION.values())


class _NoGuard(TorchFunctionMode):
    """x[i] through functions without a device guard, which a torch without CUDA does not have. Functions that write to out=x are
    called on meta tensors, with the overload that training calls."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            x, index = args
            axis = 0
            for part in index if isinstance(index, tuple) else (index,):
                if part is None:
                    x = x.unsqueeze(axis)
                elif isinstance(part, Tensor):
                    x = x.index_select(axis, part)
                elif isinstance(part, int):
                    x, axis = x.select(axis, part), axis - 1
                else:
                    start, stop, _ = part.indices(x.shape[axis])
                    x = x.narrow(axis, start, max(stop - start, 0))
                axis += 1
            return x
        if kwargs and "out" in kwargs:
            out = kwargs["out"]
            on_meta = [_meta(x) if isinstance(x, Tensor) else x for x in (*args, out)]
            made = function(*on_meta[:-1], **(kwargs | {"out": on_meta[-1]}))
            assert made is on_meta[-1] and (made.shape, made.dtype) == (out.shape, out.dtype)
            return out
        return function(*args, **(kwargs or {}))


def _meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@contextmanager
def on_a_gpu(target: str = "sm_90") -> Iterator[list[Launch]]:
    with FakeTensorMode(), _NoGuard(), compiled_for(target) as launches:
        yield launches


class _Context:
    """Autograd's context between forward and backward. Its engine needs a device even for fake tensors."""

    needs_input_grad = (True, True, False, False)
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_token_loss_runs_its_kernels_on_float32_tiles(dtype: torch.dtype) -> None:
    tokens, size, vocabulary, learned = 16_384, 2048, 32_003, 6000
    with on_a_gpu() as launches:
        hidden = torch.empty(tokens, size, device=GPU, dtype=dtype)
        head = torch.empty(vocabulary, size, device=GPU, dtype=dtype)
        target = torch.empty(tokens, device=GPU, dtype=torch.int64)
        selected, context = SelectedTokens(), _Context()
        options = _Options(ignore_index=-100, softcap=None, selected=selected)
        loss = _TokenLoss.forward(context, hidden, head, target, options)
        tiles = Counter(launch.kernel for launch in launches)
        assert loss.is_cuda and loss.dtype == torch.float32 and loss.shape == (tokens,)
        assert set(tiles) == {"_update_online_softmax"} and tiles["_update_online_softmax"] > 1 and all(map(fits, launches))
        launches.clear()
        selected.set(torch.empty(learned, device=GPU, dtype=torch.int64))
        dhidden, dhead, *_ = _TokenLoss.backward(context, torch.empty_like(loss))
        assert {launch.kernel for launch in launches} == {"_dlogits_tile"}
        assert all(launch.grid[0] == learned // 4 and fits(launch) for launch in launches)
    assert (dhidden.shape, dhidden.dtype, dhead.shape, dhead.dtype) == (hidden.shape, dtype, head.shape, dtype)


def test_a_float32_product_of_16_bits_writes_into_its_tile() -> None:
    """An overload that torch has only for CUDA, so no test runs it on a CPU."""
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    hidden, head = (torch.empty(rows, 16, dtype=torch.bfloat16, device="meta") for rows in (8, 32))
    tile = torch.empty(8, 32, device="meta")
    with Watch():
        assert torch.mm(hidden, head.T, out_dtype=torch.float32, out=tile) is tile
    assert seen[-1] is torch.ops.aten.mm.dtype_out
    assert tile.shape == (8, 32) and tile.dtype == torch.float32


LAUNCHES = [
    ("sequence", "token", "top_k", (8, 2048)),
    ("microbatch", "token", "top_k", (8, 2048)),
    ("global", "token", "top_k", (16, 4096)),
    ("sequence", "chunk", "control_variate", (8, 2048)),
    ("microbatch", "chunk", "top_k", (8, 2048)),
    ("microbatch", "chunk", "threshold", (8, 2048)),
    ("global", "chunk", "control_variate", (16, 4096)),
]


@pytest.mark.parametrize("strength", [0.25, 0.125])  # with a strength of 0.125, every excess has weight: another cut
@pytest.mark.parametrize(("scope", "unit", "weighting", "batch"), LAUNCHES)
def test_a_selection_waits_for_nothing_and_launches_these_kernels(
    scope: str, unit: str, weighting: str, batch: tuple[int, int], strength: float
) -> None:
    """Reading a value from the device (item, nonzero, a mask as index) is an error of fake tensors."""
    with on_a_gpu() as launches:
        float_BS, int_BS = torch.empty(*batch, device=GPU), torch.empty(*batch, device=GPU, dtype=torch.int32)
        selection = select_tokens(
            float_BS,
            torch.empty(batch[0], 3 * batch[1], device=GPU),
            int_BS,
            int_BS,
            int_BS.bool(),
            Rule(scope=scope, unit=unit, weighting=weighting, strength=strength),  # type: ignore[arg-type]
            capacity=1000,
        )
    kernels = OF_SELECTION[scope if weighting == "top_k" or scope == "sequence" else "any, without a ranking"]
    assert Counter(launch.kernel for launch in launches) == kernels and all(map(fits, launches))
    assert selection.weight_BS.shape == batch and selection.weight_BS.is_cuda
    assert selection.tokens_C.shape == (1000 * (batch[0] if scope == "sequence" else 1),)
    assert selection.stats_PK.shape[1] == len(STATS)
