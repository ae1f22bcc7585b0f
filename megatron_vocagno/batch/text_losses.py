"""What a model's losses say of text: sums that add up over rows, micro-batches and ranks, divided once.

Ends of documents are not in them, as they are no text; nor are the first tokens of documents: nothing before them speaks of them,
and a dummy prefix makes their number of bytes depend on the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class TextLoss(NamedTuple):
    """The losses of one model's tokens of text."""

    nats: float
    """Their sum; NaN or infinite where one of them is."""
    tokens: int
    text_bytes: int
    """UTF-8 bytes of these tokens."""

    @property
    def per_token(self) -> float:
        """Nats a token. NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """NaN without bytes."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


class BatchTextLosses(NamedTuple):
    """What the losses of both models said of the same text."""

    student: TextLoss
    teachers: tuple[TextLoss, ...]
    """None where no teacher was asked."""


def teacher_names(count: int) -> list[str]:
    """How numbers name the teachers of a run.

    >>> teacher_names(1), teacher_names(2)
    (['teacher'], ['teacher_1', 'teacher_2'])
    """
    return ["teacher"] if count == 1 else [f"teacher_{k + 1}" for k in range(count)]


def summed(rows: Iterable[tuple[TextLoss, ...]]) -> tuple[TextLoss, ...]:
    """For each teacher the sum over rows; rows in which none has spoken are left out."""
    spoken = [row for row in rows if row]
    return tuple(TextLoss(*map(sum, zip(*of_teacher, strict=True))) for of_teacher in zip(*spoken, strict=True))


def text_bytes(
    ids: npt.NDArray[np.int32], starts_document: npt.NDArray[np.bool_], byte_lengths: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """[n] UTF-8 bytes of each target, 0 for what is no text here: ends and first tokens of documents.

    ids           [n]
    byte_lengths  [V]; 0 for the token that ends a document
    """
    lengths: npt.NDArray[np.int32] = np.where(starts_document, np.int32(0), byte_lengths[ids])
    return lengths
