"""Training with cached losses equals training with the teacher, and losses of another teacher are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_vocagno.batch.cached import CachedLosses, guides
from megatron_vocagno.batch.loader import Batches, Layout
from megatron_vocagno.batch.pack import SLACK
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.engine.cached import CachedScorer
from megatron_vocagno.errors import RunError
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.run_file import load_run
from tests.datasets import invent_dataset
from tests.runs import Case, metrics, spawn, write_small_teacher
from tests.sources import training_rows

ROW = 64
CHUNKS = ["guidance.unit=chunk", "guidance.weighting=control_variate"]


@pytest.fixture(scope="module")
def whole_rows(tmp_path_factory: pytest.TempPathFactory, case: Case) -> AlignedDataset:
    """Documents of exactly as many tokens as a row advances: every row holds one, whole."""
    student, teacher = (open_tokenizer(case.tokenizer(side)) for side in ("student", "teacher"))
    lengths = [ROW - SLACK - 1] * 24
    return invent_dataset(tmp_path_factory.mktemp("whole") / "dataset", student, teacher, [lengths[:9], lengths[9:]])


@pytest.fixture(scope="module")
def asked(case: Case) -> ScoringOptions:
    return ScoringOptions(case.teacher, "float32", tokens_per_batch=500)


@pytest.fixture(scope="module")
def scored(whole_rows: AlignedDataset, asked: ScoringOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = shutil.copytree(whole_rows.path, tmp_path_factory.mktemp("scored") / "dataset")
    assert score(folder, asked).teacher_losses is not None
    return folder


def run_of(case: Case, name: str, data: Path, *overrides: str) -> Run:
    arguments = case.command(name, [f"data.train={data}", *overrides])
    return load_run(Path(arguments[0]), arguments[4::2])


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((output / "checkpoints" / f"step-{step:08d}" / "student").glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [[], pytest.param(CHUNKS, marks=pytest.mark.long)], ids=["tokens", "chunks"])
def test_cached_losses_make_the_weights_that_the_teacher_makes(case: Case, scored: Path, rule: list[str]) -> None:
    """The teacher scores four steps; from the second one on, another run goes on with what was scored beforehand."""
    names = [f"{name}-{'chunks' if rule else 'tokens'}" for name in ("online", "cached")]
    overrides = [
        *rule,
        f"data.train={scored}",
        "training.steps=4",
        "checkpoint.every=2",
        'data.attention="document"',
        "eval.every=4",
    ]
    overrides.append("data.row_length=65")  # one position more, for BOS: no row cuts a document
    arguments = case.command(names[0], overrides)
    online = spawn(1, arguments, ["-m", "tests.rounded_teacher"])
    assert online.returncode == 0, online.stdout[-6000:]
    half = case.out(names[1]) / "checkpoints"
    half.mkdir(parents=True)
    shutil.copytree(case.out(names[0]) / "checkpoints" / "step-00000002", half / "step-00000002")
    case.run(names[1], 1, [*overrides, 'teacher.placement="cached"'])

    a, b = (weights(case.out(name), 4) for name in names)
    assert a.keys() == b.keys() and len(a) > 20
    assert all(torch.equal(a[name], b[name]) for name in a)
    began = weights(case.out(names[0]), 2)
    assert not any(torch.equal(a[name], began[name]) for name in a), "nothing was learned between the two"
    ours, theirs = ([line for line in metrics(case.out(name)) if "loss/train" in line][-2:] for name in names)
    for mine, other in zip(ours, theirs, strict=True):
        same = [key for key in mine if key.startswith(("loss/", "guidance/"))]
        assert len(same) > 10 and all(mine[key] == other[key] for key in same)
        assert mine["teacher/tokens"] > 0 == other["teacher/tokens"]


def test_a_row_gives_the_scorer_what_was_scored(case: Case, scored: Path) -> None:
    run = run_of(case, "rows", scored, 'teacher.placement="cached"')
    data = AlignedDataset.open(scored)
    [rows] = training_rows(run, [data])
    batches = Batches(rows, Layout(3, 2, 1), 0).step(0)
    losses = CachedScorer(torch.device("cpu")).score(batches)
    met = 0
    for batch, loss_BU in zip(batches, losses, strict=True):
        assert batch.teacher_losses is not None and loss_BU.dtype == torch.float32
        for b, known in enumerate(batch.teacher_losses):
            assert np.array_equal(loss_BU[b, : len(known)].numpy(), known) and not loss_BU[b, len(known) :].any()
            met += len(known)
    assert met > 200


def test_plain_language_modeling_asks_for_no_losses(case: Case, whole_rows: AlignedDataset) -> None:
    run = run_of(case, "clm", whole_rows.path, 'teacher.placement="cached"', 'guidance.objective="clm"')
    [rows] = training_rows(run, [whole_rows])
    assert rows[0].teacher_losses is None


def test_losses_that_are_missing_or_another_teachers_are_refused(
    case: Case, scored: Path, whole_rows: AlignedDataset, asked: ScoringOptions, tmp_path: Path
) -> None:
    cached = 'teacher.placement="cached"'
    with pytest.raises(RunError, match=r"0 of 2 shards") as error:
        training_rows(run_of(case, "none", whole_rows.path, cached), [whole_rows])
    assert f"score_teacher {whole_rows.path} --teacher {case.teacher}" in str(error.value)

    half = shutil.copytree(whole_rows.path, tmp_path / "half")
    score(half, asked, part=Slice(1, 2))
    with pytest.raises(RunError, match="1 of 2 shards are scored"):
        training_rows(run_of(case, "half", half, cached), [AlignedDataset.open(half)])

    other = write_small_teacher(case, tmp_path / "other", scale=0.5)
    data = AlignedDataset.open(scored)
    with pytest.raises(RunError, match=r"holds the losses of teacher \([0-9a-f]{64}\), teacher.path is .*other \([0-9a-f]{64}\)"):
        training_rows(run_of(case, "other", scored, cached, f"teacher.path={other}"), [data])
    # the weights may be gone: then their name speaks for them
    gone = run_of(case, "gone", scored, cached, "teacher.path=/nowhere/teacher")
    assert len(training_rows(gone, [data])) == 1
    with pytest.raises(RunError, match=r"teacher.path is /nowhere/other \(whose weights are not on this machine\)"):
        training_rows(run_of(case, "elsewhere", scored, cached, "teacher.path=/nowhere/other"), [data])

    twice = shutil.copytree(scored, tmp_path / "twice")
    score(twice, replace(asked, context=40), replace=True)
    blend = [data, AlignedDataset.open(twice)]
    with pytest.raises(RunError, match="were not scored in the same way"):
        training_rows(gone, blend)


def test_a_teacher_by_id_is_known_by_its_weights_where_they_are_in_the_cache_and_by_its_name_else(
    case: Case, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = AlignedDataset.open(scored), write_small_teacher(case, tmp_path / "other", scale=0.5)
    cached: dict[str, Path] = {}
    monkeypatch.setattr("megatron_vocagno.engine.cached.cached_snapshot", lambda name: cached.get(str(name)))

    def accepts(name: str) -> bool:
        run = run_of(case, "by-id", scored, 'teacher.placement="cached"', f"teacher.path={name}")
        try:
            return len(training_rows(run, [data])) == 1
        except RunError as error:
            assert "A dataset stores the losses of one teacher" in str(error)
            return False

    commit = "0" * 40
    assert [accepts(name) for name in ("a/teacher", f"a/teacher@{commit}", "a/teacher-instruct")] == [True, True, False]
    cached |= {"a/teacher": other, "a/teacher-instruct": case.teacher}
    assert [accepts(name) for name in ("a/teacher", f"a/teacher@{commit}", "a/teacher-instruct")] == [False, True, True]


# ---- several teachers


@pytest.fixture(scope="module")
def second(case: Case, whole_rows: AlignedDataset, asked: ScoringOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents and student ids, scored by another teacher; here its tokens are the first one's."""
    folder: Path = shutil.copytree(whole_rows.path, tmp_path_factory.mktemp("second") / "dataset")
    teacher = write_small_teacher(case, folder.parent / "teacher", scale=0.3)
    score(folder, replace(asked, teacher=teacher))
    return folder


def two_teachers(run: Run, second: Path, combine: str) -> Run:
    fields = run.model_dump()
    first = fields["teacher"][0] | {"placement": "cached"}
    fields["teacher"] = [first, first | {"path": None, "data": [second]}]
    fields["guidance"]["combine"] = combine
    return Run.model_validate(fields)


def test_two_teachers_guide_as_each_of_them_says(case: Case, scored: Path, second: Path) -> None:
    one = run_of(case, "two", scored)
    data = AlignedDataset.open(scored)
    each = [CachedLosses(AlignedDataset.open(path)) for path in (scored, second)]
    met = 0
    for combine, least in (("min", np.fmin), ("mean", lambda a, b: ((a.astype(np.float64) + b) / 2).astype(np.float32))):
        [rows] = training_rows(two_teachers(one, second, combine), [data])
        for k in range(6):
            row = rows[k]
            a, b = (guides(source.read(rows.pieces(k)), "max") for source in each)
            mapped = row.first < row.last
            assert row.teacher_losses is not None
            assert np.array_equal(row.teacher_losses[mapped], least(a, b)[mapped])
            met += int((a[mapped] != b[mapped]).sum())
    assert met > 300


def test_datasets_of_other_documents_are_refused(case: Case, scored: Path, second: Path, tmp_path: Path) -> None:
    data = AlignedDataset.open(scored)
    one = run_of(case, "refused", scored)
    student, teacher = (open_tokenizer(case.tokenizer(side)) for side in ("student", "teacher"))
    lengths = [ROW - SLACK - 1] * 24
    for name, shards in (("order", [lengths[9:], lengths[:9]]), ("fewer", [lengths[:9]]), ("other", [lengths[:9], lengths[9:]])):
        wrong = invent_dataset(tmp_path / name, student, teacher, shards, seed=0 if name == "fewer" else 5)
        with pytest.raises(RunError, match="do not contain the same documents") as error:
            training_rows(two_teachers(one, wrong.path, "min"), [data])
        assert f"the first different shard is {int(name == 'fewer')}." in str(error.value)
