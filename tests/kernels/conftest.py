"""Nothing here is collected without a GPU or the interpreter; tests/objective/test_triton.py starts the latter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import INTERPRETED

if INTERPRETED:
    collect_ignore = ["test_doors.py"]
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; the interpreter's tensors are the CPU's."""
    return torch.device("cpu" if INTERPRETED else "cuda")
