"""A dataset of three small shards and a tiny teacher for it; scored once for all tests that only read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import make, write_jsonl
from tests.runs import write_teacher

CONTEXT, STRIDE = 48, 20


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Path:
    return write_teacher(tmp_path_factory.mktemp("offline") / "teacher", teacher_tokenizer)


@pytest.fixture(scope="session")
def asked(teacher: Path) -> ScoringOptions:
    return ScoringOptions(teacher, "float32", context=CONTEXT, stride=STRIDE, tokens_per_batch=700)


@pytest.fixture(scope="session")
def settings(teacher_tokenizer: Path) -> BuildConfig:
    return BuildConfig(student=str(real.mistral_tokenizer_path()), teacher=str(teacher_tokenizer))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = sorted(real.texts(), key=len)[:60]
    return write_jsonl(tmp_path_factory.mktemp("offline_corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def unscored(tmp_path_factory: pytest.TempPathFactory, corpus: Path, settings: BuildConfig) -> AlignedDataset:
    """Three shards; read only."""
    dataset = make(
        [corpus], tmp_path_factory.mktemp("unscored") / "dataset", settings, shard_bytes=corpus.stat().st_size // 3 + 1
    )
    assert len(dataset.manifest.shards) >= 3
    return dataset


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, unscored: AlignedDataset, asked: ScoringOptions) -> AlignedDataset:
    """The same, scored; read only."""
    folder = shutil.copytree(unscored.path, tmp_path_factory.mktemp("scored") / "dataset")
    assert score(folder, asked).teacher_losses is not None
    return AlignedDataset.open(folder)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a dataset that may be changed."""
    return lambda dataset, name="copy": shutil.copytree(dataset.path, tmp_path / name)
