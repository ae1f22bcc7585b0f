"""Compile Triton kernels for GPUs that are not present, through the functions that would launch them.

    with FakeTensorMode(), compiled_for("sm_90") as launches:
        linear_ce_triton.update_online_softmax(torch.empty(16_384, 1024), ...)

A driver that only knows its target replaces the real driver, and a launch ends after the compiler. A launch therefore passes
through the JIT's own specialization (pointers, strides and sizes divisible by 16; sizes of 1), with the grid, the block sizes
and the number of warps of production. Tensors may be fake: only their dtype, offset and size in bytes are read.

Resources are read from cuobjdump's report on NVIDIA's cubin, or from the metadata in AMD's assembly. Compilation does not check
results (the tests in the interpreter do) or speed (no test does).
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
"""Limit of shared memory per block, in bytes."""


@dataclass(frozen=True)
class Launch:
    """One compiled launch. Sizes are in bytes; registers are per thread."""

    kernel: str
    target: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spilled: int
    """Bytes of memory per thread for spilled registers. (AMD's scalar registers spill into vector registers.)"""
    shared: int
    bits: tuple[tuple[str, int], ...] = ()
    """The bits that a histogram counts. Empty for other kernels."""


@contextmanager
def compiled_for(target: str) -> Iterator[list[Launch]]:
    """Within this context, a launch is compiled for `target` and not run. Each launch is appended to the list."""
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
    """The part of a tensor's interface that the JIT uses."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = int(tensor.storage_offset()) * tensor.element_size()
        self.size = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self.offset  # an allocation starts at a multiple of 512

    def ptr_range(self) -> int:
        return self.size


class _Driver(DriverBase):  # type: ignore[misc]
    """A driver without a device: it only knows its target."""

    def __init__(self, target: str) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return 1000 + list(TARGETS).index(self.target)  # the JIT caches compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("cannot time a kernel: there is no GPU")


def _launch(kernel: str, target: str, grid: tuple[int, ...], compiled: Any) -> Launch:
    if TARGETS[target].backend == "cuda":
        registers, spilled = _of_cubin(compiled.asm["cubin"])
    else:
        registers, spilled = _of_assembly(compiled.asm["amdgcn"])
    return Launch(kernel, target, tuple(grid), compiled.metadata.num_warps, registers, spilled, compiled.metadata.shared)


@cache  # equal launches give equal binaries
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
