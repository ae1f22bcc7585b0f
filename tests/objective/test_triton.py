"""The tests of both backends in Triton's interpreter, in a process: Triton reads the variable when a kernel is defined."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

KERNELS = REPOSITORY / "tests" / "kernels"
# the least number of tests of each file: none may be missing or skipped unnoticed
LEAST = {"test_selection.py": 33, "test_tiles.py": 20, "test_token_loss.py": 4, "test_launches.py": 14, "test_ranks.py": 1}


@pytest.mark.slow
def test_the_kernels_pass_in_the_interpreter(tmp_path: Path) -> None:
    files = [str(KERNELS / file) for file in LEAST]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--confcutdir", str(KERNELS), "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)
    summary = done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, summary
    assert set(re.findall(r"\d+ (passed|skipped|xfailed|deselected)", summary)) == {"passed"}, summary
    for file, least in LEAST.items():
        assert len(re.findall(rf"{file}::.* PASSED", done.stdout)) >= least, (file, summary)


def test_every_file_of_kernel_tests_is_in_the_table() -> None:
    """Except the one that needs a GPU."""
    assert {path.name for path in KERNELS.glob("test_*.py")} == {*LEAST, "test_gpu.py"}
