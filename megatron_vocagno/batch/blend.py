"""Rows of several datasets, mixed in exact shares.

Each dataset keeps its own order and its own epochs; the mixture says whose next row comes. Of the first n rows, the heaviest
dataset gives floor(n * its share); the next one that part of the rest which is its share of the rest; and so on. So every
place is a pure function of its number, in whole numbers, and no dataset is ever far from its share: in any window of
consecutive rows it gives its share of them, give or take less than `1 + 1/1 + 1/2 + ... + 1/(k - 2)` rows for k datasets
(1 row for two, 2 for three, 3.1 for six).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from megatron_vocagno.batch.loader import TrainRows
from megatron_vocagno.batch.pack import DocumentSpan, Row


class Mixture:
    """Which dataset gives which row."""

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: above 0, as they were written: 0.7 is seven tenths."""
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = tuple(weight / sum(exact) for weight in exact)
        unit = math.lcm(*(share.denominator for share in self.shares))
        # heaviest first: the bound above needs it
        self._order = sorted(((d, int(share * unit)) for d, share in enumerate(self.shares)), key=lambda part: -part[1])
        self._unit = unit

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows are each dataset's.

        >>> Mixture([0.7, 0.3]).counts(10), [Mixture([0.7, 0.3]).place(row) for row in range(4)]
        ([7, 3], [(1, 0), (0, 0), (0, 1), (1, 1)])
        """
        counts = [0] * len(self.shares)
        left = self._unit
        for d, weight in self._order:
            counts[d] = rows * weight // left
            rows -= counts[d]
            left -= weight
        return counts

    def place(self, index: int) -> tuple[int, int]:
        """The dataset that gives row `index`, and which of its own rows that is."""
        before, after = self.counts(index), self.counts(index + 1)
        d = next(d for d, count in enumerate(before) if after[d] > count)
        return d, before[d]

    def fingerprint(self, datasets: Sequence[str]) -> str:
        """Of the mixture of datasets with these fingerprints: equal where all rows are."""
        return ", ".join(f"{self.shares[d]} of {datasets[d]}" for d, _ in self._order)


class BlendedRows:
    """Rows without end, of one dataset or of several."""

    def __init__(self, parts: Sequence[TrainRows], mixture: Mixture) -> None:
        """parts: of one row length, one a share."""
        self.parts, self.mixture, self.row_length = parts, mixture, parts[0].row_length

    def __getitem__(self, index: int) -> Row:
        part, own = self.mixture.place(index)
        return self.parts[part][own]

    def pieces(self, index: int) -> tuple[int, list[DocumentSpan]]:
        """The dataset that gives row `index`, and what the row holds of it."""
        part, own = self.mixture.place(index)
        return part, self.parts[part].pieces(own)

    @property
    def tokens_per_row(self) -> float:
        """Mean number of targets."""
        shares = zip(self.parts, self.mixture.shares, strict=True)
        return sum(part.tokens_per_row * float(share) for part, share in shares)

    def epochs(self, rows: int) -> list[float]:
        """How often each dataset has been read when so many rows are consumed."""
        return [n / part.rows_in_epoch for n, part in zip(self.mixture.counts(rows), self.parts, strict=True)]
