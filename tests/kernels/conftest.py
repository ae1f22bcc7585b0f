"""Each test runs with every backend that this process has. Tests of Triton alone are collected only if Triton can run."""

from __future__ import annotations

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
