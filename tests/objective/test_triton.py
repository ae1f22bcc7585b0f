"""The kernels' tests in Triton's interpreter, in a process of their own: the variable is read when a kernel is defined."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

KERNELS = REPOSITORY / "tests" / "kernels"
# tests that a file has at least: none may go missing or be skipped unnoticed
LEAST = {"test_linear_ce.py": 49, "test_selection.py": 52, "test_token_loss.py": 8}


@pytest.mark.slow
@pytest.mark.parametrize("file", LEAST)
def test_the_kernels_pass_in_the_interpreter(file: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--confcutdir", str(KERNELS), "-p", "no:cacheprovider", str(KERNELS / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    summary = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, summary
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped|xfailed|deselected)", summary)}
    assert set(counts) == {"passed"} and counts["passed"] >= LEAST[file], summary


def test_every_file_of_kernel_tests_is_in_the_table() -> None:
    """But the one that needs a GPU."""
    assert {path.name for path in KERNELS.glob("test_*.py")} == {*LEAST, "test_doors.py"}
