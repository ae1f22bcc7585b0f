"""Each row is scored once, by one rank, in forwards that stay within the budget."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.config import Schedule
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine import scoring
from megatron_vocagno.engine.build import share_of_peak
from megatron_vocagno.engine.scoring import ReplicatedScorer, ShardedScorer, plan_scoring
from megatron_vocagno.run_file import load_run
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.runs import REPOSITORY


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("budget", [64, 1000, 10**9])
def test_every_row_is_scored_once_within_the_budget(ranks: int, budget: int) -> None:
    random = np.random.default_rng(ranks)
    met = 0
    for rows in (0, 1, 3, 40):
        lengths = random.integers(0, 300, rows).tolist()
        plan = plan_scoring(lengths, ranks, budget)
        scored = sorted(row for rank in plan.forwards for forward in rank for row in forward)
        assert scored == [row for row, length in enumerate(lengths) if length]
        for forward in (forward for rank in plan.forwards for forward in rank):
            longest = max(lengths[row] for row in forward)
            assert len(forward) == 1 or len(forward) * longest <= budget
            met += len(forward) > 1
        assert 0 <= plan.padding(lengths) < 1
        work = [sum(lengths[row] for forward in rank for row in forward) for rank in plan.forwards]
        assert max(work) - min(work) <= max(lengths, default=0), "no rank waits for more than one row"
    assert met > 0 or budget == 64


def test_rows_of_similar_length_go_together() -> None:
    lengths = [10, 200, 12, 199, 11, 198]
    plan = plan_scoring(lengths, 1, 600)
    assert plan.forwards == (((1, 3, 5), (2, 4, 0)),)
    assert plan.padding(lengths) == pytest.approx(1 - 630 / (3 * 200 + 3 * 12))


class Counting:
    """A teacher whose loss tells which token it was asked for, and in which row of how many."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def loss(self, input_BU: torch.Tensor, target_BU: torch.Tensor, segment_BU: torch.Tensor | None = None) -> torch.Tensor:
        self.shapes.append(tuple(input_BU.shape))
        return torch.where(target_BU == IGNORE, 0.0, input_BU * 1000.0 + target_BU)


def test_each_row_gets_its_own_losses_whatever_the_forwards(dataset: AlignedDataset) -> None:
    batches = Batches(TrainRows(dataset, 64, seed=2), Layout(3, 4, 1), 0).step(0)
    checked = 0
    for budget in (1, 200, 10**6):
        teacher = Counting()
        losses = ReplicatedScorer(teacher, None, budget, torch.device("cpu")).score(batches)
        assert len(teacher.shapes) == (12 if budget == 1 else 1 if budget == 10**6 else len(teacher.shapes)) > 0
        for batch, loss_BU in zip(batches, losses, strict=True):
            for b in range(3):
                u = len(batch.teacher_targets[b])
                expected = batch.teacher_inputs[b] * 1000.0 + batch.teacher_targets[b]
                assert loss_BU[b, :u].tolist() == expected.astype(np.float32).tolist()
                assert not loss_BU[b, u:].any()
                checked += u
    assert checked > 3 * 300


def test_a_rank_with_less_to_score_goes_through_as_many_forwards(
    dataset: AlignedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(TrainRows(dataset, 64, seed=2), Layout(3, 4, 1), 0).step(0)
    alone, sharing = Counting(), Counting()
    expected = ReplicatedScorer(alone, None, 200, torch.device("cpu")).score(batches)
    # another rank has three more
    monkeypatch.setattr(scoring.dist, "all_reduce", lambda most, op: most.add_(3))
    found = ShardedScorer(sharing, None, 200, torch.device("cpu")).score(batches)
    assert sharing.shapes == alone.shapes + [(1, 1)] * 3 and len(alone.shapes) > 3
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.slow
def test_at_most_five_percent_of_the_quickstarts_forwards_are_padding(tmp_path: Path, teacher_tokenizer: Path) -> None:
    corpus = import_file(REPOSITORY / "examples" / "demo" / "corpus.py")
    texts = [text.text for text in (*corpus.champ_problems(), *corpus.docstrings("mpmath"))]
    data = build_dataset(tmp_path / "data", texts, real.mistral_tokenizer_path(), teacher_tokenizer)
    run = load_run(REPOSITORY / "examples" / "quickstart.toml")
    rows = TrainRows(data, run.data.row_length, run.training.seed)
    # the quickstart's own step on one and on two ranks, and the large step of a GPU
    for ranks, count, budget in (
        (1, 4, run.teacher[0].tokens_per_batch),
        (2, 4, run.teacher[0].tokens_per_batch),
        (2, 64, 16384),
    ):
        steps = [[len(rows[k * count + i].teacher_target_ids) for i in range(count)] for k in range(rows.rows_in_epoch // count)]
        plans = [plan_scoring(lengths, ranks, budget) for lengths in steps]
        assert len(plans) > 1 and sum(map(len, plans[0].forwards)) >= ranks
        paddings = [plan.padding(lengths) for plan, lengths in zip(plans, steps, strict=True)]
        assert sum(paddings) / len(paddings) <= 0.05


def test_the_schedule_rises_and_falls_to_where_it_was_told() -> None:
    cosine = Schedule(kind="cosine", warmup_steps=4, min_lr_ratio=0.1)
    rates = [share_of_peak(cosine, 20, step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[4 + 15 // 2] == pytest.approx(0.55, abs=0.06)
    linear = [share_of_peak(Schedule(kind="linear", min_lr_ratio=0.0), 11, step) for step in range(11)]
    assert linear == pytest.approx([1 - step / 10 for step in range(11)])
    assert {share_of_peak(Schedule(kind="constant"), 9, step) for step in range(9)} == {1.0}
    # past its end, as when a run is made longer, it stays where it ended
    assert share_of_peak(cosine, 20, 30) == pytest.approx(0.1)
