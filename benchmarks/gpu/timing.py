"""Time and memory of arms that take turns, and the share of the roofline that an arm reaches.

Times are those of CUDA events, or of a clock on a CPU. A time is the median of the rounds. Memory is the peak of the allocator
minus the memory that was allocated before. The minimum time of an arm is that of its FLOPs (products of 16 bits) or bytes
(requested by its kernels, with no cache between them), whichever is longer, at the rates of the card.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from benchmarks.gpu.record import Task

WARM_UP, ROUNDS = 3, 21
"""Rounds of a group: three as a warm-up, then 21, or as many as its seconds allow, at least one."""
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Chip:
    """FLOPs per second of dense 16-bit products, bytes per second of memory."""

    flops: float
    bytes: float


CHIPS = {
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.04e12),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3.35e12),
    "NVIDIA H200": Chip(989e12, 4.8e12),
    "NVIDIA B200": Chip(2250e12, 8.0e12),
    "NVIDIA L40S": Chip(362e12, 0.864e12),
    "AMD Instinct MI300X": Chip(1307e12, 5.3e12),
}
"""Data sheet rates, by the full name, because other variants of a chip have other rates."""


@dataclass(frozen=True)
class Rates:
    """The two sources of a card's rates. None: the card is not in CHIPS, or its rates were not measured."""

    sheet: Chip | None
    measured: Chip | None

    @staticmethod
    def of(task: Task) -> Rates:
        """The rates of this card, measured by the part `ceilings`. None in a rehearsal."""
        if task.rehearse:
            return Rates(None, None)
        best: dict[str, float] = {}
        for row in task.earlier("ceilings").rows:
            for name, value in row.numbers.items():
                best[name] = max(best.get(name, 0.0), value or 0.0)
        measured = Chip(1e12 * best["TFLOP/s"], 1e12 * best["TB/s"]) if {"TFLOP/s", "TB/s"} <= best.keys() else None
        return Rates(CHIPS.get(torch.cuda.get_device_name()), measured)

    def shares(self, work: Work, milliseconds: float) -> dict[str, float]:
        """The share of the roofline at each known pair of rates."""
        named = {"share of the measured roofline": self.measured, "share of the data sheet's": self.sheet}
        return {name: 1000 * work.seconds(chip) / milliseconds for name, chip in named.items() if chip}

    def mfu(self, flops_per_second: float) -> dict[str, float]:
        """Model FLOPs utilization at each known rate of products."""
        named = {"MFU": self.sheet, "MFU of the measured products": self.measured}
        return {name: flops_per_second / chip.flops for name, chip in named.items() if chip}


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """Minimum time: that of the FLOPs or of the bytes, whichever is longer."""
        return max(self.flops / chip.flops, self.bytes / chip.bytes)


@dataclass(frozen=True)
class Arm:
    name: str
    run: Callable[[], object]
    work: Work | None = None
    ours: bool = False
    """An error of this project's code fails the check. Errors of other libraries are results."""


@dataclass(frozen=True)
class Result:
    milliseconds: float
    memory: int
    """Bytes. 0 on a CPU, where it is not known."""


Results: TypeAlias = dict[str, Result | str]
"""By the name of the arm. Text: the reason why the arm has no result."""


def contest(arms: Sequence[Arm], device: torch.device, rounds: int = ROUNDS, seconds: float = 20.0) -> Results:
    """Run all arms in turn, round after round. An arm that raises an error leaves the contest."""
    results: Results = {}
    memory: dict[str, int] = {}
    for arm in arms:
        try:
            memory[arm.name] = peak_memory(arm.run, device)
        except Exception as error:
            results[arm.name] = reason(error)
    running = [arm for arm in arms if arm.name in memory]
    times: dict[str, list[float]] = {arm.name: [] for arm in running}
    until = time.perf_counter() + seconds
    for number in range(WARM_UP + rounds):
        for arm in running:
            milliseconds = timed(arm.run, device)
            if number >= WARM_UP:
                times[arm.name].append(milliseconds)
        if number >= WARM_UP and time.perf_counter() > until:
            break
    results |= {arm.name: Result(statistics.median(times[arm.name]), memory[arm.name]) for arm in running}
    return {arm.name: results[arm.name] for arm in arms}


def reason(error: Exception) -> str:
    """The text of an arm that has no result. If memory was exhausted, frees what the arm has left in the allocator's cache."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that the allocator adds while `run` runs. On a CPU it is not known, and 0 is returned."""
    if device.type == "cpu":
        run()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def report(task: Task, case: str, arms: Sequence[Arm], results: Results, rates: Rates) -> None:
    """A row per arm."""
    for arm in arms:
        result = results[arm.name]
        if isinstance(result, str):
            task.add(case, arm.name, result=result, failed=arm.ours and result != OUT_OF_MEMORY)
            continue
        numbers = {"ms": result.milliseconds} | ({"GiB": result.memory / 2**30} if task.device != "cpu" else {})
        if arm.work:
            numbers |= {"TFLOP": arm.work.flops / 1e12, "GB": arm.work.bytes / 1e9}
            numbers |= rates.shares(arm.work, result.milliseconds)
        task.add(case, arm.name, numbers)
