"""A model's losses over text: sums that are added over rows, micro-batches and ranks, and divided once at the end.

The sums leave out the tokens that end documents, because these are not text. They also leave out the first tokens of documents:
these are predicted without any context, and a tokenizer that adds a dummy prefix makes their number of bytes depend on the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NEAR_CHANCE = 0.9
"""A mean loss above this share of ln(vocabulary) is hardly better than chance."""


class TextLoss(NamedTuple):
    """The summed losses of one model over tokens of text."""

    nats: float
    """Sum of the losses. NaN or infinite if one of the losses is."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes of these tokens."""

    @property
    def per_token(self) -> float:
        """Nats per token. NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte. NaN without bytes."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


class BatchTextLosses(NamedTuple):
    """The losses of the student and its teachers over the same text."""

    student: TextLoss
    teachers: tuple[TextLoss, ...]
    """Empty if no teacher was used."""


def teacher_names(count: int) -> list[str]:
    """The names of `count` teachers in logs and metrics.

    >>> teacher_names(1), teacher_names(2)
    (['teacher'], ['teacher_1', 'teacher_2'])
    """
    return ["teacher"] if count == 1 else [f"teacher_{k + 1}" for k in range(count)]


def summed(rows: Iterable[tuple[TextLoss, ...]]) -> tuple[TextLoss, ...]:
    """The sum over rows for each teacher. Rows without losses are left out."""
    scored = [row for row in rows if row]
    return tuple(TextLoss(*map(sum, zip(*of_teacher, strict=True))) for of_teacher in zip(*scored, strict=True))


def text_bytes(
    ids: npt.NDArray[np.int32], starts_document: npt.NDArray[np.bool_], byte_lengths: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """[n] UTF-8 bytes of each target; 0 for the ends and the first tokens of documents, which do not count as text here.

    ids              [n]
    starts_document  [n]
    byte_lengths     [V] bytes of each token of the vocabulary; 0 for the token that ends a document
    """
    lengths: npt.NDArray[np.int32] = np.where(starts_document, np.int32(0), byte_lengths[ids])
    return lengths
