"""Losses of both models over the text of a step, as sums that one all-reduce adds over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_vocagno.batch.loader import Batch
from megatron_vocagno.batch.pack import Int32
from megatron_vocagno.batch.text_losses import BatchTextLosses, TextLoss, summed, text_bytes


class TextLossMeter:
    """Sums over the rows of this rank. The student's losses are not included: GuidedObjective sums them."""

    def __init__(self, student_bytes: Int32, teacher_bytes: Int32, counts_rows: bool, device: torch.device) -> None:
        """
        student_bytes, teacher_bytes  [V] UTF-8 bytes of each token
        counts_rows                   whether this rank adds its rows to the sums, see TrainEngine
        """
        self.student_bytes, self.teacher_bytes = student_bytes, teacher_bytes
        self.counts_rows, self.device = counts_rows, device

    def sums(self, batches: Sequence[Batch], teacher_losses: Sequence[Tensor] | None) -> Tensor:
        """[2 + 3 T] float64 for T teachers: the student's tokens and bytes; nats, tokens and bytes of each teacher.

        teacher_losses  one [B, U] per batch, nats; None if there is no teacher

        All sums are 0 if another rank counts the same rows. Does not wait for the device.
        """
        targets = [batch.target_BS[batch.text_BS].numpy() for batch in batches]
        counts = [sum(map(len, targets)), sum(int(self.student_bytes[ids].sum()) for ids in targets)]
        cached = () if teacher_losses is None else summed(batch.teacher_text_losses for batch in batches)
        sums_N = torch.tensor([*counts, *(number for teacher in cached for number in teacher)], dtype=torch.float64)
        sums_N = sums_N.to(self.device)
        if teacher_losses is not None and not cached:
            scored = [self._scored(batch, loss_BU) for batch, loss_BU in zip(batches, teacher_losses, strict=True)]
            sums_N = torch.cat([sums_N, torch.stack(scored).sum(0)])
        return sums_N if self.counts_rows else torch.zeros_like(sums_N)

    def _scored(self, batch: Batch, loss_BU: Tensor) -> Tensor:
        """[3] nats, tokens and bytes of a batch that a loaded teacher has scored."""
        lengths_BU = np.zeros(loss_BU.shape, np.int32)
        for b, (ids, segments) in enumerate(zip(batch.teacher_targets, batch.teacher_segments, strict=True)):
            # only targets: the prefix in front of them has none
            starts = np.diff(segments[len(segments) - len(ids) :], prepend=np.int32(0)) > 0
            lengths_BU[b, : len(ids)] = text_bytes(ids, starts, self.teacher_bytes)
        text_BU = lengths_BU > 0
        nats = loss_BU.where(torch.from_numpy(text_BU).to(loss_BU.device), 0.0).sum(dtype=torch.float64)
        counts = torch.tensor([int(text_BU.sum()), int(lengths_BU.sum())], dtype=torch.float64).to(nats.device)
        return torch.cat([nats[None], counts])


def named_text_losses(student_nats: float, sums_N: Tensor) -> BatchTextLosses:
    """The sums over all ranks as named fields. sums_N: on the host, see TextLossMeter.sums."""
    tokens, student_bytes, *rest = sums_N.tolist()
    teachers = tuple(TextLoss(rest[i], int(rest[i + 1]), int(rest[i + 2])) for i in range(0, len(rest), 3))
    return BatchTextLosses(TextLoss(student_nats, int(tokens), int(student_bytes)), teachers)
