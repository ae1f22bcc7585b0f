"""Triton kernels compiled for GPUs that are not there, by the functions that would launch them.

    with FakeTensorMode(), compiled_for("sm_90") as launches:
        linear_ce_triton.fold_tile(torch.empty(16_384, 1024), ...)

A driver that knows nothing but its target stands in for the real one, and a launch ends after the compiler: it goes through the
JIT's own specialisation (pointers, strides and sizes divisible by 16; sizes of 1) with the grid, the block sizes and the number
of warps of production. Tensors may be fake: only their dtype, their offset and their size in bytes are asked for.

What is read: of NVIDIA's cubin what cuobjdump says, of AMD's assembly its metadata. That a kernel compiles says nothing about
its results (the interpreter's tests do) or its speed (nothing here does).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that one block may use."""


@dataclass(frozen=True)
class Launch:
    """One compiled launch. Bytes, registers of a thread."""

    kernel: str
    target: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spilled: int
    """Bytes of memory for each thread, which spilled registers take. (AMD's scalar registers spill into vector registers.)"""
    shared: int
    bits: tuple[tuple[str, int], ...] = ()
    """Of a histogram: which bits it counts."""


@contextmanager
def compiled_for(target: str) -> Iterator[list[Launch]]:
    """Within, a launch is compiled for `target` and not run; the list grows by what it needs."""
    launches: list[Launch] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        args = tuple(_Pointer(x) if isinstance(x, Tensor) else x for x in args)
        options = {name: _Pointer(x) if isinstance(x, Tensor) else x for name, x in options.items()}
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        bits = tuple((name.lower(), options[name]) for name in ("SHIFT", "WIDTH") if name in options)
        launches.append(replace(_launch(self.fn.__name__, target, grid, compiled), bits=bits))
        return compiled

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(_Driver(target))
    try:
        yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


class _Pointer:
    """What the JIT asks of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = int(tensor.storage_offset()) * tensor.element_size()
        self.size = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self.offset  # an allocation starts at a multiple of 512

    def ptr_range(self) -> int:
        return self.size


class _Driver(DriverBase):  # type: ignore[misc]
    """A target, and nothing behind it."""

    def __init__(self, target: str) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS).index(self.target)  # the JIT keeps compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("there is no GPU to time anything on")


def _launch(kernel: str, target: str, grid: tuple[int, ...], compiled: Any) -> Launch:
    if TARGETS[target].backend == "cuda":
        registers, spilled = _of_cubin(compiled.asm["cubin"])
    else:
        registers, spilled = _of_assembly(compiled.asm["amdgcn"])
    return Launch(kernel, target, tuple(grid), compiled.metadata.num_warps, registers, spilled, compiled.metadata.shared)


@cache  # a launch that was met before, is compiled before
def _of_cubin(cubin: bytes) -> tuple[int, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed.stdout)
    assert found, printed.stdout
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _of_assembly(assembly: str) -> tuple[int, int]:
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    return fields["vgpr_count"], fields["private_segment_fixed_size"]
