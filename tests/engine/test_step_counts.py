"""The counts of a step, which are known before its losses, agree with the selection."""

from __future__ import annotations

import pytest
import torch

from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.config import Guidance, Scope, Unmapped
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine import step_counts
from megatron_vocagno.engine.step_counts import _capacity
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import select_tokens
from megatron_vocagno.objective.statistics import STATS


@pytest.mark.parametrize("unmapped", ["include", "exclude"])
@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
def test_the_capacity_has_room_for_every_token_with_weight_and_is_needed(
    dataset: AlignedDataset, scope: str, unmapped: str
) -> None:
    """Under `global` scope it is all tokens; else one less would not do."""
    guidance = Guidance(scope=scope, unmapped=unmapped)  # type: ignore[arg-type]
    rows, met = TrainRows(dataset, 64, seed=3), 0
    for batch in Batches(rows, Layout(4, 5, 1), 0).step(0):
        widest = max(map(len, batch.teacher_targets))
        student, teacher = torch.rand(batch.target_BS.shape) * 9, torch.rand(len(batch.target_BS), widest) * 9
        capacity = _capacity(batch, guidance)
        for room, fits in ((capacity, True), (capacity - 1, scope == "global")):
            selection = select_tokens(
                student,
                teacher,
                batch.first_BS,
                batch.last_BS,
                batch.target_BS != IGNORE,
                Rule(scope=scope, unmapped=unmapped),  # type: ignore[arg-type]
                capacity=room,
            )
            over = selection.stats[STATS.index("over_capacity")].item()
            assert (over == 0) == fits
            met += int(selection.weight_BS.sum()) > 0
    assert met == 10


@pytest.mark.parametrize("unmapped", ["include", "exclude"])
@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
def test_the_divisor_is_the_number_of_tokens_that_will_have_weight(
    dataset: AlignedDataset, monkeypatch: pytest.MonkeyPatch, scope: Scope, unmapped: Unmapped
) -> None:
    """On two ranks with three micro-batches each; under `global` scope one selection goes over all six."""
    monkeypatch.setattr(step_counts, "sum_over_ranks", lambda numbers, *_: asked.append(numbers) or totals)
    guidance, layout = Guidance(scope=scope, unmapped=unmapped), Layout(2, 3, 2)
    ranks = [Batches(TrainRows(dataset, 64, seed=5), layout, rank).step(0) for rank in range(2)]
    asked: list[list[int]] = []
    totals: list[int] = []
    for batches in ranks:
        totals = [0] * 7
        step_counts.count_step(batches, guidance, None, torch.device("cpu"))  # type: ignore[arg-type]
    totals = [sum(numbers) for numbers in zip(*asked, strict=True)]
    planned = step_counts.count_step(ranks[0], guidance, None, torch.device("cpu"))  # type: ignore[arg-type]

    batches = [batch for rank in ranks for batch in rank]
    groups = [batches] if scope == "global" else [[batch] for batch in batches]
    weights = 0.0
    for group in groups:
        valid_BS = torch.cat([batch.target_BS for batch in group]) != IGNORE
        mapped_BS = torch.cat([batch.last_BS > batch.first_BS for batch in group])
        student_BS, teacher_BS = torch.rand(2, *valid_BS.shape) * 9
        first_BS = torch.arange(valid_BS.shape[1]).expand(valid_BS.shape)
        rule = Rule(scope=scope, unmapped=unmapped)
        selection = select_tokens(student_BS, teacher_BS, first_BS, first_BS + mapped_BS, valid_BS, rule)
        weights += selection.weight_BS.sum().item()
    assert planned.kept == weights > 0.3 * planned.targets > 100
