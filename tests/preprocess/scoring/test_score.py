"""A scored dataset has the teacher's loss of every token, is the same dataset as before, and says whose losses they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vocagno.corpus.dataset import AlignedDataset, merge
from megatron_vocagno.corpus.losses import LARGEST, LOSS_FILES, gather, require_unchanged, rounded
from megatron_vocagno.corpus.manifest import read_manifest
from megatron_vocagno.corpus.verify import verify
from megatron_vocagno.errors import ChangedError, CorpusError, DatasetError, ModelError
from megatron_vocagno.preprocess.build import build, locked
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.score import ScoringOptions, finish, score
from megatron_vocagno.preprocess.score_shard import ScoreJob, ScoreResult, score_shard
from megatron_vocagno.preprocess.shards import BuildConfig
from tests.corpus.conftest import contents
from tests.preprocess.scoring.conftest import CONTEXT, STRIDE
from tests.runs import write_teacher

Copy = Callable[..., Path]


def test_losses_are_those_of_transformers_own_model_document_by_document(scored: AlignedDataset, teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager")
    eos, whole, cut = scored.teacher_tokenizer.eos_id, 0, 0
    for document in range(0, len(scored), 3):
        ids = torch.from_numpy(scored.teacher(document)).long()
        expected = torch.empty(len(ids))
        inputs = torch.cat([torch.tensor([eos]), ids[:-1]])
        start = 0
        while True:
            stop = min(start + CONTEXT, len(ids))
            first = start + CONTEXT - STRIDE if start else 0
            with torch.no_grad():
                logits = model(inputs[None, start:stop]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, ids[start:stop], reduction="none")
            expected[first:stop] = losses[first - start :]
            if stop == len(ids):
                break
            start += STRIDE
        got = scored.teacher_losses(document)
        assert got.dtype == np.float32 and len(got) == scored.teacher_lengths[document] == len(ids)
        # half a step of float16 at the loss, and the teacher's own rounding
        assert np.all(np.abs(got - expected.numpy()) <= np.spacing(got.astype(np.float16)) * 0.51 + 2e-4)
        whole, cut = whole + (start == 0), cut + (start > 0)
    assert whole > 5 and cut > 5


def test_scoring_leaves_the_dataset_what_it_is(scored: AlignedDataset, unscored: AlignedDataset, teacher: Path) -> None:
    assert scored.fingerprint == unscored.fingerprint == unscored.manifest.sha256 != scored.manifest.sha256
    before, after = contents(unscored.path), contents(scored.path)
    new = {name for name in after if name not in before}
    assert {Path(name).name for name in new} == set(LOSS_FILES) and len(new) == 3 * len(scored.manifest.shards)
    assert {name for name in before if after[name] != before[name]} == {"dataset.json"}
    assert unscored.scoring is None and scored.scoring is not None
    assert (scored.scoring.name, scored.scoring.context, scored.scoring.stride) == (teacher.name, CONTEXT, STRIDE)
    losses = np.concatenate([scored.teacher_losses(i) for i in range(len(scored))])
    totals = scored.manifest.teacher_losses.totals  # type: ignore[union-attr]
    assert totals.tokens == len(losses) == scored.totals.teacher_tokens and totals.nan == totals.infinite == 0
    assert totals.mean == pytest.approx(losses.mean(dtype=np.float64))
    assert totals.positions - totals.padding > totals.tokens, "windows overlap"
    scored.verify()


def test_megatron_core_opens_the_pair(scored: AlignedDataset) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    pair = IndexedDataset(str(scored.path / scored.manifest.shards[0].path / "teacher_loss"))
    assert np.array_equal(pair[1].view(np.float16).astype(np.float32), scored.teacher_losses(1))


def test_what_was_computed_with_other_batches_is_the_same_to_float16(
    scored: AlignedDataset, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(scored)
    for file in folder.rglob("teacher_loss.json"):
        file.unlink()
    score(folder, replace(asked, tokens_per_batch=90))
    again = AlignedDataset.open(folder)
    pairs = [(again.teacher_losses(i), scored.teacher_losses(i)) for i in range(len(scored))]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    assert np.allclose(a, b, rtol=1e-3) and np.mean(a == b) > 0.99


def test_finite_losses_stay_finite_and_others_what_they_are() -> None:
    losses = np.array([0.1, 65_504, 65_520, 3e38, np.inf, np.nan], np.float32)
    assert np.array_equal(rounded(losses), np.array([0.1, LARGEST, LARGEST, LARGEST, np.inf, np.nan], np.float16), equal_nan=True)


# ---- interrupted, shared


class Killed(BaseException):
    pass


def test_an_interrupted_scoring_goes_on_where_it_was(
    unscored: AlignedDataset, scored: AlignedDataset, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(unscored)

    def one_shard_and_a_half(task: Callable[[ScoreJob], ScoreResult], jobs: list[ScoreJob], **_: Any) -> Any:
        yield task(jobs[0])
        (jobs[1].folder / ".teacher_loss.4f2a.bin").write_bytes(b"half")
        (jobs[1].folder / "teacher_loss.bin").write_bytes(b"without its record")
        raise Killed

    with pytest.raises(Killed):
        score(folder, asked, one_shard_and_a_half)
    assert AlignedDataset.open(folder).scoring is None, "half a scoring is none"
    done = (folder / "shards" / "0000" / "teacher_loss.bin").stat().st_mtime_ns
    results: list[Any] = []
    score(folder, asked, on_shard=results.append)
    assert [result.seconds > 0 for result in results] == [False] + [True] * (len(results) - 1)
    assert (folder / "shards" / "0000" / "teacher_loss.bin").stat().st_mtime_ns == done
    assert contents(folder) == contents(scored.path), "and nothing is left of what was interrupted"


def test_tasks_of_an_array_share_the_shards_and_the_last_one_records_them(
    unscored: AlignedDataset, scored: AlignedDataset, asked: ScoringOptions, copy: Copy
) -> None:
    folder = copy(unscored)
    n = len(unscored.manifest.shards)
    for i in (3, 1):
        assert score(folder, asked, part=Slice(i, 3)).teacher_losses is None
    with pytest.raises(CorpusError, match=rf"of {n} shards are not scored: shards/0001"):
        finish(folder)
    assert score(folder, asked, part=Slice(2, 3)).teacher_losses is not None
    assert contents(folder) == contents(scored.path)
    (folder / "dataset.json").write_bytes((unscored.path / "dataset.json").read_bytes())
    assert finish(folder) == scored.manifest == finish(folder)


def test_no_build_while_it_is_scored(unscored: AlignedDataset, asked: ScoringOptions, copy: Copy) -> None:
    folder = copy(unscored)
    with locked(folder, None), pytest.raises(CorpusError, match="another build or scoring is using"):
        score(folder, asked, part=Slice(1, 2))


def test_a_file_that_is_lost_or_cut_off_is_made_again(scored: AlignedDataset, asked: ScoringOptions, copy: Copy) -> None:
    folder = copy(scored)
    (folder / "shards" / "0000" / "teacher_loss.idx").unlink()
    (folder / "shards" / "0002" / "teacher_loss.bin").write_bytes(b"cut")
    with pytest.raises(DatasetError):
        AlignedDataset.open(folder)
    seconds: list[float] = []
    score(folder, asked, on_shard=lambda result: seconds.append(result.seconds))  # type: ignore[union-attr]
    assert [second > 0 for second in seconds[:3]] == [True, False, True]
    assert contents(folder) == contents(scored.path)


# ---- other teachers


def test_losses_of_another_teacher_are_replaced_only_when_asked(
    scored: AlignedDataset, asked: ScoringOptions, teacher_tokenizer: Path, tmp_path: Path, copy: Copy
) -> None:
    folder = copy(scored)
    other = replace(asked, teacher=write_teacher(tmp_path / "other", teacher_tokenizer, scale=0.5))
    with pytest.raises(ChangedError, match=r"teacher: [0-9a-f]{64} then, [0-9a-f]{64} now") as error:
        score(folder, other)
    assert "--replace" in str(error.value) and scored.scoring is not None and scored.scoring.teacher in str(error.value)
    with pytest.raises(ChangedError, match="stride: 20 then, 48 now"):
        score(folder, replace(asked, stride=48))
    assert contents(folder) == contents(scored.path)

    score(folder, other, part=Slice(1, 3), replace=True)
    assert AlignedDataset.open(folder).scoring is None, "two teachers are none"
    with pytest.raises(ChangedError, match="was scored with other settings"):
        score(folder, asked, part=Slice(1, 3))
    score(folder, other, replace=True)
    again = AlignedDataset.open(folder)
    again.verify()
    assert again.fingerprint == scored.fingerprint and again.scoring != scored.scoring
    assert np.mean(np.concatenate([again.teacher_losses(i) != scored.teacher_losses(i) for i in range(len(again))])) > 0.9


def test_a_teacher_that_does_not_suit_is_refused(unscored: AlignedDataset, asked: ScoringOptions, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"--context 300: .* 256 "):
        score(unscored.path, replace(asked, context=300))
    with pytest.raises(CorpusError, match="--stride 60 is more than --context 48"):
        score(unscored.path, replace(asked, stride=60))
    with pytest.raises(ModelError, match="no model at"):
        score(unscored.path, replace(asked, teacher=tmp_path / "nothing"))
    student = tmp_path / "narrow"
    shutil.copytree(asked.teacher, student)
    config = (student / "config.json").read_text().replace("49152", "40000")
    (student / "config.json").write_text(config)
    with pytest.raises(CorpusError, match=r"has 49,152 tokens, the teacher .* has 40,000"):
        score(unscored.path, replace(asked, teacher=student))
    assert (
        asked.scoring(unscored).context == CONTEXT and replace(asked, context=None, stride=None).scoring(unscored).stride == 128
    )


# ---- what the dataset goes through later


def test_a_build_that_finds_everything_keeps_the_losses_and_one_that_makes_a_shard_forgets_them(
    scored: AlignedDataset, corpus: Path, settings: BuildConfig, asked: ScoringOptions, copy: Copy
) -> None:
    folder, size = copy(scored), corpus.stat().st_size // 3 + 1
    build([corpus], folder, settings, shard_bytes=size)
    assert contents(folder) == contents(scored.path)
    (folder / "shards" / "0001" / "spans.bin").unlink()
    build([corpus], folder, settings, shard_bytes=size)
    rebuilt = AlignedDataset.open(folder)
    assert rebuilt.scoring is None and rebuilt.fingerprint == scored.fingerprint
    verify(folder)
    assert (
        not (folder / "shards" / "0001" / "teacher_loss.bin").exists()
        and (folder / "shards" / "0000" / "teacher_loss.bin").exists()
    )
    # ids that were not scored: the record does not vouch for them
    record = rebuilt.manifest.shards[0]
    changed = record.model_copy(update={"files": record.files | {"teacher.bin": record.files["student.bin"]}})
    assert gather(folder, [record]) is not None and gather(folder, [changed]) is None
    score(folder, asked)
    assert contents(folder) == contents(scored.path)


def test_a_merged_dataset_has_the_losses_that_all_of_it_has(
    scored: AlignedDataset, unscored: AlignedDataset, asked: ScoringOptions, tmp_path: Path, copy: Copy
) -> None:
    first, second = (AlignedDataset.open(copy(scored, name)) for name in ("first", "second"))
    both = merge([first.path, second.path], tmp_path / "both")
    both.verify()
    assert both.scoring == scored.scoring
    assert both.manifest.teacher_losses.totals.tokens == 2 * scored.totals.teacher_tokens  # type: ignore[union-attr]
    assert np.array_equal(both.teacher_losses(len(scored) + 2), scored.teacher_losses(2))
    assert merge([scored.path, unscored.path], tmp_path / "one").scoring is None
    # scored anew through the merged one: the other no longer vouches for it
    score(tmp_path / "both", replace(asked, stride=48), replace=True)
    with pytest.raises(DatasetError, match=r"teacher_loss.json is not what|teacher_loss.json: .* bytes"):
        require_unchanged(second.path, read_manifest(second.path))


@pytest.mark.parametrize("end", ["bin", "idx", "json"])
def test_verify_finds_a_changed_loss(scored: AlignedDataset, copy: Copy, end: str) -> None:
    file = copy(scored) / "shards" / "0001" / f"teacher_loss.{end}"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DatasetError) as error:
        verify(file.parents[2])
    assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(DatasetError, match=f"teacher_loss.{end} is missing"):
        AlignedDataset.open(file.parents[2])


def test_verify_finds_losses_that_were_wrong_when_they_were_written(scored: AlignedDataset, copy: Copy, monkeypatch: Any) -> None:
    import megatron_vocagno.corpus.verify as module

    folder = copy(scored)
    monkeypatch.setattr(module, "count", lambda losses: scored.manifest.teacher_losses.totals)  # type: ignore[union-attr]
    with pytest.raises(DatasetError, match="recorded are"):
        verify(folder)


def test_a_job_is_done_once(scored: AlignedDataset, asked: ScoringOptions, copy: Copy) -> None:
    folder = copy(scored)
    assert scored.scoring is not None
    job = ScoreJob(0, folder / "shards" / "0000", scored.manifest.shards[0], scored.scoring, asked.teacher, 500)
    assert score_shard(job).seconds == 0
    with pytest.raises(ChangedError, match="context: 48 then, 40 now"):
        score_shard(replace(job, scoring=scored.scoring.model_copy(update={"context": 40})))
