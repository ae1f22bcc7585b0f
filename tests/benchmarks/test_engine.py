"""The arithmetic that the loop's benchmark compares with, and its goals."""

from __future__ import annotations

import pytest

from benchmarks.engine import figures, pipelined
from benchmarks.engine_arms import Taken


@pytest.mark.parametrize("micro_batches", [1, 4, 32])
def test_a_balanced_pipeline_takes_its_bubble_longer_than_half(micro_batches: int) -> None:
    alone = Taken(9.0, 9.0, teacher=4.0, stages=(2.0, 2.0), update=1.0)
    assert pipelined(alone, micro_batches) == pytest.approx(2.0 + 2.0 * (micro_batches + 1) / micro_batches + 0.5)


def test_the_slower_stage_sets_the_pace() -> None:
    """Two micro-batches of 3 and 1 seconds: 3, then 3 and 1 at once, then 1, whichever stage is the slow one."""
    for stages in ((6.0, 2.0), (2.0, 6.0)):
        assert pipelined(Taken(8.0, 8.0, stages=stages), 2) == pytest.approx(7.0)


def test_a_goal_is_met_or_missed_by_the_median_of_the_rounds() -> None:
    alone = [Taken(10.0, 10.0, teacher=4.0, stages=(3.0, 3.0), update=0.0)] * 3
    wall = pipelined(alone[0], 4)
    for slow, met in ((1.04, True), (1.2, False)):
        plain = [Taken(9.0, 10.0 * slow, reading=0.1 * slow)] * 2 + [Taken(90.0, 90.0, reading=50.0)]
        pp2 = [[Taken(wall * slow, 5.0), Taken(1.0, 6.0)]] * 3
        found = {figure.goal: figure.met for figure in figures(alone, plain, pp2, 4) if figure.goal}
        assert found == {"≤ 1.05 ×": met, "≤ 1 %": True, "≤ 1.08 ×": met}
