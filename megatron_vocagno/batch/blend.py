"""Rows of several datasets, mixed in exact shares.

Each dataset keeps its own order and its own epochs. The mixture decides which dataset provides each row. Among the first n rows,
floor(n * share) come from the dataset with the largest share. The next dataset gets its part of the remaining rows by the same
formula, and so on. The dataset of a row is therefore a pure function of the row's number, computed with integers, and every
dataset stays close to its share: in any window of consecutive rows, the number of its rows differs from its share by less than
`1 + 1/1 + 1/2 + ... + 1/(k - 2)` for k datasets (1 row for two datasets, 2 for three, 3.1 for six).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from megatron_vocagno.batch.loader import TrainRows
from megatron_vocagno.batch.pack import DocumentSpan, Row


class Mixture:
    """The dataset that each row comes from."""

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: above 0. They count as the decimal numbers that they are written as: 0.7 is exactly seven tenths."""
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = tuple(weight / sum(exact) for weight in exact)
        unit = math.lcm(*(share.denominator for share in self.shares))
        # the largest share first: the bound above requires this order
        self._order = sorted(((d, int(share * unit)) for d, share in enumerate(self.shares)), key=lambda part: -part[1])
        self._unit = unit

    def counts(self, rows: int) -> list[int]:
        """Number of rows from each dataset among the first `rows` rows.

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
        """The dataset of row `index`, and the row's number within that dataset."""
        before, after = self.counts(index), self.counts(index + 1)
        d = next(d for d, count in enumerate(before) if after[d] > count)
        return d, before[d]

    def fingerprint(self, datasets: Sequence[str]) -> str:
        """Fingerprint of the mixture of datasets with these fingerprints. Equal fingerprints mean equal rows."""
        return ", ".join(f"{self.shares[d]} of {datasets[d]}" for d, _ in self._order)


class BlendedRows:
    """An endless sequence of rows from one or more datasets."""

    def __init__(self, parts: Sequence[TrainRows], mixture: Mixture) -> None:
        """parts: one per share of the mixture, all with the same row length."""
        self.parts, self.mixture, self.row_length = parts, mixture, parts[0].row_length

    def __getitem__(self, index: int) -> Row:
        part, own = self.mixture.place(index)
        return self.parts[part][own]

    def pieces(self, index: int) -> tuple[int, list[DocumentSpan]]:
        """The dataset of row `index`, and the spans of its documents that the row holds."""
        part, own = self.mixture.place(index)
        return part, self.parts[part].pieces(own)

    @property
    def tokens_per_row(self) -> float:
        """Mean number of targets per row."""
        shares = zip(self.parts, self.mixture.shares, strict=True)
        return sum(part.tokens_per_row * float(share) for part, share in shares)

    def epochs(self, rows: int) -> list[float]:
        """Epochs of each dataset that have been read after `rows` rows."""
        return [n / part.rows_in_epoch for n, part in zip(self.mixture.counts(rows), self.parts, strict=True)]
