"""What is said where something in front of text does not fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from inline_snapshot import snapshot

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_of
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.fronts import student_front
from tests.errors.telling import told
from tests.runs import Case
from tests.sources import training_rows
from tests.tokenizers_with_bos import with_front


def test_ids_that_a_model_does_not_have(teacher_tokenizer: Path, tmp_path: Path) -> None:
    with told(snapshot("student.bos = 6 is not an id of the model: its embedding has 6 rows, ids 0 to 5")):
        front_of(6, [], "student.bos", 6)
    two = with_front(teacher_tokenizer, tmp_path / "two", ["<|im_start|>", "<|im_end|>"])
    with told(
        snapshot(
            "teacher.bos = 'auto': the tokenizer puts 2 in front of a text, which is not an id of the model: its embedding has 2 rows, ids 0 to 1"
        )
    ):
        front_of("auto", [two], "teacher.bos", 2)


def test_two_ids_before_each_document(case: Case, teacher_tokenizer: Path, tmp_path: Path) -> None:
    data = AlignedDataset.open(shutil.copytree(case.valid, tmp_path / "data"))
    shutil.rmtree(data.path / "tokenizers" / "student")
    with_front(teacher_tokenizer, data.path / "tokenizers" / "student", ["<|im_start|>", "<|im_end|>"])
    run = load_run(Path(case.command("by-document")[0]), ["data.attention=document"])
    with told(
        snapshot(
            "data.attention = 'document' puts one id before each document, but the student's tokenizer puts 2 in front of a text: [1, 2]. Use data.attention = 'row', or choose one id: student.bos = 2"
        )
    ):
        student_front(run.student, data, 49_152, run.data.by_document)


def test_losses_that_were_scored_with_something_else_in_front(case: Case, tiny: Path, tmp_path: Path) -> None:
    data = AlignedDataset.open(shutil.copytree(tiny, tmp_path / "data"))
    score(data.path, replace(ScoringOptions(case.teacher, "float32", context=64, stride=32), bos=5))
    run = load_run(Path(case.command("scored-with-5")[0]), ["teacher.placement=cached"])
    with told(
        snapshot(
            """\
DATA was scored with <file_sep> (5) in front of each window, but teacher.bos = 'auto' means nothing.
  Without its BOS, a teacher that was trained with one has far too high losses. Score the dataset again:
  python -m tools.preprocess.score_teacher DATA --teacher MODEL --replace\
"""
        ),
        DATA=data.path,
        MODEL=case.teacher,
    ):
        training_rows(run, [AlignedDataset.open(data.path)])
