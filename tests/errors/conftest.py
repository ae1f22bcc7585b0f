"""What several files of these tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.shards import BuildConfig
from tests.runs import Case


@pytest.fixture(scope="session")
def tiny(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four lines in four shards."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "corpus.jsonl").write_text("".join(f'{{"text": "a line of text, {i}"}}\n' for i in range(4)))
    tokenizers = case.valid / "tokenizers"
    settings = BuildConfig(student=str(tokenizers / "student"), teacher=str(tokenizers / "teacher"))
    return Path(str(build([folder / "corpus.jsonl"], folder / "data", settings, shard_bytes=10)))
