"""What is known of a step before it starts holds when its losses are known."""

from __future__ import annotations

import pytest
import torch

from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.config import Guidance
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.counts import _capacity
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
                aggregate="max",
                keep=guidance.keep,
                scope=scope,  # type: ignore[arg-type]
                unmapped=unmapped,  # type: ignore[arg-type]
                capacity=room,
            )
            over = selection.stats_PK.sum(0)[STATS.index("over_capacity")].item()
            assert (over == 0) == fits
            met += int(selection.weight_BS.sum()) > 0
    assert met == 10
