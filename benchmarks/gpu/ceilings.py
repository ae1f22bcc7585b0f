"""The rates that this card reaches: copies of memory, and products of bfloat16 with sums in float32."""

from __future__ import annotations

import torch

from benchmarks.gpu.record import Task
from benchmarks.gpu.timing import Arm, Result, contest

COPIED = (2**28, 2**30)
"""Bytes."""
PRODUCTS = ((4096, 4096, 4096), (8192, 8192, 8192), (16_384, 8192, 2048), (16_384, 3584, 18_944))
"""(rows, columns of the left factor, columns): squares, and products of the models."""


def run(task: Task) -> None:
    device = torch.device(task.device)
    groups = len(COPIED) + len(PRODUCTS)
    seconds = 0.8 * task.left / groups
    for size in (2**16,) if task.rehearse else COPIED:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        arm = Arm("copy", lambda target=target, source=source: target.copy_(source))  # type: ignore[misc]
        _report(task, f"copy {size / 2**30:.3g} GiB", arm, contest([arm], device, seconds=seconds)["copy"], "TB/s", 2 * size)
        del source, target, arm
    for rows, inner, columns in ((64, 64, 64),) if task.rehearse else PRODUCTS:
        left = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
        right = torch.randn(columns, inner, dtype=torch.bfloat16, device=device)
        arm = Arm("product", lambda left=left, right=right: left @ right.T)  # type: ignore[misc]
        result = contest([arm], device, seconds=seconds)["product"]
        case = f"product of bfloat16, {rows:,} x {inner:,} and {inner:,} x {columns:,}"
        _report(task, case, arm, result, "TFLOP/s", 2 * rows * inner * columns)
        del left, right, arm


def _report(task: Task, case: str, arm: Arm, result: Result | str, unit: str, amount: float) -> None:
    """amount: bytes or FLOPs."""
    if isinstance(result, str):
        task.add(case, result=result)
    else:
        task.add(case, "", {"ms": result.milliseconds, unit: amount / result.milliseconds * 1e3 / 1e12})
