"""A teacher whose weights are divided over the processes gives the losses of one that is not, with the real launcher."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from tests.preprocess.scoring.conftest import CONTEXT, STRIDE
from tests.runs import REPOSITORY, environment

pytestmark = pytest.mark.slow


def launch(folder: Path, teacher: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """By the deepspeed launcher, as two processes."""
    variables = environment()
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", variables["MASTER_PORT"]]
    command = [*launcher, "--module", "tools.preprocess.score_teacher", str(folder), "--teacher", str(teacher)]
    command += ["--placement", "zero3", "--dtype", "float32", "--context", str(CONTEXT), "--stride", str(STRIDE), *options]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


def test_two_processes_share_the_weights(
    unscored: AlignedDataset, scored: AlignedDataset, teacher: Path, copy: Callable[..., Path]
) -> None:
    """Three shards for two processes: one of them helps the other at the end."""
    assert len(unscored.manifest.shards) == 3
    folder = copy(unscored)
    ended = launch(folder, teacher, "--tokens-per-batch", "700")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = AlignedDataset.open(folder)
    assert found.scoring == scored.scoring
    for i in range(len(found)):
        assert np.allclose(found.teacher_losses(i), scored.teacher_losses(i), rtol=1e-3)
    # all is there, so nobody has work
    again = launch(folder, teacher)
    assert again.returncode == 0 and "scored before" in again.stdout


def test_a_process_that_fails_lets_the_others_finish(
    unscored: AlignedDataset, scored: AlignedDataset, teacher: Path, copy: Callable[..., Path]
) -> None:
    """The shards of the second process were scored with other settings."""
    folder = copy(unscored)
    shard = unscored.manifest.shards[1].path
    for file in (scored.path / shard).glob("teacher_loss*"):
        content = file.read_bytes()
        (folder / shard / file.name).write_bytes(content.replace(b'"stride": 20', b'"stride": 21'))
    ended = launch(folder, teacher)
    said = ended.stdout + ended.stderr
    assert ended.returncode != 0 and "stride: 21 then, 20 now" in said, said
    assert (folder / unscored.manifest.shards[0].path / "teacher_loss.json").exists()
    assert (folder / unscored.manifest.shards[2].path / "teacher_loss.json").exists()
