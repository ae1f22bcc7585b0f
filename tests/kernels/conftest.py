"""Each test runs with every backend that this process has. Tests of Triton alone are collected only if Triton can run."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch

from tests.kernels import BACKENDS, INTERPRETED, TRITON, Backend

collect_ignore = []
if INTERPRETED or not torch.cuda.is_available():
    collect_ignore.append("test_gpu.py")
if not TRITON:
    collect_ignore.append("test_launches.py")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)


@pytest.fixture
def device(backend: Backend) -> torch.device:
    return backend.device


@pytest.fixture(params=[f"{name}{way}" for name in BACKENDS for way in (["", " histograms"] if name == "triton" else [""])])
def each_ranking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every backend, and Triton again with the histograms that it uses for more tokens than one program ranks, or over ranks."""
    name, _, way = request.param.partition(" ")
    if way:
        monkeypatch.setattr("megatron_vocagno.objective.selection_triton.IN_REGISTERS", 0)
    return Backend(name)


def find_builtins_once() -> None:
    """Make the interpreter remember which names it patches. It lists whole modules again for each call of a device function."""
    from triton.runtime import interpreter

    @cache
    def names(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def patch(package: object, *arguments: object) -> None:
        for name in names(package):
            member = getattr(package, name)
            if interpreter.tl.core.is_builtin(member):  # it is not if it was patched already
                interpreter._patch_attr(package, name, member, *arguments)

    interpreter._patch_builtin = patch


if INTERPRETED:
    find_builtins_once()
