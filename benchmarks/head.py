"""Measure a loss per token on a CPU, from hidden states and the output head, as ratios to dense logits within one run.

    python -m benchmarks.head [--write]      the table; --write puts it into docs/performance/appendix.md
    python -m benchmarks.head --quick        small heads: checks that it runs

| relative to dense `F.cross_entropy((x @ W.T).float())`                    | time                 | peak memory          |
|---------------------------------------------------------------------------|----------------------|----------------------|
| student, forward and backward, 40 % of the tokens in the backward, float32: |                    |                      |
| (N, H, V) = (1024, 512, 32k), (512, 2048, 32k), (2048, 256, 152k)         | ≤ 0.60, ≤ 0.72, ≤ 0.55 | ≤ 0.25, ≤ 0.85, ≤ 0.06 |
| the same, all tokens in the backward                                      | ≤ 1.15               | ≤ 1.3 times those    |
| bfloat16, (1024, 512, 32k), 40 %                                          | ≤ 0.60               | ≤ 0.20               |
| teacher, forward only, (512, 512, 152k)                                   | ≤ 0.95               | ≤ 0.05               |

The tokens of highest loss enter the backward. They are selected after the forward, as in training. Two other implementations
run in the same process: torch's chunked linear cross-entropy, and the chunk order of Liger's loss written in torch, because
Liger's own loss does not run on CPUs. `benchmarks.head_arms` has the code.

Time is CPU time, user and system, on one thread. All arms take turns in one process, and a ratio is the median of the rounds'
ratios. Peak memory is the growth of VmHWM over the inputs, gradients included, in a separate process per arm. The exit status
is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from statistics import median

import torch

from benchmarks import step_memory
from benchmarks.head_arms import Loss, dense, dense_as_is, ours, row_chunks, torch_chunked
from benchmarks.page import APPENDIX, GOALS, Figure, circumstances, markdown, show, write_section
from megatron_vocagno.command import Parser, run_command

ROUNDS = 5
ARMS: dict[str, Loss] = {"dense": dense, "ours": ours, "rows": row_chunks, "torch": torch_chunked, "as is": dense_as_is}
PEERS = {"rows": "row chunks in Liger's order", "torch": "torch's linear_cross_entropy", "as is": "dense, logits not upcast"}


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    size: int
    vocabulary: int
    keep: float | None
    """Share of the tokens in the backward. None runs the forward only."""
    most_time: float
    most_memory: float
    dtype: torch.dtype = torch.float32
    peers: tuple[str, ...] = ("rows", "torch")


CASES = [
    Case("student (1024, 512, 32k), 40 %", 1024, 512, 32_000, 0.4, 0.60, 0.25),
    Case("student (512, 2048, 32k), 40 %", 512, 2048, 32_000, 0.4, 0.72, 0.85),
    Case("student (2048, 256, 152k), 40 %", 2048, 256, 151_936, 0.4, 0.55, 0.06, peers=("rows",)),
    Case("student (1024, 512, 32k), all", 1024, 512, 32_000, 1.0, 1.15, 1.3 * 0.25, peers=("rows",)),
    Case("student (512, 2048, 32k), all", 512, 2048, 32_000, 1.0, 1.15, 1.3 * 0.85, peers=("rows",)),
    Case("student (2048, 256, 152k), all", 2048, 256, 151_936, 1.0, 1.15, 1.3 * 0.06, peers=()),
    Case(
        "student bfloat16 (1024, 512, 32k), 40 %", 1024, 512, 32_000, 0.4, 0.60, 0.20, torch.bfloat16, ("rows", "torch", "as is")
    ),
    Case("teacher (512, 512, 152k), forward", 512, 512, 151_936, None, 0.95, 0.05),
]


class Head:
    """The inputs of a case, and its step in any of the ARMS."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.keep = case.keep
        learns = case.keep is not None
        self.hidden = torch.randn(case.tokens, case.size).to(case.dtype).requires_grad_(learns)
        # logits of scale 3, like those of a trained model
        self.head = (torch.randn(case.vocabulary, case.size) * 3 * case.size**-0.5).to(case.dtype).requires_grad_(learns)
        self.target = torch.randint(0, case.vocabulary, (case.tokens,))

    def step(self, arm: str) -> None:
        self.hidden.grad = self.head.grad = None
        with torch.set_grad_enabled(self.keep is not None):
            loss_N = ARMS[arm](self.hidden, self.head, self.target)
        if self.keep is not None:
            kept = int(len(loss_N) * self.keep)
            learned = loss_N.detach().float().topk(kept).indices
            weight_N = torch.zeros(len(loss_N)).index_fill_(0, learned, 1 / kept)
            (loss_N * weight_N).sum().backward()


def times(case: Case, rounds: int) -> dict[str, list[float]]:
    """CPU seconds per round of each arm."""
    torch.set_num_threads(1)
    head, arms = Head(case), ["dense", "ours", *case.peers]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms:
            if arm in case.peers and turn != rounds:  # once, because some take ten times as long
                continue
            begin = time.process_time()
            head.step(arm)
            if turn:  # the first round is a warm-up
                seconds[arm].append(time.process_time() - begin)
    return seconds


def growth(case: Case, arm: str) -> int:
    """Peak bytes that a step adds to its inputs."""
    torch.set_num_threads(1)
    head = Head(replace(case, tokens=16))
    head.step(arm)  # allocations that libraries make once
    head = Head(case)
    before = step_memory.start()
    head.step(arm)
    return step_memory.peak() - before


def measure(case: Case, rounds: int) -> list[Figure]:
    seconds = in_new_process(times, case, rounds)
    memory = {arm: in_new_process(growth, case, arm) for arm in seconds}

    def ratio(arm: str) -> float:
        paired = seconds["dense"][-len(seconds[arm]) :]
        return median(a / b for a, b in zip(seconds[arm], paired, strict=True))

    time_ratio, memory_ratio = ratio("ours"), memory["ours"] / memory["dense"]
    figures = [
        Figure(
            f"{case.name}: time",
            f"{time_ratio:.2f} × (dense {median(seconds['dense']):.2f} s)",
            f"≤ {case.most_time:.2f} ×",
            time_ratio <= case.most_time,
        ),
        Figure(
            f"{case.name}: memory",
            f"{memory_ratio:.3f} × (dense {memory['dense'] / 1e6:.0f} MB)",
            f"≤ {case.most_memory:.2f} ×",
            memory_ratio <= case.most_memory,
        ),
    ]
    for arm in case.peers:
        figures.append(Figure(f"– {PEERS[arm]}", f"{ratio(arm):.2f} ×, memory {memory[arm] / memory['dense']:.2f} ×"))
    return figures


def in_new_process(function, *arguments):  # type: ignore[no-untyped-def]
    """Result of the function, called in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.head",
        "",
        "Measure a loss per token on a CPU, from hidden states and the output head, relative to dense logits.",
        "python -m benchmarks.head --write",
        GOALS,
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance/appendix.md")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the vocabulary, one round")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    figures: list[Figure] = []
    for case in CASES:
        if args.quick:
            case = replace(case, vocabulary=case.vocabulary // 100, tokens=case.tokens // 8)
        figures += measure(case, 1 if args.quick else ROUNDS)
        show(figures)
    if args.write:
        write_section("head", section(figures), APPENDIX)
    return int(any(figure.met is False for figure in figures))


TEXT = """Ratios are relative to dense logits that are upcast to float32.
A case is (N tokens, H hidden size, V vocabulary) and the share of tokens in the backward.
Times are CPU time on one thread.
Lines with a dash are other implementations in the same run."""


def section(figures: Sequence[Figure]) -> str:
    return f"`python -m benchmarks.head`, {circumstances('torch')}\n\n{TEXT}\n\n{markdown(figures)}"


if __name__ == "__main__":
    sys.exit(main())
