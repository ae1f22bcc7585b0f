"""Benchmark the objective on a GPU: the output heads of TinyLlama and of a 7B Qwen, forward and backward, and the selection.

    python -m benchmarks.gpu [--write] [--dry-run]

The arms of a group take turns, round after round, and are timed by CUDA events. A time is the median of its rounds. Memory is
the peak of the allocator minus what was allocated before. The share of the roofline is the minimum time of an arm divided by
its measured time. The minimum time is that of the arm's own FLOPs (products of 16 bits) or bytes (requested by its kernels,
with no cache between them) at the GPU's data sheet rates, whichever is longer. An arm of another library has no such share. An
arm that does not fit into memory is reported as out of memory. The complete benchmark takes less than ten minutes.

--write    puts the tables into docs/performance.md
--dry-run  tiny shapes on the CPU, to check that everything runs; the times are meaningless
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks import selection_arms as selection
from benchmarks.head_arms import Loss, dense, torch_chunked
from benchmarks.page import PAGE, circumstances, write_section
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.objective.linear_ce import GPU_TILE_BYTES, SelectedTokens, token_loss

WARM_UP, ROUNDS, SECONDS = 3, 21, 20.0
"""Rounds of a group: three as a warm-up, then 21, or as many as fit into 20 seconds."""
KEPT = 0.4


@dataclass(frozen=True)
class Chip:
    """Data sheet rates: FLOPs per second of dense 16-bit products, bytes per second of memory."""

    flops: float
    bytes: float


CHIPS = {
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.04e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 3.35e12),
    "NVIDIA H200": Chip(989e12, 4.8e12),
    "NVIDIA B200": Chip(2250e12, 8.0e12),
    "AMD Instinct MI300X": Chip(1307e12, 5.3e12),
}
"""By the full name, because other variants of a chip have other rates. A GPU that is not listed gets no share of the roofline."""


@dataclass(frozen=True)
class Head:
    name: str
    tokens: int
    size: int
    vocabulary: int

    @property
    def product(self) -> float:
        """FLOPs of hidden @ head^T."""
        return 2.0 * self.tokens * self.size * self.vocabulary


HEADS = (Head("TinyLlama", 16_384, 2048, 32_000), Head("Qwen2.5-Math-7B", 16_384, 3584, 152_064))
TINY = (Head("tiny", 64, 16, 300),)


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """Minimum time: that of the FLOPs or of the bytes, whichever is longer."""
        return max(self.flops / chip.flops, self.bytes / chip.bytes)


def tiles_work(head: Head, kept: float | None, itemsize: int = 2) -> Work:
    """Work of this project's tiles. `kept` is the share of tokens in the backward, or None for a forward only.

    Forward: one product. Its float32 tiles are written and read once, and it reads all hidden states for each tile.

    Backward, for the kept tokens: the same product again, then the gradient of each tile, which is written once and read by two
    products. The gradient of the head is written once. The gradient of the hidden states is a float32 product per tile: it is
    written, and read again to be added to the sum, which is read and written.
    """
    n, h, v = head.tokens, head.size, head.vocabulary
    forward = _tiles(n, v) * itemsize * n * h + itemsize * v * h + 8 * n * v
    if kept is None:
        return Work(head.product, forward)
    rows = kept * n
    backward = _tiles(rows, v) * (2 * itemsize + 4 * 4) * rows * h + 3 * itemsize * v * h + (8 + 3 * itemsize) * rows * v
    return Work((1 + 3 * kept) * head.product, forward + backward)


def _tiles(rows: float, vocabulary: int) -> int:
    return math.ceil(vocabulary * rows * 4 / GPU_TILE_BYTES)


def dense_work(head: Head, learns: bool, itemsize: int = 2) -> Work:
    """Work of dense logits: 16-bit and float32 logits, their log-softmax, and in the backward a gradient of each of the three."""
    n, h, v = head.tokens, head.size, head.vocabulary
    forward = itemsize * (n + v) * h + (2 * itemsize + 3 * 4) * n * v
    if not learns:
        return Work(head.product, forward)
    return Work(3 * head.product, forward + (5 * 4 + 3 * itemsize) * n * v + itemsize * (2 * n + 2 * v) * h)


@dataclass(frozen=True)
class Arm:
    name: str
    run: Callable[[], object]
    work: Work | None = None


@dataclass(frozen=True)
class Result:
    milliseconds: float
    memory: int
    """Bytes."""


Results: TypeAlias = dict[str, Result | None]
"""By the name of the arm. None if it did not fit into memory."""


def contest(arms: Sequence[Arm], device: torch.device, rounds: int) -> Results:
    """Run all arms in turn, round after round."""
    memory: dict[str, int] = {}
    for arm in arms:
        try:
            memory[arm.name] = _memory(arm.run, device)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    fitting = [arm for arm in arms if arm.name in memory]
    times: dict[str, list[float]] = {arm.name: [] for arm in fitting}
    until = time.perf_counter() + SECONDS
    for number in range(WARM_UP + rounds):
        for arm in fitting:
            milliseconds = _milliseconds(arm.run, device)
            if number >= WARM_UP:
                times[arm.name].append(milliseconds)
        if number > WARM_UP and time.perf_counter() > until:
            break
    return {arm.name: Result(statistics.median(times[arm.name]), memory[arm.name]) if arm in fitting else None for arm in arms}


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
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


def _memory(run: Callable[[], object], device: torch.device) -> int:
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


# ---------------------------------------------------------------- the arms


def head_arms(head: Head, device: torch.device) -> tuple[list[Arm], list[Arm]]:
    """(arms with forward and backward, arms with a forward only), in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(head.tokens, head.size, **draw).requires_grad_()  # type: ignore[call-overload]
    weight = (torch.randn(head.vocabulary, head.size, **draw) * head.size**-0.5).requires_grad_()  # type: ignore[call-overload]
    target = torch.randint(0, head.vocabulary, (head.tokens,), generator=generator, device=device)
    order = torch.rand(head.tokens, generator=generator, device=device).argsort()
    kept_rows = order[: round(KEPT * head.tokens)].sort().values
    kept = torch.zeros(head.tokens, device=device).index_fill_(0, kept_rows, 1.0 / len(kept_rows))
    every = torch.full_like(kept, 1.0 / head.tokens)

    def ours(gradient: Tensor, learned: Tensor) -> None:
        selected = SelectedTokens()
        loss = token_loss(hidden, weight, target, selected=selected)
        selected.set(learned)
        torch.autograd.grad(loss, (hidden, weight), gradient)

    def learn(loss: Loss) -> None:
        torch.autograd.grad((loss(hidden, weight, target).float() * kept).sum(), (hidden, weight))

    @torch.no_grad()
    def score(loss: Loss) -> None:
        loss(hidden, weight, target)

    learning = [
        Arm(f"ours, {KEPT:.0%} kept", lambda: ours(kept, kept_rows), tiles_work(head, KEPT)),
        Arm("ours, 100% kept", lambda: ours(every, torch.arange(head.tokens, device=device)), tiles_work(head, 1.0)),
        Arm("F.cross_entropy, dense float32 logits", lambda: learn(dense), dense_work(head, learns=True)),
        Arm("F.linear_cross_entropy", lambda: learn(torch_chunked)),
    ]
    scoring = [
        Arm("ours", lambda: score(token_loss), tiles_work(head, None)),
        Arm("F.cross_entropy, dense float32 logits", lambda: score(dense), dense_work(head, learns=False)),
        Arm("F.linear_cross_entropy", lambda: score(torch_chunked)),
    ]
    if device.type != "cpu" and (liger := _liger()) is not None:
        learning.append(Arm(f"Liger {version('liger-kernel')}", lambda: learn(liger)))
    return learning, scoring


def _liger() -> Loss | None:
    """Liger's loss, or None if Liger is not installed. `run` reports that."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found: Tensor = loss(weight, hidden, target)
        return found

    return run


def selection_arms(device: torch.device) -> list[Arm]:
    """The arms of benchmarks.selection_arms, with the aggregate `max`."""
    x = selection.Inputs(*(getattr(selection.inputs(), field.name).to(device) for field in fields(selection.Inputs)))
    least = sum(getattr(x, field.name).nbytes for field in fields(x)) + x.student_BS.numel() * (4 + 4 + 8)

    def arm(run: selection.Arm, scope: str) -> Callable[[], object]:
        def on_device() -> object:
            with device:  # the naive arm creates tensors on it
                return run(x, "max", scope)

        return on_device

    return [
        Arm("ours, microbatch", arm(selection.ours, "microbatch"), Work(0.0, float(least))),
        Arm("topk and gather, microbatch", arm(selection.padded, "microbatch")),
        Arm("ours, sequence", arm(selection.ours, "sequence"), Work(0.0, float(least))),
        Arm("topk and gather, sequence", arm(selection.padded, "sequence")),
    ]


# ---------------------------------------------------------------- the page


def table(title: str, results: Results, arms: Sequence[Arm], chip: Chip | None) -> str:
    lines = [f"**{title}**", "", "| | ms | GiB | TFLOP | GB moved | share of the roofline |", "|---|---|---|---|---|---|"]
    for arm in arms:
        work, result = arm.work, results[arm.name]
        counted = f"{work.flops / 1e12:.2f} | {work.bytes / 1e9:.2f}" if work else " | "
        if result is None:
            lines.append(f"| {arm.name} | out of memory | | {counted} | |")
            continue
        share = f"{1000 * work.seconds(chip) / result.milliseconds:.0%}" if work and chip else ""
        lines.append(f"| {arm.name} | {result.milliseconds:.3f} | {result.memory / 2**30:.2f} | {counted} | {share} |")
    return "\n".join(lines)


def measure(device: torch.device, heads: Sequence[Head], chip: Chip | None, rounds: int = ROUNDS) -> str:
    """All tables, as Markdown."""
    tables = []
    for head in heads:
        shape = f"{head.name}: N {head.tokens:,}, H {head.size:,}, V {head.vocabulary:,}, bfloat16"
        for what, arms in zip(("forward and backward", "forward only"), head_arms(head, device), strict=True):
            tables.append(table(f"{shape}, {what}", contest(arms, device, rounds), arms, chip))
    arms = selection_arms(device)
    tables.append(table(f"selection of {selection.ROWS} x {selection.WIDTH:,} tokens", contest(arms, device, rounds), arms, chip))
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.gpu",
        "",
        "Benchmark the objective on a GPU, in time and memory, against other libraries. Takes 10 minutes.",
        "python -m benchmarks.gpu --dry-run",
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if options.dry_run:
        print(measure(torch.device("cpu"), TINY, None, rounds=2), "\n\nA dry run on a CPU: these times are meaningless.", sep="")
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no GPU was found (torch.cuda.is_available() is False), so nothing was measured")
    name = torch.cuda.get_device_name()
    parts = [f"`python -m benchmarks.gpu`, {name}; {circumstances('torch', 'triton')}"]
    if _liger() is None:
        parts.append("Liger is not installed, so the tables leave it out. To include it, run `pip install liger-kernel`.")
    text = "\n\n".join([*parts, measure(torch.device("cuda"), HEADS, CHIPS.get(name))])
    print(text)
    if options.write:
        write_section("measured", text, PAGE)


if __name__ == "__main__":
    sys.exit(main())
