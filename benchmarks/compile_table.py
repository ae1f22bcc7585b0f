"""Compile every kernel for four GPUs, and list registers, spills and shared memory. No GPU is needed.

    python -m benchmarks.compile_table [--write]

--write puts the table into docs/performance/appendix.md. The cases call the functions that training calls, with the shapes of
TinyLlama's head at 16,384 tokens. Each kernel is also compiled for odd shapes, because the compiler specializes on sizes that
are divisible by 16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import chain
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.offline import TARGETS, Launch, compiled_for
from benchmarks.page import APPENDIX as PAGE
from benchmarks.page import write_section
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.objective.rule import Aggregate, Rule, Weighting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AGGREGATES: tuple[Aggregate, ...] = ("max", "mean", "sum", "min")
N, T = 16_384, 4096


def linear_ce_cases() -> Iterator[str]:
    """Launch one kernel per case, then yield the name of the case."""
    from megatron_vocagno.objective.linear_ce_triton import dlogits_tile, update_online_softmax

    for tokens, width, softcap, name in ((N, T, None, ""), (N, T, 30.0, ", softcap"), (N - 1, T - 7, 30.0, ", odd, softcap")):
        target, (max_, sum_, third) = _empty(tokens, dtype=torch.int64), (_empty(tokens) for _ in range(3))
        update_online_softmax(_empty(tokens, width), T, target, max_, sum_, third, softcap)
        yield f"float32{name}"
        for dtype in DTYPES:
            out = _empty(tokens, width, dtype=dtype)
            dlogits_tile(_empty(tokens, width), T, target, max_, sum_, third, softcap, out)
            yield f"to {_name(dtype)}{name}"


def selection_cases(lanes: int) -> Iterator[str]:
    from megatron_vocagno.objective import selection_triton
    from megatron_vocagno.objective.selection_triton import select_tokens

    selection_triton.LANES = lanes
    for scope, batch, aggregates, name in (
        ("microbatch", (8, 2048), AGGREGATES, ""),
        ("microbatch", (7, 2047), AGGREGATES[:1], "odd"),
        ("microbatch", (8, 4096), AGGREGATES[:1], "32,768 tokens"),
        ("microbatch", (16, 4096), AGGREGATES[:1], "65,536 tokens"),
        ("microbatch", (15, 4095), AGGREGATES[:1], "odd, 61,425 tokens"),
        ("sequence", (8, 2048), AGGREGATES[:2], "rows of 2,048"),
        ("sequence", (7, 2047), AGGREGATES[:1], "odd, rows of 2,047"),
        ("sequence", (1, 32_768), AGGREGATES[:1], "rows of 32,768"),
    ):
        rows, width = batch
        for aggregate in aggregates:
            for unmapped, positive in (("include", False), ("exclude", True)) if aggregate == "max" else (("include", False),):
                rule = Rule(0.4, aggregate, scope, unmapped, positive)  # type: ignore[arg-type]
                select_tokens(*_selection_inputs(rows, width), rule)
                yield ", ".join(filter(None, (name, aggregate, unmapped, "require_positive" if positive else "")))
    for scope, (rows, width) in (("microbatch", (8, 2048)), ("microbatch", (15, 4095)), ("sequence", (7, 2047))):
        for weighting in get_args(Weighting):
            for strength in (0.25, 0.125) if weighting == "control_variate" else (0.25,):
                rule = Rule(scope=scope, unit="chunk", weighting=weighting, strength=strength)  # type: ignore[arg-type]
                select_tokens(*_selection_inputs(rows, width), rule)
                yield f"{'odd, ' if width % 16 else ''}{rows} rows of {width:,}, chunks, {weighting}, strength {strength}"


def launches_for(target: str) -> list[tuple[str, Launch]]:
    """Compile all cases for a target; returns (case, launch) pairs.

    Call this in a separate process, because the folder of Triton's cache is set in the environment.
    """
    found = []
    with TemporaryDirectory() as cache, FakeTensorMode(), compiled_for(target) as launches:
        os.environ["TRITON_CACHE_DIR"] = cache
        for case in chain(linear_ce_cases(), selection_cases(TARGETS[target].warp_size)):
            found += [(case, launch) for launch in launches]
            launches.clear()
    return found


def all_launches(targets: Iterable[str] = TARGETS) -> list[tuple[str, Launch]]:
    """(case, launch) pairs of all targets, one target after another. Compiles in two processes."""
    os.environ.pop("TRITON_INTERPRET", None)  # a new process reads it when it defines a kernel
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return [found for of_target in pool.map(launches_for, targets) for found in of_target]


def table(found: Sequence[tuple[str, Launch]]) -> str:
    """A line per kernel and case: warps, registers per thread, shared memory, spilled bytes. A repeated line is left out."""
    row_of: dict[tuple[str, str, int], list[str]] = {}
    nth: Counter[tuple[str, str, str]] = Counter()
    for case, launch in found:  # one target after another, each with the same launches
        case = ", ".join([case, *(f"{name} {value}" for name, value in launch.bits)])
        here = (launch.kernel, case, launch.target)
        spilled = f", **{launch.spilled} B spilled**" if launch.spilled else ""
        cell = f"{launch.warps} × {launch.registers}, {_size(launch.shared)}{spilled}"
        row_of.setdefault((launch.kernel, case, nth[here]), []).append(cell)
        nth[here] += 1
    first_case: dict[tuple[str, ...], str] = {}
    for (kernel, case, _), row in row_of.items():
        first_case.setdefault((kernel, *row), case)
    lines = [f"| kernel | case | {' | '.join(TARGETS)} |", "|---" * (2 + len(TARGETS)) + "|"]
    for (kernel, *row), case in sorted(first_case.items(), key=lambda item: item[0][0]):
        lines.append(f"| `{kernel}` | {case} | {' | '.join(row)} |")
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} B"


def _selection_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    span_BS = _empty(rows, width, dtype=torch.int32)
    return _empty(rows, width), _empty(rows, 2 * width), span_BS, span_BS, _empty(rows, width, dtype=torch.bool)


def _empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.compile_table",
        "",
        "Compile every kernel for four GPUs, and list registers, spills and shared memory. No GPU is needed.",
        "python -m benchmarks.compile_table --write",
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance/appendix.md")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    text = table(all_launches())
    print(text)
    if options.write:
        write_section("compiled", f"`python -m benchmarks.compile_table --write`, Triton {version('triton')}.\n\n{text}", PAGE)


if __name__ == "__main__":
    sys.exit(main())
