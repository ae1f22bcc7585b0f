"""A dataset in which a chunk often has several student tokens: the teacher's vocabulary is fifty times as large."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_vocagno.preprocess.score import ScoringOptions, score
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.runs import Case, write_teacher


@pytest.fixture(scope="session")
def scored_case(small_case: Case, teacher_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The small case with this dataset, which its teacher has scored."""
    folder = tmp_path_factory.mktemp("megatron")
    paragraphs = "\n\n".join(real.texts()[:6]).split("\n\n") + real.multilingual_texts()
    data = build_dataset(folder / "built", paragraphs, small_case.tokenizer("student"), teacher_tokenizer).path
    teacher = write_teacher(folder / "teacher", teacher_tokenizer)
    assert score(data, ScoringOptions(teacher, "float32", tokens_per_batch=500)).teacher_losses is not None
    return dataclasses.replace(small_case, train=data, valid=data, teacher=teacher)
