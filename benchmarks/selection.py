"""Measure the selection of tokens on a CPU, relative to direct implementations of the paper's method.

    python -m benchmarks.selection            prints a table
    python -m benchmarks.selection --write    also writes it into docs/performance/appendix.md

`benchmarks/selection_arms.py` has the input, 16,384 tokens, and the arms.

Operations are those that a TorchDispatchMode counts, without views and scalars. On a GPU, each would be at least one launch.
Bytes are those of the operations' tensors, read and written once. Arms are timed in turns on one thread. The table shows
medians, and the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.page import APPENDIX, circumstances, write_section
from benchmarks.selection_arms import Inputs, inputs, ours, padded, segments
from megatron_vocagno.command import Parser, positive_int, run_command

ROUNDS, WARM_UP = 60, 5
# operations that move no data: views, and scalars from or to Python
FREE = {
    "view",
    "_unsafe_view",
    "select",
    "slice",
    "expand",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "unbind",
    "split",
}
FREE |= {"_local_scalar_dense", "scalar_tensor", "lift_fresh"}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.selection",
        "",
        "Measure the selection of tokens on a CPU: operations, bytes and time, relative to direct implementations.",
        "python -m benchmarks.selection --write",
    )
    parser.add_argument("--rounds", type=positive_int, default=ROUNDS, metavar="N", help=f"timed turns (default: {ROUNDS})")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance/appendix.md")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    x = inputs()
    lines = ["| scope, aggregate | arm | operations | MB moved | ms | relative time |", "|---|---|---|---|---|---|"]
    table = Table("scope, aggregate", "arm", "operations", "MB moved", "ms", "relative time", title="Selection, 16,384 tokens")
    for scope in ("microbatch", "sequence"):  # with one process, `global` is `microbatch`
        for aggregate in ("max", "mean", "sum", "min"):
            for cells in compare(x, aggregate, scope, arguments.rounds):
                table.add_row(*cells)
                lines.append(f"| {' | '.join(cells)} |")
    Console().print(table)
    if arguments.write:
        head = f"`python -m benchmarks.selection`, {circumstances('torch')}\n"
        write_section("selection", "\n".join([head, *lines]), APPENDIX)
    return 0


def compare(x: Inputs, aggregate: str, scope: str, rounds: int) -> list[list[str]]:
    """A line per arm. Raises AssertionError if the arms select different tokens."""
    arms = {"select_tokens": ours, "padded": padded, "segments": segments}
    chosen = {name: arm(x, aggregate, scope) for name, arm in arms.items()}
    if aggregate in ("max", "min"):  # a mean is rounded differently by each arm, so the last ranks may differ
        for weight_BS, tokens_C in chosen.values():
            assert torch.equal(weight_BS, chosen["padded"][0]) and torch.equal(tokens_C, chosen["padded"][1])
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(WARM_UP + rounds):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            arms[name](x, aggregate, scope)
            seconds[name].append(time.perf_counter() - begin)
    lines = []
    for name, arm in arms.items():
        with Counted() as counted:
            arm(x, aggregate, scope)
        own, mine = seconds[name][WARM_UP:], seconds["select_tokens"][WARM_UP:]
        ratio = median(a / b for a, b in zip(own, mine, strict=True))
        cells = f"{counted.operations}", f"{counted.bytes / 1e6:.1f}", f"{1e3 * median(own):.2f}", f"{ratio:.1f}"
        lines.append([f"{scope}, {aggregate}" if arm is ours else "", name, *cells])
    return lines


class Counted(TorchDispatchMode):
    """Count operations that move data, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in FREE:
            self.operations += 1
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        return result


if __name__ == "__main__":
    sys.exit(main())
