"""The arms of the benchmark of the selection choose the same tokens."""

from __future__ import annotations

import pytest

from benchmarks import selection
from benchmarks.selection_arms import inputs


@pytest.mark.parametrize("scope", ["microbatch", "sequence", "global"])
def test_the_arms_choose_the_same_tokens(scope: str) -> None:
    for aggregate in ("max", "min"):  # compare() raises if they do not
        ours, padded, segments = selection.compare(inputs(), aggregate, scope, rounds=1)
        assert [line[1] for line in (ours, padded, segments)] == ["select_tokens", "padded", "segments"]
        assert float(ours[3]) < float(padded[3]) / 10
