"""Statistics over seeds for the tables: mean, spread, and differences between arms seed by seed.

A row is one line of the results of `running.py`. Every statistic includes its number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Statistics of one score over seeds."""

    mean: float
    sd: float | None
    """With n - 1 in the denominator, or None if n = 1."""
    n: int

    def show(self, form: str = ".3f", sign: str = "") -> str:
        spread = "" if self.sd is None else f" ± {self.sd:{form}}"
        return f"{self.mean:{sign}{form}}{spread} (n={self.n})"


@dataclass(frozen=True)
class Paired:
    """Arm minus reference, over the seeds that both have."""

    difference: Sample
    positive: int
    negative: int
    """Number of seeds with a difference of that sign."""

    def show(self, form: str = ".3f") -> str:
        same, sign = max((self.positive, "+"), (self.negative, "−"))
        agreed = "" if self.difference.n == 1 else f"; {same} of {self.difference.n} {sign}"
        text = self.difference.show(form, "+").replace("-", "−")
        return text.replace(")", f"{agreed})")


def sample(values: Sequence[float]) -> Sample:
    """Raises ValueError if there are no values."""
    if not values:
        raise ValueError("no values: a statistic needs at least one seed")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Sample(mean, None, 1)
    return Sample(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)), len(values))


def paired(arm: dict[int, float], reference: dict[int, float]) -> Paired | None:
    """arm, reference: seed -> value. Returns None if they share no seed."""
    differences = [arm[seed] - reference[seed] for seed in sorted(arm.keys() & reference.keys())]
    if not differences:
        return None
    return Paired(sample(differences), sum(d > 0 for d in differences), sum(d < 0 for d in differences))


T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110)
"""The 97.5th percentile of Student's t with 1, 2, … degrees of freedom. The last one is used for more."""


def interval(found: Sample) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, or None if n = 1. The values are taken to be independent.

    >>> round(interval(sample([1.0, 2.0, 3.0])), 3)
    2.484
    """
    if found.sd is None:
        return None
    return T_975[min(found.n - 1, len(T_975)) - 1] * found.sd / math.sqrt(found.n)


def curve(rows: Sequence[Row], score: str) -> dict[int, dict[int, float]]:
    """Seed -> step -> value, for rows of one arm that have the score."""
    found: dict[int, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        if score in row["scores"]:
            found.setdefault(row["seed"], {})[row["step"]] = row["scores"][score]
    return found


def final(rows: Sequence[Row], score: str) -> dict[int, float]:
    """Seed -> value at the last step that has the score."""
    return {seed: steps[max(steps)] for seed, steps in curve(rows, score).items()}


@dataclass(frozen=True)
class Reached:
    """The first checkpoint of a run whose score is no worse than a goal."""

    step: int
    student_flops: float
    teacher_flops: float


def reached(rows: Sequence[Row], score: str, goals: dict[int, float], higher_is_better: bool) -> dict[int, Reached | None]:
    """For each common seed, the first checkpoint at which the arm reaches the goal, or None if it never does."""
    found: dict[int, Reached | None] = {}
    for seed in sorted({row["seed"] for row in rows} & goals.keys()):
        found[seed] = None
        for row in sorted((row for row in rows if row["seed"] == seed and score in row["scores"]), key=lambda row: row["step"]):
            value, goal = row["scores"][score], goals[seed]
            if value >= goal if higher_is_better else value <= goal:
                found[seed] = Reached(row["step"], row["costs"]["student_flops"], row["costs"]["teacher_flops"])
                break
    return found
