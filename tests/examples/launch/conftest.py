"""One training run, started in every way that docs/clusters.md shows: its losses must not depend on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.runs import REPOSITORY, Case, metrics

STEPS = 10
RUN = ["parallel.pipeline_stages=2", f"training.steps={STEPS}", "eval.rows=4"]


@contextmanager
def group(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with all that it starts; nothing of them is left afterwards."""
    with subprocess.Popen(list(map(str, command)), start_new_session=True, text=True, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def losses(output: Path) -> dict[int, float]:
    """Of each step."""
    return {int(line["step"]): line["loss/train"] for line in metrics(output) if "loss/train" in line}


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds:.0f} s"
        time.sleep(0.02)


def has_done(output: Path, step: int) -> bool:
    """Whether so many steps are in metrics.jsonl."""
    return (output / "metrics.jsonl").exists() and max([0, *losses(output)]) >= step


def documented(section: str, replaced: Mapping[str, str]) -> list[str]:
    """The blocks of commands of a section of docs/clusters.md, with the user's own words put in. Each must be there."""
    page = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"(?m)^```bash\n(.*?)^```$", text, re.DOTALL)
    met = set()
    for i, block in enumerate(blocks):
        for word, own in replaced.items():
            blocks[i] = blocks[i].replace(word, own)
            met |= {word} if word in block else set()
    assert blocks and met == replaced.keys(), f"docs/clusters.md, {section}: {sorted(replaced.keys() - met)} not there"
    return blocks


@pytest.fixture(scope="session")
def one_host(case: Case) -> dict[int, float]:
    """The losses of two ranks on this machine, started by hand."""
    return losses(case.run("one_host", 2, RUN))
