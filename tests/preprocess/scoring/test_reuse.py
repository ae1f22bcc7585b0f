"""Losses are taken from a dataset with the same teacher tokens, and are those that scoring gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.losses import LOSS_FILES
from megatron_vocagno.corpus.verify import verify
from megatron_vocagno.errors import ChangedError, CorpusError
from megatron_vocagno.preprocess import score_local
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import make, write_jsonl

Copy = Callable[..., Path]


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a teacher was opened")

    monkeypatch.setattr(score_local, "open_once", refuse)


@pytest.fixture(scope="session")
def other_student(tmp_path_factory: pytest.TempPathFactory, corpus: Path, teacher_tokenizer: Path) -> AlignedDataset:
    """The same texts for the same teacher, in other shards, for a student with another tokenizer; read only."""
    settings = BuildConfig(student=str(teacher_tokenizer), teacher=str(teacher_tokenizer))
    out = tmp_path_factory.mktemp("other_student") / "dataset"
    dataset = make([corpus], out, settings, shard_bytes=corpus.stat().st_size // 2 + 1)
    assert len(dataset.manifest.shards) == 2
    return dataset


def losses_by_text(data: AlignedDataset) -> dict[bytes, bytes]:
    return {data.teacher(i).tobytes(): data.teacher_losses(i).tobytes() for i in range(len(data))}


def test_a_second_student_of_the_same_texts_needs_no_teacher(
    scored: AlignedDataset, other_student: AlignedDataset, copy: Copy, no_teacher: None
) -> None:
    folder = copy(other_student)
    score(folder, None, reuse=scored.path)
    verify(folder)
    found = AlignedDataset.open(folder)
    assert losses_by_text(found) == losses_by_text(scored)
    assert found.scoring == scored.scoring and found.student_tokenizer.path != scored.student_tokenizer.path
    assert found.totals.student_tokens != scored.totals.student_tokens


def test_equal_shards_are_linked(scored: AlignedDataset, unscored: AlignedDataset, copy: Copy, no_teacher: None) -> None:
    folder = copy(unscored)
    score(folder, None, reuse=scored.path)
    for shard in scored.manifest.shards:
        for name in LOSS_FILES:
            assert (folder / shard.path / name).samefile(scored.path / shard.path / name)
    assert AlignedDataset.open(folder).manifest == scored.manifest
    verify(folder)


def test_a_file_system_without_links(
    scored: AlignedDataset, unscored: AlignedDataset, copy: Copy, no_teacher: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    folder = copy(unscored)
    score(folder, None, reuse=scored.path)
    assert AlignedDataset.open(folder).manifest == scored.manifest
    assert not list(folder.rglob(".teacher_loss*"))


def test_only_new_documents_are_scored(
    scored: AlignedDataset, asked: ScoringOptions, settings: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sorted(real.texts(), key=len)[:66]
    bigger = make([write_jsonl(tmp_path / "corpus.jsonl", texts)], tmp_path / "dataset", settings)
    whole = shutil.copytree(bigger.path, tmp_path / "whole")
    score(whole, asked)
    with pytest.raises(CorpusError, match=r"6 of 66 documents of \S+ are not in \S+: give --teacher to score these"):
        score(bigger.path, None, reuse=scored.path)
    read = []
    computed = score_local.score_documents
    monkeypatch.setattr(
        score_local,
        "score_documents",
        lambda teacher, ids, lengths, job: read.append(len(lengths)) or computed(teacher, ids, lengths, job),
    )
    score(bigger.path, asked, reuse=scored.path)
    assert read == [6]
    found, expected = AlignedDataset.open(bigger.path), AlignedDataset.open(whole)
    new = 0
    for i in range(len(found)):
        ours, theirs = found.teacher_losses(i), expected.teacher_losses(i)
        # they were read in other batches
        assert abs(ours - theirs).max() < 0.02
        new += found.text(i) in texts[60:]
    assert new == 6


def test_what_is_refused(
    scored: AlignedDataset, unscored: AlignedDataset, asked: ScoringOptions, corpus: Path, copy: Copy, tmp_path: Path
) -> None:
    folder = copy(unscored)
    with pytest.raises(CorpusError, match="this dataset has no losses of its teacher"):
        score(folder, None, reuse=unscored.path)
    with pytest.raises(ChangedError, match=r"was scored with other settings:\n  stride: 20 there, 24 here"):
        score(folder, replace(asked, stride=24), reuse=scored.path)
    mistral = str(real.mistral_tokenizer_path())
    another = make([corpus], tmp_path / "another", BuildConfig(student=mistral, teacher=mistral))
    with pytest.raises(CorpusError, match="have different teacher tokenizers"):
        score(another.path, None, reuse=scored.path)
    assert not list(folder.rglob("teacher_loss*"))


def test_a_damaged_source_is_not_taken_over(
    scored: AlignedDataset, unscored: AlignedDataset, other_student: AlignedDataset, copy: Copy
) -> None:
    source = copy(scored, "source")
    losses = source / scored.manifest.shards[0].path / "teacher_loss.bin"
    content = bytearray(losses.read_bytes())
    content[100] ^= 1
    losses.write_bytes(content)
    for data in (unscored, other_student):
        folder = copy(data, data.path.parent.name)
        damaged = r"[12] of [23] shards could not be scored[\s\S]*teacher_loss\.bin is not what dataset\.json records"
        with pytest.raises(CorpusError, match=damaged):
            score(folder, None, reuse=source)
        assert AlignedDataset.open(folder).scoring is None
