"""tests/kernels on the GPU, including those that need one. In a rehearsal, one file of them in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.gpu.record import Skipped, Task

KERNELS = Path(__file__).parents[2] / "tests" / "kernels"
FILES = ("test_gpu.py", "test_launches.py", "test_tiles.py", "test_token_loss.py", "test_selection.py", "test_ranks.py")
"""The last ones take the longest: they compile the most."""


def run(task: Task) -> None:
    """Adds a row per file when its tests have ended, so that a time limit loses one file."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    for file in ("test_tiles.py",) if task.rehearse else FILES:
        # tests/conftest.py needs DeepSpeed
        options = ["-q", "-rfE", "--tb=short", "--confcutdir", str(KERNELS), "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, str(KERNELS / file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        counts = Counter({name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)})
        broken = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        reason = " / ".join(broken[:5]) or (done.stdout + done.stderr)[-300:]
        task.check(f"tests/kernels/{file}", done.returncode == 0 and counts["passed"] + counts["skipped"] > 0, counts, reason)
