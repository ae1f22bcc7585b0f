"""The files that the examples of docstrings and of docs/reference.md use: tokenizers, a dataset, a small `.demo/`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vocagno.corpus import Tokenizer, open_tokenizer
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.library.naive import Naive
from tests.model.tiny import SIZES, write_model
from tests.runs import REPOSITORY, write_teacher


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Path:
    """A folder to run examples in, with two tokenizers, a dataset of two documents, and the repository's examples/."""
    folder = tmp_path_factory.mktemp("scratch")
    (folder / "mistral").symlink_to(real.mistral_tokenizer_path())
    (folder / "smollm2").symlink_to(teacher_tokenizer)
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    (folder / "data").mkdir()
    texts = ["les êtres humains", "Find 3 + 4."]
    mine = build_dataset(folder / "built", texts, folder / "mistral", folder / "smollm2")
    (folder / "data" / "mine").symlink_to(mine.path)
    return folder


@pytest.fixture(scope="session")
def tokenizers(scratch: Path) -> tuple[Tokenizer, Tokenizer]:
    """The student's and the teacher's tokenizer. Opening one takes as long as most tests, so they are shared."""
    return open_tokenizer(scratch / "mistral"), open_tokenizer(scratch / "smollm2")


@pytest.fixture(scope="session")
def demo(scratch: Path, tokenizers: tuple[Tokenizer, Tokenizer]) -> Path:
    """`scratch` with a `.demo/` like that of `make demo`, with tiny models and the real tokenizers."""
    folder = scratch / ".demo"
    student = {**SIZES, "model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 512, "tie_word_embeddings": True}
    tokenizers[0].save(write_model(folder / "student-hf", student))
    write_teacher(folder / "teacher", scratch / "smollm2")
    (folder / "data").mkdir()
    (folder / "data" / "heldout").symlink_to(scratch / "data" / "mine")
    (folder / "corpus").mkdir()
    lines = (json.dumps({"text": text}) + "\n" for text in [*real.multilingual_texts()[:9], ""])
    (folder / "corpus" / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    return scratch


@pytest.fixture
def naive(demo: Path, tokenizers: tuple[Tokenizer, Tokenizer]) -> Naive:
    return Naive(demo / ".demo" / "student-hf", demo / ".demo" / "teacher", tokenizers)
