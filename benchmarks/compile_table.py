"""Registers, spills and shared memory of every kernel on four GPUs, none of which need be there.

    python -m benchmarks.compile_table [--write]

--write puts the table into docs/kernels.md. The cases call the functions that training calls, with the shapes of TinyLlama's
head at 16,384 tokens and with ragged ones.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.offline import TARGETS, Launch, compiled_for
from benchmarks.page import write_section

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N, H, V, T = 16_384, 2048, 32_000, 4096


def linear_ce_cases() -> Iterator[str]:
    """Launches, and then says what was launched."""
    from megatron_vocagno.objective.linear_ce_triton import dlogits_tile, fold_tile, fused_softmax

    target, peak, total, picked = _empty(N, dtype=torch.int64), _empty(N), _empty(N), _empty(N)
    for width, softcap, name in ((T, None, ""), (T, 30.0, ", softcap"), (T - 7, None, ", ragged")):
        fold_tile(_empty(N, width), T, target, peak, total, picked, softcap)
        yield f"float32{name}"
        for dtype in DTYPES:
            dlogits_tile(_empty(N, width), T, target, peak, total, picked, softcap, _empty(N, width, dtype=dtype))
            yield f"to {_name(dtype)}{name}"
    for softcap, name in ((None, ""), (30.0, ", softcap")):
        for dtype in DTYPES:
            fused_softmax(_empty(N, H, dtype=dtype), _empty(V, H, dtype=dtype), target, softcap, 0)
            yield f"{_name(dtype)}{name}"


def selection_cases(lanes: int) -> Iterator[str]:
    from megatron_vocagno.objective import selection_triton
    from megatron_vocagno.objective.selection_triton import select_tokens

    selection_triton.LANES = lanes
    for scope, batch, name in (
        ("microbatch", (8, 2048), ""),
        ("microbatch", (8, 4096), "32,768 tokens"),
        ("microbatch", (16, 4096), "65,536 tokens"),
        ("sequence", (8, 2048), "rows of 2,048"),
        ("sequence", (1, 32_768), "rows of 32,768"),
    ):
        for aggregate in ("max", "mean", "sum", "min") if batch == (8, 2048) else ("max",):
            for unmapped, positive in (("include", False), ("exclude", True)) if aggregate == "max" else (("include", False),):
                select_tokens(
                    _empty(*batch),
                    _empty(batch[0], 2 * batch[1]),
                    _empty(*batch, dtype=torch.int32),
                    _empty(*batch, dtype=torch.int32),
                    _empty(*batch, dtype=torch.bool),
                    aggregate=aggregate,
                    keep=0.4,
                    scope=scope,
                    unmapped=unmapped,
                    require_positive=positive,
                )
                yield ", ".join(filter(None, (name, aggregate, unmapped)))


def launches_for(target: str) -> list[tuple[str, Launch]]:
    """(case, launch) of all cases, compiled anew. For a process of its own: the folder of Triton's cache is its environment's."""
    found = []
    with TemporaryDirectory() as cache, FakeTensorMode(), compiled_for(target) as launches:
        os.environ["TRITON_CACHE_DIR"] = cache
        for case in chain(linear_ce_cases(), selection_cases(TARGETS[target].warp_size)):
            found += [(case, launch) for launch in launches]
            launches.clear()
    return found


def all_launches() -> list[tuple[str, Launch]]:
    """Of all targets, in two processes."""
    os.environ.pop("TRITON_INTERPRET", None)  # read where a kernel is defined: in the processes that start here
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return [found for of_target in pool.map(launches_for, TARGETS) for found in of_target]


def table(found: Sequence[tuple[str, Launch]]) -> str:
    """A row for each kernel and case: warps, registers of a thread, shared memory, what was spilled. None is said twice."""
    row_of: dict[tuple[str, str, int], list[str]] = {}
    nth: Counter[tuple[str, str, str]] = Counter()
    for case, launch in found:  # one target after another, each with the same launches
        here = (launch.kernel, case, launch.target)
        spilled = f", **{launch.spilled} B spilled**" if launch.spilled else ""
        cell = f"{launch.warps} × {launch.registers}, {_size(launch.shared)}{spilled}"
        row_of.setdefault((launch.kernel, case, nth[here]), []).append(cell)
        nth[here] += 1
    said: dict[tuple[str, ...], str] = {}
    for (kernel, case, _), row in row_of.items():
        said.setdefault((kernel, *row), case)
    lines = [f"| kernel | case | {' | '.join(TARGETS)} |", "|---" * (2 + len(TARGETS)) + "|"]
    for (kernel, *row), case in sorted(said.items(), key=lambda item: item[0][0]):
        lines.append(f"| `{kernel}` | {case} | {' | '.join(row)} |")
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} B"


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    options = parser.parse_args(arguments)
    text = table(all_launches())
    print(text)
    if options.write:
        write_section("compiled", f"`python -m benchmarks.compile_table --write`, Triton {version('triton')}.\n\n{text}", PAGE)


if __name__ == "__main__":
    main()
