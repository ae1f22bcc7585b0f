"""Converts counts to a column chart: rectangles and labels. Horizontal positions are percentages, so text keeps its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_COLUMNS = 40


@dataclass(frozen=True)
class Column:
    x: float  # percent of the width
    width: float
    height: float  # percent of the highest
    hover: str


@dataclass(frozen=True)
class Label:
    x: float  # percent of the width
    text: str

    @property
    def anchor(self) -> str:
        """The `text-anchor` that keeps the text inside the chart."""
        return "end" if self.x > 25 else "start"


@dataclass(frozen=True)
class Chart:
    """A column chart. description: its content as text, for screen readers."""

    title: str
    description: str
    columns: tuple[Column, ...]
    highest: int
    ticks: tuple[Label, ...]
    marks: tuple[Label, ...]


def columns(
    title: str, counts: Sequence[int], hovers: Sequence[str], ticks: Mapping[float, str], marks: Mapping[str, float]
) -> Chart:
    """One column per count. ticks, marks: texts and their positions, in columns from the left edge."""
    n, highest = len(counts), max(max(counts), 1)
    drawn = (Column(100 * i / n, 100 / n, 100 * c / highest, hovers[i]) for i, c in enumerate(counts) if c)
    beneath = (Label(100 * place / n, text) for place, text in ticks.items())
    named = (Label(100 * place / n, text) for text, place in marks.items())
    described = "; ".join([*(hover for hover, count in zip(hovers, counts, strict=True) if count), *marks])
    return Chart(title, described, tuple(drawn), highest, tuple(beneath), tuple(named))


def histogram(title: str, values: NDArray[np.float64], unit: str, form: Callable[[float], str]) -> Chart:
    """At most 40 equal bins of a round width. values: [N], at least one. unit: the unit of the counts, such as "rows"."""
    step = _round_step(float(values.max() - values.min()))
    first = int(np.floor(values.min() / step))
    bins = np.floor(values / step).astype(np.int64) - first
    counts = np.bincount(bins).tolist()
    hovers = [f"{form((first + i) * step)} to {form((first + i + 1) * step)}: {c:,} {unit}" for i, c in enumerate(counts)]
    every = next(n for n in (1, 2, 5, 10) if len(counts) / n <= 6)
    ticks = {float(i): form((first + i) * step) for i in range(len(counts) + 1) if (first + i) % every == 0}
    return columns(title, counts, hovers, ticks, _marks(values, form, lambda value: value / step - first))


def doubling(title: str, values: NDArray[np.integer[Any]], unit: str) -> Chart:
    """Bins [1, 2), [2, 4), [4, 8) … values: [N], at least one value, each at least 1."""
    exponents = np.frexp(values.astype(np.float64))[1] - 1
    first = int(exponents.min())
    counts = np.bincount(exponents - first).tolist()
    hovers = [f"{2 ** (first + i):,} to {2 ** (first + i + 1) - 1:,}: {c:,} {unit}" for i, c in enumerate(counts)]
    every = -(-len(counts) // 5)
    ticks = {float(i): f"{2 ** (first + i):,}" for i in range(0, len(counts) + 1, every)}
    marks = _marks(values.astype(np.float64), lambda value: f"{value:,.0f}", lambda value: float(np.log2(value)) - first)
    return columns(title, counts, hovers, ticks, marks)


def _marks(values: NDArray[np.float64], form: Callable[[float], str], place: Callable[[float], float]) -> dict[str, float]:
    # from right to left, so that no label crosses the line of another one
    named = {"max": float(values.max()), "p99": float(np.quantile(values, 0.99)), "mean": float(values.mean())}
    return {f"{name} {form(value)}": place(value) for name, value in named.items()}


def _round_step(span: float) -> float:
    """The smallest of …, 0.01, 0.02, 0.05, 0.1, … that needs no more than MOST_COLUMNS - 1 steps."""
    steps = (digit * 10.0**power for power in range(-3, 12) for digit in (1, 2, 5))
    return next(step for step in steps if span / step <= MOST_COLUMNS - 1)
