"""Measure the selection of tokens on a CPU, relative to direct implementations of the paper's method.

    python -m benchmarks.selection            prints a table
    python -m benchmarks.selection --write    also writes it into docs/performance/appendix.md

The input is 16,384 tokens: 8 rows of 2,048, with 2.15 teacher tokens per student token and ranges of 0 to 14. All arms compute
weights, the list of the tokens that have weight, and the sums that a run logs.

- `select_tokens`: objective/selection.py
- `padded`: pads ranges to the widest, [B, S, W]; then reduction, `topk`, masks
- `segments`: concatenates the losses of the ranges; then `segment_reduce`, `topk`, masks

Operations are those that a TorchDispatchMode counts, without views and scalars. On a GPU, each would be at least one launch.
Bytes are those of the operations' tensors, read and written once. Arms are timed in turns on one thread. The table shows
medians, and the median of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.page import APPENDIX, circumstances, write_section
from megatron_vocagno.command import Parser, positive_int, run_command
from megatron_vocagno.objective.ranking import kept_count
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import select_tokens

ROWS, WIDTH, RATIO = 8, 2048, 2.15
KEEP = 0.4
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


@dataclass(frozen=True)
class Inputs:
    student_BS: Tensor
    teacher_BU: Tensor
    first_BS: Tensor
    last_BS: Tensor
    valid_BS: Tensor


Arm = Callable[[Inputs, str, str], tuple[Tensor, Tensor]]
"""(inputs, aggregate, scope) -> (weights, rows)"""


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


def inputs() -> Inputs:
    """Losses like those of two models: small for most tokens, and similar in both. 5 % are unmapped, and 5 % are padding."""
    generator = torch.Generator().manual_seed(0)
    width = int(WIDTH * RATIO)
    shares = torch.tensor([5, 34, 27, 18, 9, 4, 2, 1, 1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    length_BS = torch.multinomial(shares, ROWS * WIDTH, replacement=True, generator=generator).view(ROWS, WIDTH)
    first_BS = (torch.arange(WIDTH) * RATIO).long().clamp(max=width - len(shares)).expand(ROWS, WIDTH)
    teacher_BU = torch.empty(ROWS, width).exponential_(0.4, generator=generator)
    student_BS = teacher_BU.gather(1, first_BS) * torch.rand(ROWS, WIDTH, generator=generator) * 2
    valid_BS = torch.rand(ROWS, WIDTH, generator=generator) < 0.95
    return Inputs(student_BS, teacher_BU, first_BS.int(), (first_BS + length_BS).int(), valid_BS)


# ---------------------------------------------------------------- arms


def ours(x: Inputs, aggregate: str, scope: str) -> tuple[Tensor, Tensor]:
    rule = Rule(KEEP, aggregate, scope)  # type: ignore[arg-type]
    selection = select_tokens(x.student_BS, x.teacher_BU, x.first_BS, x.last_BS, x.valid_BS, rule)
    return selection.weight_BS, selection.tokens_C


def padded(x: Inputs, aggregate: str, scope: str) -> tuple[Tensor, Tensor]:
    length_BS = x.last_BS - x.first_BS
    step_W = torch.arange(int(length_BS.max()))
    at_BSW = (x.first_BS[:, :, None] + step_W).clamp(max=x.teacher_BU.shape[1] - 1)
    inside_BSW = step_W < length_BS[:, :, None]
    loss_BSW = x.teacher_BU[:, None].expand(-1, WIDTH, -1).gather(2, at_BSW)
    if aggregate == "max":
        guide_BS = loss_BSW.masked_fill(~inside_BSW, -torch.inf).amax(2)
    elif aggregate == "min":
        guide_BS = loss_BSW.masked_fill(~inside_BSW, torch.inf).amin(2)
    else:
        guide_BS = loss_BSW.masked_fill(~inside_BSW, 0.0).sum(2)
    if aggregate == "mean":
        guide_BS = guide_BS / length_BS
    return choose(x, guide_BS, scope)


def segments(x: Inputs, aggregate: str, scope: str) -> tuple[Tensor, Tensor]:
    length_N = (x.last_BS - x.first_BS).flatten().long()
    row_N = torch.arange(ROWS).repeat_interleave(WIDTH) * x.teacher_BU.shape[1]
    begin_N = x.first_BS.flatten() + row_N - (length_N.cumsum(0) - length_N)
    at = begin_N.repeat_interleave(length_N) + torch.arange(int(length_N.sum()))
    guide_N = torch.segment_reduce(x.teacher_BU.flatten()[at], aggregate, lengths=length_N)
    return choose(x, guide_N.view_as(x.student_BS), scope)


def choose(x: Inputs, guide_BS: Tensor, scope: str) -> tuple[Tensor, Tensor]:
    mapped_BS = x.valid_BS & (x.last_BS > x.first_BS)
    unmapped_BS = x.valid_BS & ~mapped_BS
    excess_BS = (x.student_BS - guide_BS).masked_fill(~mapped_BS, -torch.inf)
    kept_BS = torch.zeros_like(mapped_BS)
    groups = zip(excess_BS, mapped_BS, kept_BS, strict=True) if scope == "sequence" else [(excess_BS, mapped_BS, kept_BS)]
    thresholds = []
    for excess, mapped, kept in groups:
        values, chosen = excess.flatten().topk(kept_count(int(mapped.sum()), KEEP))
        kept.view(-1)[chosen] = True
        thresholds.append(values[-1])
    weight_BS = (kept_BS | unmapped_BS).float()
    log(x, guide_BS, mapped_BS, unmapped_BS, kept_BS, torch.stack(thresholds))
    return weight_BS, weight_BS.flatten().nonzero().squeeze(1)


def log(x: Inputs, guide_BS: Tensor, mapped_BS: Tensor, unmapped_BS: Tensor, kept_BS: Tensor, thresholds: Tensor) -> Tensor:
    """Compute the same sums as statistics.STATS."""
    dropped_BS, finite_BS = mapped_BS & ~kept_BS, x.student_BS.isfinite()
    sums = [mask.sum() for mask in (x.valid_BS, x.valid_BS & ~finite_BS, mapped_BS, kept_BS, unmapped_BS)]
    for loss_BS, mask in (
        (x.student_BS, kept_BS),
        (x.student_BS, dropped_BS),
        (x.student_BS, unmapped_BS),
        (guide_BS, kept_BS),
        (guide_BS, dropped_BS),
    ):
        sums.append(loss_BS[mask].sum(dtype=torch.float64))
    return torch.stack([x.double() for x in (*sums, thresholds.sum())])


if __name__ == "__main__":
    sys.exit(main())
