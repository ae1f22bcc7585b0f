"""Every kernel against float64: losses and gradients, selections, equal bits, and no waiting for the device.

The reference of the losses is dense float64 on the CPU. The reference of the selection is the method in plain Python, which is
float64 too. Larger selections are compared with the torch backend on the CPU, which the tests compare with the method. In a
rehearsal, the kernels run in Triton's interpreter, which computes bfloat16 wrongly.
"""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.record import Task
from megatron_vocagno.objective import linear_ce, selection
from megatron_vocagno.objective.rule import Rule
from tests.kernels.reference import errors, factors, gradients_without_waiting, losses_and_gradients
from tests.objective.selection_cases import KINDS, SETTINGS, Case, assert_selected, random_case, same

KERNELS = (
    *("_update_online_softmax", "_dlogits_tile"),
    *("keys", "threshold", "count_above", "histogram", "count", "weights", "select_row"),
)
"""All that are launched. A check at the end of the part fails if one of them was not."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES, TINY_SHAPES = ((512, 256, 4096), (509, 253, 4099)), ((8, 16, 256), (7, 15, 131))
"""(tokens, hidden size, vocabulary): even, and odd. The odd one is computed in tiles of 128 columns, the last of them ragged."""
BATCHES, TINY_BATCHES = ((8, 2048), (7, 2047), (17, 2048)), ((2, 64), (3, 33))
"""(rows, width) of the larger selections. The last one has more tokens than one program ranks."""
SHARES = ("0.4", "0.1", "1", "0.6")
"""The share of tokens that is kept, for each aggregate. A kernel is compiled again for a numerator or denominator of 1."""
TOLERANCES = (
    "Tolerances: 1e-5 nats and 1e-6 of a loss; 1e-6 of the norm of a gradient, or the machine epsilon of its dtype if that is "
    "larger. Selections, lists of tokens and guides are equal, and sums are equal to 1e-12."
)


def run(task: Task) -> None:
    from megatron_vocagno.objective import linear_ce_triton, selection_kernels_triton, selection_triton  # Triton may be missing

    device = torch.device(task.device)
    task.note(TOLERANCES)
    with (
        mock.patch.object(linear_ce, "_tile_backend", lambda _: linear_ce_triton),  # also for the interpreter's tensors
        _counted_launches(selection_kernels_triton.keys) as launches,
    ):
        _check_losses(task, device)
        _check_selections(task, device, selection_triton)
        _check_batches(task, device, selection_triton)
        _check_bits(task, device, selection_triton)
        if device.type == "cuda":
            _check_waiting(task, device)
    for kernel in KERNELS:
        task.check(f"launches of {kernel}", launches[kernel] > 0, {"launches": launches[kernel]})


@contextmanager
def _counted_launches(kernel: Any) -> Iterator[Counter[str]]:
    """Launches by the name of the kernel."""
    jitted, counted = type(kernel), Counter[str]()
    launcher = jitted.__getitem__

    def with_grid(self: Any, grid: Any) -> Any:
        counted[self.fn.__name__] += 1
        return launcher(self, grid)

    with mock.patch.object(jitted, "__getitem__", with_grid):  # kernel[grid](...)
        yield counted


def _attempt(task: Task, case: str, work: Callable[[], dict[str, float]]) -> None:
    """A row with the numbers of `work`, which raises AssertionError if its check fails. Any other error is a failed row too."""
    try:
        numbers = work()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [last.line or ""])[0][:200]
        task.check(case, False, why=f"{type(error).__name__} ({Path(last.filename).name}:{last.lineno}): {text}")
    else:
        task.check(case, True, numbers)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(task: Task) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if not (task.rehearse and dtype == torch.bfloat16)]


# ---------------------------------------------------------------- losses


def _check_losses(task: Task, device: torch.device) -> None:
    if task.rehearse:
        task.add("token_loss in bfloat16", result="left out: the interpreter computes bfloat16 wrongly")
    for even, shape in zip((True, False), TINY_SHAPES if task.rehearse else SHAPES, strict=True):
        for dtype in _dtypes(task):
            for softcap in (None, 10.0):
                n, h, v = shape
                case = f"token_loss, N {n}, H {h}, V {v:,}, {_name(dtype)}{'' if softcap is None else f', softcap {softcap:g}'}"
                x = factors(*shape, dtype, device)
                with _narrow_tiles(not even):
                    _attempt(task, case, lambda x=x, softcap=softcap: _loss_errors(x, softcap))  # type: ignore[misc]


@contextmanager
def _narrow_tiles(narrow: bool) -> Iterator[None]:
    """Tiles of 128 columns, the least, so that there are several."""
    if not narrow:
        yield
        return
    with mock.patch.multiple(linear_ce, GPU_TILE_BYTES=1, CPU_TILE_BYTES=1):
        yield


def _loss_errors(x: Any, softcap: float | None) -> dict[str, float]:
    found = errors(x, softcap)
    assert found.loss <= 1, f"the error of a loss is {found.loss:.3g} times the tolerance"
    assert found.gradients <= 1, f"the error of a gradient is {found.gradients:.3g} times the tolerance"
    return {"error of a loss / tolerance": found.loss, "error of a gradient / tolerance": found.gradients}


# ---------------------------------------------------------------- selections


def _check_selections(task: Task, device: torch.device, triton_backend: Any) -> None:
    """Small cases against the method in plain Python.

    Each combination of flags and dtypes compiles a kernel, so few are used: all aggregates in float32, and two in 16 bits.
    """
    kinds = KINDS[:3] if task.rehearse else KINDS
    for dtype in _dtypes(task):
        for scope in ("microbatch", "sequence"):
            for in_registers in (True, False) if scope == "microbatch" else (True,):
                way = "" if in_registers else ", histograms"
                case = f"selection, {len(kinds)} kinds of cases, {scope}{way}, {_name(dtype)}"
                limit = triton_backend.IN_REGISTERS if in_registers else 0
                with mock.patch.object(triton_backend, "IN_REGISTERS", limit):
                    _attempt(
                        task,
                        case,
                        lambda dtype=dtype, scope=scope: _selections(kinds, device, triton_backend, dtype, scope),  # type: ignore[misc]
                    )


def _selections(
    kinds: Sequence[str], device: torch.device, triton_backend: Any, dtype: torch.dtype, scope: str
) -> dict[str, float]:
    rng, met, aggregates = random.Random(f"{dtype} {scope}"), 0, SETTINGS["aggregate"]
    for number in range(len(aggregates) * len(kinds)):
        # the aggregate determines the flags and the width: even for two of them, odd for the others
        nth = number % len(aggregates)
        if dtype != torch.float32 and nth in (1, 2):
            continue
        case = random_case(rng, kinds[number // len(aggregates)], rows=rng.randint(1, 4), width=(48, 33)[nth % 2])
        case = _rounded(case, dtype)
        case.settings.update({"aggregate": aggregates[nth], "scope": scope, "keep": SHARES[nth]})
        case.settings["unmapped"] = SETTINGS["unmapped"][nth % 2]
        case.settings["require_positive"] = nth >= 2 and case.settings["weighting"] == "top_k"
        student_BS, teacher_BU, *spans = case.tensors(device)
        got = triton_backend.select_tokens(
            student_BS.to(dtype), teacher_BU.to(dtype), *spans, case.rule(), capacity=case.capacity
        )
        assert_selected(got, case, full=True)
        met += 1
    return {"cases": met}


def _rounded(case: Case, dtype: torch.dtype) -> Case:
    """The same case with losses that the dtype represents exactly."""

    def rounded(losses: list[list[float]]) -> list[list[float]]:
        found: list[list[float]] = torch.tensor(losses, dtype=torch.float64).to(dtype).double().tolist()
        return found

    return replace(case, student=rounded(case.student), teacher=rounded(case.teacher))


def _check_batches(task: Task, device: torch.device, triton_backend: Any) -> None:
    for number, (rows, width) in enumerate(TINY_BATCHES if task.rehearse else BATCHES):
        dtype = torch.bfloat16 if number == 1 and not task.rehearse else torch.float32
        for scope in ("microbatch", "sequence"):
            case = f"selection, {rows} x {width:,}, {scope}, {_name(dtype)}"
            inputs = _batch(rows, width, dtype)
            _attempt(
                task,
                case,
                lambda inputs=inputs, scope=scope: _same_as_torch(inputs, scope, device, triton_backend),  # type: ignore[misc]
            )
            _attempt(
                task,
                f"{case}, chunks",
                lambda inputs=inputs, scope=scope: _same_weights(inputs, scope, device, triton_backend),  # type: ignore[misc]
            )


def _batch(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """The first five arguments of select_tokens."""
    generator = torch.Generator().manual_seed(rows * width)
    student_BS, teacher_BU = (torch.rand(rows, n, generator=generator).mul(12).to(dtype) for n in (width, 2 * width))
    first_BS = torch.randint(0, 2 * width - 8, (rows, width), generator=generator)
    last_BS = first_BS + torch.randint(0, 5, (rows, width), generator=generator)
    return [student_BS, teacher_BU, first_BS, last_BS, torch.rand(rows, width, generator=generator) < 0.9]


def _same_as_torch(inputs: list[Tensor], scope: str, device: torch.device, triton_backend: Any) -> dict[str, float]:
    rule = Rule(0.4, "mean", scope, "include", require_positive=True)  # type: ignore[arg-type]
    want = selection.select_tokens(*inputs, rule)
    got = triton_backend.select_tokens(*(x.to(device) for x in inputs), rule)
    assert torch.equal(got.weight_BS.cpu(), want.weight_BS), "other tokens are kept"
    assert same(got.guide_BS, want.guide_BS), "another guide"
    assert torch.allclose(got.stats.cpu(), want.stats, rtol=1e-12), "other sums"
    return {"tokens": want.weight_BS.numel(), "kept": float(want.weight_BS.sum())}


def _same_weights(inputs: list[Tensor], scope: str, device: torch.device, triton_backend: Any) -> dict[str, float]:
    """With unit 'chunk' and weights between 0 and 1."""
    student_BS, teacher_BU, first_BS, _, valid_BS = inputs
    first_BS = first_BS.sort(1).values
    ascending = [student_BS, teacher_BU, first_BS, first_BS + 2, valid_BS]
    # a strength of 0.125 leaves every chunk a weight
    strength = 0.25 if scope == "microbatch" else 0.125
    rule = Rule(scope=scope, unit="chunk", weighting="control_variate", strength=strength)  # type: ignore[arg-type]
    want = selection.select_tokens(*ascending, rule)
    got = triton_backend.select_tokens(*(x.to(device) for x in ascending), rule)
    assert torch.equal(got.weight_BS.cpu() == 0, want.weight_BS == 0), "other tokens have weight"
    assert torch.allclose(got.weight_BS.cpu(), want.weight_BS, rtol=0, atol=1e-6), "other weights"
    assert same(got.guide_BS, want.guide_BS), "another guide"
    assert torch.allclose(got.stats.cpu(), want.stats, rtol=1e-6), "other sums"
    return {"tokens": want.weight_BS.numel(), "weight": float(want.weight_BS.sum())}


# ---------------------------------------------------------------- equal bits, no waiting


def _check_bits(task: Task, device: torch.device, triton_backend: Any) -> None:
    again = 1 if task.rehearse else 50
    x = factors(*(TINY_SHAPES if task.rehearse else SHAPES)[1], torch.float16, device)
    inputs = [y.to(device) for y in _batch(*(TINY_BATCHES if task.rehearse else BATCHES)[0], torch.float32)]

    def selected(scope: str) -> list[Tensor]:
        got = triton_backend.select_tokens(*inputs, Rule(scope=scope))  # type: ignore[arg-type]
        return list(vars(got).values())

    for case, compute in (
        ("token_loss and its gradients", lambda: losses_and_gradients(x, 10.0)),
        ("selection, microbatch", lambda: selected("microbatch")),
        ("selection, sequence", lambda: selected("sequence")),
    ):
        _attempt(task, f"equal bits: {case}", lambda compute=compute: _equal_bits(compute, again))  # type: ignore[misc]


def _equal_bits(compute: Callable[[], Any], again: int) -> dict[str, float]:
    first = [x.contiguous().view(torch.uint8) for x in compute()]
    for _ in range(again):
        for left, right in zip(first, compute(), strict=True):
            assert torch.equal(left, right.contiguous().view(torch.uint8)), "equal inputs gave other bits"
    return {"repetitions": again}


def _check_waiting(task: Task, device: torch.device) -> None:
    for scope in ("sequence", "microbatch"):
        _attempt(task, f"a guided pass does not wait for the device, {scope}", lambda scope=scope: _waits(device, scope))  # type: ignore[misc]


def _waits(device: torch.device, scope: str) -> dict[str, float]:
    results = gradients_without_waiting(factors(1024, 256, 5003, torch.bfloat16, device), scope)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in results[0]), "gradients of 0 or NaN"
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True)), "equal inputs gave other bits"
    return {"passes": len(results)}
