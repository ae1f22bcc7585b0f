"""The benchmark of the selection: its arms choose the same tokens, and what it counts is what was done."""

from __future__ import annotations

import pytest
import torch

from benchmarks import selection


@pytest.mark.parametrize("scope", ["microbatch", "sequence", "global"])
def test_the_arms_choose_the_same_tokens(scope: str) -> None:
    for aggregate in ("max", "min"):  # compare() refuses if they do not
        ours, padded, segments = selection.compare(selection.inputs(), aggregate, scope, rounds=1)
        assert [line[1] for line in (ours, padded, segments)] == ["select_tokens", "padded", "segments"]
        assert float(ours[3]) < float(padded[3]) / 10


def test_operations_and_bytes_are_counted_once_and_views_not_at_all() -> None:
    x = torch.zeros(8, 16)
    with selection.Counted() as counted:
        (x.view(16, 8)[2:] + 1).sum().item()
    assert counted.operations == 2
    assert counted.bytes == 4 * (2 * 14 * 8) + 4 * (14 * 8 + 1)
