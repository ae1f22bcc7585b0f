"""Compute a teacher's losses for one shard of a dataset.

Every engine runs `score_shard`. It may be killed at any moment, and run again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.indexed import PairReader
from megatron_vocagno.corpus.losses import ShardLosses, link_losses, read_losses, rounded, write_losses
from megatron_vocagno.corpus.manifest import LossTotals, Scoring, ShardRecord
from megatron_vocagno.errors import ChangedError, CorpusError
from megatron_vocagno.preprocess.reuse import ScoredDocuments, open_scored
from megatron_vocagno.preprocess.score_served import ServedShard, served_losses
from megatron_vocagno.preprocess.workers import report

if TYPE_CHECKING:
    from megatron_vocagno.preprocess.score_local import ScoringTeacher


@dataclass(frozen=True)
class ScoreJob:
    """A shard to score.

    replace  overwrite losses that were computed with other settings
    served   where the teacher is served. None: it runs in this process
    reuse    a scored dataset, whose losses are taken where it has the same teacher tokens
    teacher  None: all losses are taken from `reuse`
    first    number of its first document in the dataset, for errors
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
    first: int = 0

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
        nats, forwards = _computed(ids, lengths, range(job.first, job.first + len(lengths)), job, teacher)
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
    new = (job.first + np.flatnonzero(~known)).tolist()
    nats, forwards = _computed(ids[new_T], lengths[~known], new, job, teacher)
    losses[new_T] = rounded(nats)
    taken = int((~new_T).sum())
    return losses, forwards.model_copy(update={"positions": forwards.positions + taken}), taken


def _computed(
    ids: NDArray[np.integer],
    lengths: NDArray[np.int32],
    documents: Sequence[int],
    job: ScoreJob,
    teacher: ScoringTeacher | None,
) -> tuple[NDArray[np.float32], LossTotals]:
    """By the server, or by the teacher in this process: see score_local.score_documents."""
    if job.served is not None:
        return served_losses(job.served, job.scoring, ids, lengths, documents, partial(_report, job.index))
    # only here: it imports torch, which scoring by a server does not need
    from megatron_vocagno.preprocess.score_local import open_once, score_documents

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
