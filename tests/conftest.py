"""Fixtures that several folders of tests share; each is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset, dataset, teacher_tokenizer
from tests.runs import Case, write_teacher

__all__ = ["dataset", "teacher_tokenizer"]


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Case:
    """A tiny student and a tiny teacher with real vocabularies, on real text; runs with a name are made once."""
    folder = tmp_path_factory.mktemp("runs")
    texts, mistral = real.texts(), real.mistral_tokenizer_path()
    train = build_dataset(folder / "train", texts[:60] + real.multilingual_texts(), mistral, teacher_tokenizer)
    valid = build_dataset(folder / "valid", texts[60:70], mistral, teacher_tokenizer)
    return Case(folder, train.path, valid.path, write_teacher(folder / "teacher", teacher_tokenizer))
