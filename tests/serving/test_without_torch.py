"""A machine that asks a server for losses, or takes them from another dataset, needs no torch and no transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.folder import text_sizes
from megatron_vocagno.preprocess.score import ScoringOptions
from tests.runs import REPOSITORY
from tests.serving.conftest import Copy, Serve, losses_of

TRAINING = ("torch", "transformers", "deepspeed", "triton", "tensorboard", "numba", "gguf")
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({TRAINING}))  # as if they were not installed
from tools.preprocess.score_teacher import main
sys.exit(main(sys.argv[1:]))
"""


def scored_without_torch(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ, check=False)


@pytest.mark.slow
def test_a_server_needs_no_torch_here(
    serve: Serve,
    teacher: Path,
    unscored: AlignedDataset,
    local: Path,
    asked: ScoringOptions,
    copy: Copy,
    tmp_path: Path,
) -> None:
    folder = copy(unscored)
    windows = ("--context", asked.context, "--stride", asked.stride, "--dtype", "float32")
    ended = scored_without_torch(folder, "--teacher", teacher, "--server", serve("vllm"), *windows)
    assert ended.returncode == 0, ended.stderr
    assert losses_of(folder) == losses_of(local)
    taken = shutil.copytree(unscored.path, tmp_path / "taken")
    ended = scored_without_torch(taken, "--reuse", folder, "--workers", 2)
    assert ended.returncode == 0, ended.stderr
    assert losses_of(taken) == losses_of(local)
    # what does need it
    for more in (["--force"], ["--force", "--workers", 2], ["--force", "--server", serve("vllm"), "--check", 2]):
        ended = scored_without_torch(folder, "--teacher", teacher, *windows, *more)
        assert ended.returncode == 2
        assert "error: this command needs torch: pip install 'megatron-vocagno[train]'" in ended.stderr
    assert losses_of(folder) == losses_of(local)


def test_the_sizes_of_a_model_are_read_without_transformers(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_transformers = text_sizes(teacher)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert text_sizes(teacher) == by_transformers and by_transformers[1] is not None
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": {"vocab_size": 7}, "vocab_size": 9}))
    assert text_sizes(tmp_path) == (7, None)
    for content in ('{"text_config": {"hidden_size": 4}}', "[]", "{"):
        file.write_text(content)
        with pytest.raises(ModelError, match=r"config\.json has no vocab_size that can be read[\s\S]*pip install transformers"):
            text_sizes(tmp_path)
