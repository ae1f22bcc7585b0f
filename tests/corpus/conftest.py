from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real


@pytest.fixture(scope="session")
def smollm2_folder(teacher_tokenizer) -> Path:
    return teacher_tokenizer


@pytest.fixture(scope="session")
def smollm2(smollm2_folder) -> Tokenizer:
    return open_tokenizer(smollm2_folder)


@pytest.fixture(scope="session")
def mistral() -> Tokenizer:
    return open_tokenizer(real.mistral_tokenizer_path())


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [unicodedata.normalize("NFC", text) for text in real.texts()]


@pytest.fixture(scope="session")
def settings(smollm2_folder) -> BuildConfig:
    """Student Mistral (SentencePiece), teacher SmolLM2 (byte-level)."""
    return BuildConfig(student=str(real.mistral_tokenizer_path()), teacher=str(smollm2_folder))


def make(inputs: list[Path], out: Path, settings: BuildConfig, **options: Any) -> AlignedDataset:
    """`build`, opened."""
    build(inputs, out, settings, **options)
    return AlignedDataset.open(out)


def write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    """About 0.5 MB, 121 documents."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def built(tmp_path_factory, corpus, settings) -> AlignedDataset:
    """Its dataset, in five shards; read only."""
    return make([corpus], tmp_path_factory.mktemp("built") / "dataset", settings, shard_bytes=100_000)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset, hidden ones too; without the notes of its build."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if ".build" not in f.relative_to(folder).parts}
