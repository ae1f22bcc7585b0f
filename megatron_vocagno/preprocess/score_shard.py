"""Compute a teacher's losses for one shard of a dataset.

Every engine runs `score_shard`. It may be killed at any moment, and run again.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vocagno.batch.forwards import plan_forwards
from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.corpus.indexed import PairReader
from megatron_vocagno.corpus.losses import ShardLosses, link_losses, read_losses, rounded, write_losses
from megatron_vocagno.corpus.manifest import LossTotals, Scoring, ShardRecord
from megatron_vocagno.errors import ChangedError, CorpusError
from megatron_vocagno.model.quantized import Quantization
from megatron_vocagno.model.teacher import Teacher, open_teacher
from megatron_vocagno.preprocess.reuse import ScoredDocuments, open_scored
from megatron_vocagno.preprocess.score_served import ServedShard, served_losses
from megatron_vocagno.preprocess.windows import Int64, Windows, plan_windows
from megatron_vocagno.preprocess.workers import report


@dataclass(frozen=True)
class ScoreJob:
    """A shard to score.

    replace  overwrite losses that were computed with other settings
    served   where the teacher is served. None: it runs in this process
    reuse    a scored dataset, whose losses are taken where it has the same teacher tokens
    teacher  None: all losses are taken from `reuse`
    """

    index: int
    folder: Path
    record: ShardRecord
    scoring: Scoring
    teacher: Path | None
    tokens_per_batch: int
    replace: bool = False
    served: ServedShard | None = None
    reuse: Path | None = None

    @property
    def name(self) -> str:
        """The name of the shard."""
        return self.folder.name


@dataclass(frozen=True)
class ScoreResult:
    """The losses of a shard.

    seconds  time of the forwards, 0 if the losses existed already
    taken    tokens whose losses are those of the dataset `reuse`
    """

    job: ScoreJob
    losses: ShardLosses
    seconds: float = 0.0
    taken: int = 0


@dataclass(frozen=True)
class ScoreJobProgress:
    """The progress of one shard: tokens that are scored. state: of the requests to a server"""

    index: int
    tokens: int
    state: str = ""


class ScoringTeacher(Protocol):
    """The interface that scoring needs of a teacher."""

    def loss(self, input_BU: Tensor, target_BU: Tensor) -> Tensor: ...


def score_shard(job: ScoreJob, teacher: ScoringTeacher | None = None) -> ScoreResult:
    """Compute the losses of a shard, or reuse them if they exist.

    teacher: None means that it is opened, once per process

    Raises ChangedError if they were computed with other settings, ModelError for a teacher that cannot be opened, ServerError and
    OSError.
    """
    found = read_losses(job.folder, job.record)
    if found is not None and found.scoring == job.scoring:
        return ScoreResult(job, found)
    if found is not None and not job.replace:
        raise ChangedError(f"{job.folder} was scored with other settings:\n{difference(found.scoring, job.scoring)}")
    scored = None if job.reuse is None else open_scored(job.reuse)
    if scored is not None and (folder := scored.shard_like(job.record)) is not None:
        return ScoreResult(job, link_losses(folder, job.folder, job.record), taken=job.record.totals.teacher_tokens)
    pair = PairReader(job.folder / "teacher")
    ids, lengths, begin = pair.flat(), pair.lengths, time.perf_counter()
    if scored is None:
        nats, forwards = _computed(ids, lengths, job, teacher)
        losses, taken = rounded(nats), 0
    else:
        losses, forwards, taken = _taken(scored, ids, lengths, job, teacher)
    written = write_losses(job.folder, job.record, job.scoring, losses, lengths.astype(np.int64), forwards)
    return ScoreResult(job, written, time.perf_counter() - begin, taken)


def _taken(
    scored: ScoredDocuments,
    ids: NDArray[np.integer],
    lengths: NDArray[np.int32],
    job: ScoreJob,
    teacher: ScoringTeacher | None,
) -> tuple[NDArray[np.float16], LossTotals, int]:
    """The losses of a shard's tokens, the forwards, and the number of losses that were taken. Missing losses are computed."""
    losses, known = scored.losses(ids, lengths)
    if known.all():
        return losses, LossTotals(positions=len(ids)), len(ids)
    if job.teacher is None:
        raise CorpusError(
            f"{int((~known).sum()):,} of {len(known):,} documents of {job.folder} are not in {job.reuse}: "
            "give --teacher to score these"
        )
    new_T = np.repeat(~known, lengths)
    nats, forwards = _computed(ids[new_T], lengths[~known], job, teacher)
    losses[new_T] = rounded(nats)
    taken = int((~new_T).sum())
    return losses, forwards.model_copy(update={"positions": forwards.positions + taken}), taken


def _computed(
    ids: NDArray[np.integer], lengths: NDArray[np.int32], job: ScoreJob, teacher: ScoringTeacher | None
) -> tuple[NDArray[np.float32], LossTotals]:
    """By the server, or by the teacher in this process: see score_documents."""
    if job.served is not None:
        return served_losses(job.served, job.scoring, ids, lengths, partial(_report, job.index))
    if teacher is None:
        assert job.teacher is not None
        teacher = open_once(job.teacher, job.scoring.dtype, job.scoring.quantization)
    return score_documents(teacher, ids, lengths, job)


def _report(index: int, tokens: int, state: str) -> None:
    report(ScoreJobProgress(index, tokens, state))


def difference(then: Scoring, now: Scoring, one: str = "then", other: str = "now") -> str:
    """A line for each field in which two scorings differ, and the advice."""
    fields = [
        f"  {field}: {getattr(then, field)} {one}, {getattr(now, field)} {other}"
        for field in type(then).model_fields
        if getattr(then, field) != getattr(now, field)
    ]
    return "\n".join([*fields, "  Use the same options as then, or --replace to score it again."])


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
