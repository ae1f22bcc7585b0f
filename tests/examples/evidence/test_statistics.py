"""Numbers over seeds, by examples that can be checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from examples.evidence.statistics import curve, final, paired, reached


def row(seed: int, step: int, value: float, flops: float = 0.0) -> dict[str, Any]:
    return {"seed": seed, "step": step, "scores": {"nats": value}, "costs": {"student_flops": flops, "teacher_flops": 7.0}}


def test_differences_are_taken_seed_by_seed() -> None:
    arm, reference = {1: 1.0, 2: 10.0, 3: 5.0, 9: 77.0}, {3: 6.0, 1: 3.0, 2: 13.0, 8: 0.0}
    found = paired(arm, reference)  # -2, -3, -1: far closer to each other than the arms' own values are
    assert found is not None
    assert (found.difference.mean, found.difference.sd, found.difference.n) == (-2.0, 1.0, 3)
    assert (found.positive, found.negative) == (0, 3)
    assert found.show(".1f") == "−2.0 ± 1.0 (n=3; 3 of 3 −)"


def test_a_difference_of_one_seed_claims_no_agreement() -> None:
    found = paired({1: 2.0}, {1: 1.5})
    assert found is not None and found.show(".1f") == "+0.5 (n=1)"


def test_the_last_step_of_each_seed_counts() -> None:
    rows = [row(1, 20, 4.0), row(1, 10, 5.0), row(2, 10, 6.0), {**row(2, 20, 0.0), "scores": {"other": 1.0}}]
    assert curve(rows, "nats") == {1: {10: 5.0, 20: 4.0}, 2: {10: 6.0}}
    assert final(rows, "nats") == {1: 4.0, 2: 6.0}


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_goal_is_reached_at_the_first_checkpoint_that_is_no_worse(higher_is_better: bool) -> None:
    sign = -1 if higher_is_better else 1
    rows = [row(1, step, sign * value, flops) for step, value, flops in ((30, 1.0, 3e9), (20, 2.0, 2e9), (10, 3.0, 1e9))]
    rows += [row(2, 30, sign * 2.1)]
    found = reached(rows, "nats", {1: sign * 2.0, 2: sign * 2.0, 5: 0.0}, higher_is_better)
    assert found.keys() == {1, 2}
    assert found[1] is not None and (found[1].step, found[1].student_flops, found[1].teacher_flops) == (20, 2e9, 7.0)
    assert found[2] is None
