"""Bits per byte of a student on clean held-out text, and on the halves that the teacher finds easy and hard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from megatron_vocagno.batch.cached import CachedLosses, guides
from megatron_vocagno.batch.loader import IGNORE, collate
from megatron_vocagno.batch.pack import Rows
from megatron_vocagno.corpus.dataset import AlignedDataset

ROWS_A_FORWARD = 8


@dataclass(frozen=True)
class HeldOut:
    """R rows of S student positions."""

    input_RS: Tensor
    """int64"""
    target_RS: Tensor
    """int64, IGNORE for targets without text: padding, first tokens and ends of documents."""
    guide_RS: NDArray[np.float32]
    """The highest teacher loss of a target's span, nats, or NaN if the target has no span."""
    bytes_RS: NDArray[np.int64]
    """Bytes of each target's text, 0 if it is ignored."""

    @classmethod
    def of(cls, path: Path, row_length: int) -> HeldOut:
        """Read a dataset with teacher losses, in file order, in the rows that training makes of it."""
        data = AlignedDataset.open(path)
        source = CachedLosses(data)
        rows = Rows(data, np.arange(len(data), dtype=np.int32), row_length, source)
        read = [rows[k] for k in range(len(rows))]
        batch = collate(read, row_length)
        guide_RS = np.full((len(read), row_length), np.nan, np.float32)
        bytes_RS = np.zeros((len(read), row_length), np.int64)
        for r, row in enumerate(read):
            n = len(row.target_ids)
            guide_RS[r, :n] = guides(source.read(rows.pieces(r)), "max")
            bytes_RS[r, :n] = np.where(row.is_text, data.student_byte_lengths[row.target_ids], 0)
        target_RS = batch.target_BS.masked_fill(torch.from_numpy(bytes_RS == 0), IGNORE)
        return cls(batch.input_BS, target_RS, guide_RS, bytes_RS)

    @property
    def text_RS(self) -> NDArray[np.bool_]:
        """Whether a target has text. All targets with text have a guide."""
        text: NDArray[np.bool_] = self.bytes_RS > 0
        return text

    @property
    def easy_RS(self) -> NDArray[np.bool_]:
        """The half of the tokens that the teacher finds easier."""
        middle = np.median(self.guide_RS[self.text_RS])
        easy: NDArray[np.bool_] = self.text_RS & (self.guide_RS <= middle)
        return easy

    def scores(self, student: PreTrainedModel) -> dict[str, float]:
        """bits_per_byte of all tokens; _easy, _hard: of the two halves, each divided by its own bytes."""
        nats_RS, easy_RS = self.nats(student), self.easy_RS
        parts = {"": self.text_RS, "_easy": easy_RS, "_hard": self.text_RS & ~easy_RS}
        return {
            f"bits_per_byte{part}": float(nats_RS[of].sum(dtype=np.float64) / math.log(2) / self.bytes_RS[of].sum())
            for part, of in parts.items()
        }

    @torch.no_grad()
    def nats(self, student: PreTrainedModel) -> NDArray[np.float32]:
        """[R, S] the student's losses, 0 for targets without text."""
        losses = [
            functional.cross_entropy(student(input_BS).logits.transpose(1, 2), target_BS, reduction="none", ignore_index=IGNORE)
            for input_BS, target_BS in zip(
                torch.split(self.input_RS, ROWS_A_FORWARD), torch.split(self.target_RS, ROWS_A_FORWARD), strict=True
            )
        ]
        nats: NDArray[np.float32] = torch.cat(losses).numpy()
        return nats
