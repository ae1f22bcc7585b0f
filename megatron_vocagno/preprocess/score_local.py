"""Losses from a teacher in this process: the windows of a shard's documents, in batches of similar length."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vocagno.batch.forwards import plan_forwards
from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.corpus.manifest import LossTotals
from megatron_vocagno.model.quantized import Quantization
from megatron_vocagno.model.teacher import Teacher, open_teacher
from megatron_vocagno.preprocess.score_shard import ScoreJob, ScoreJobProgress
from megatron_vocagno.preprocess.windows import Int64, Windows, plan_windows
from megatron_vocagno.preprocess.workers import report


class ScoringTeacher(Protocol):
    """The interface that scoring needs of a teacher."""

    def loss(self, input_BU: Tensor, target_BU: Tensor) -> Tensor: ...


def score_documents(
    teacher: ScoringTeacher, ids: NDArray[np.integer], lengths: NDArray[np.int32], job: ScoreJob
) -> tuple[NDArray[np.float32], LossTotals]:
    """float32 [T], the loss of each token, and the numbers of positions and padding of the forwards.

    ids      [T], documents end to end
    lengths  [D], tokens of each document
    """
    windows = plan_windows(lengths.astype(np.int64), job.scoring.context, job.scoring.stride)
    front = np.array(job.scoring.front, np.int64)
    lead_W = leads(windows, len(front))
    widths_W = lead_W + windows.widths
    forwards = plan_forwards(widths_W, job.tokens_per_batch)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    device = own_device()
    computed, done = list[Tensor](), 0
    for rows in forwards:
        batch = _batch(windows, lead_W, rows, starts)
        inputs, targets = batch.read(ids, front, job.scoring.before)
        loss_BU = teacher.loss(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        computed.append(loss_BU)  # stays on the device: a copy would wait for it
        done += int(batch.scored.sum())
        report(ScoreJobProgress(job.index, done))
    losses = np.full(len(ids), np.nan, np.float32)
    positions = 0
    for rows, loss_BU in zip(forwards, computed, strict=True):
        batch = _batch(windows, lead_W, rows, starts)
        losses[batch.place[batch.scored]] = loss_BU.cpu().numpy()[batch.scored]
        positions += loss_BU.numel()
    return losses, LossTotals(positions=positions, padding=positions - int(widths_W.sum()))


def leads(windows: Windows, front: int) -> Int64:
    """[W]: the number of positions before the input of a window's first target, if each window begins with `front` ids.

    The first target of a document is predicted from the last of these ids.
    """
    return np.where(windows.start == 0, max(front - 1, 0), front)


@dataclass(frozen=True)
class _Batch:
    """The windows of one forward, as arrays [B, U].

    position    the target's position in its document. In front of a window it counts down from the window's first target.
    first       [B, 1], the position of the window's first target
    place       index of the target in the shard's tokens
    in_window   False in front of the window and after its end
    scored      like in_window, and False for a target that another window scores: it is only context here
    """

    position: Int64
    first: Int64
    place: Int64
    in_window: NDArray[np.bool_]
    scored: NDArray[np.bool_]

    def read(self, ids: NDArray[np.integer], front: Int64, before: int) -> tuple[Int64, Int64]:
        """Inputs and targets, [B, U] int64. front [F] and before are those of the `Scoring`."""
        place = np.where(self.in_window, self.place, 0)
        # int64 first: ids may be unsigned, and IGNORE is not
        inputs = np.where(self.position == 0, before, ids[np.maximum(place - 1, 0)].astype(np.int64))
        column = np.broadcast_to(np.arange(self.position.shape[1]), self.position.shape)
        in_front = self.position < self.first
        inputs[in_front] = front[column[in_front]]
        return inputs, np.where(self.scored, ids[place].astype(np.int64), IGNORE)


def _batch(windows: Windows, lead_W: Int64, rows: Int64, starts: Int64) -> _Batch:
    first = windows.start[rows, None]
    position = first - lead_W[rows, None] + np.arange(int((lead_W + windows.widths)[rows].max()))
    in_window = (position >= first) & (position < windows.stop[rows, None])
    scored = in_window & (position >= windows.first[rows, None])
    return _Batch(position, first, starts[windows.document[rows], None] + position, in_window, scored)


@lru_cache(maxsize=1)
def open_once(path: Path, dtype: str, quantization: Quantization) -> Teacher:
    return open_teacher(path, getattr(torch, dtype), own_device(), quantization=quantization)


def own_device() -> torch.device:
    """The GPU of this process, chosen by LOCAL_RANK if a launcher has set it; the CPU if there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")
