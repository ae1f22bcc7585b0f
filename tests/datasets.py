"""Small aligned datasets of real text for the tests: Mistral's tokenizer for the student, SmolLM2's for the teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.shards import Settings, build
from tests import tokenizers_for_tests as real


def build_dataset(out: Path, texts: Sequence[str], student: Path, teacher: Path) -> AlignedDataset:
    out.mkdir(parents=True)
    corpus = out / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return build([corpus], out / "dataset", Settings(student=str(student), teacher=str(teacher)), shard_bytes=100_000)


@pytest.fixture(scope="session")
def teacher_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real.smollm2_tokenizer_folder(tmp_path_factory.mktemp("teacher_tokenizer"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> AlignedDataset:
    """About 0.5 MB in many languages, awkward cases among them."""
    return build_dataset(tmp_path_factory.mktemp("data") / "all", real.texts(), real.mistral_tokenizer_path(), teacher_tokenizer)
