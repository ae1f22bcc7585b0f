"""The jobs of a dataset's shards on any engine. Building and scoring share this module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias, TypeVar

from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.workers import JobFailure, Stop


class _ShardJob(Protocol):
    @property
    def name(self) -> str: ...


J = TypeVar("J", bound=_ShardJob)
R = TypeVar("R")
JobRunner: TypeAlias = Callable[..., Iterator[R | JobFailure[J]]]
"""`run_local` or `run_ray` with all arguments bound except the task, the jobs and `stop`."""

SHOWN = 10  # shards that a message names at most


def run_jobs(
    engine: JobRunner[R, J],
    task: Callable[[J], R],
    jobs: Sequence[J],
    stop: Stop,
    on_result: Callable[[R | JobFailure[J]], object],
    participle: str,
) -> None:
    """Run all jobs and call `on_result` with each result or failure as it arrives.

    participle: the verb of the message, for example "built" or "scored".

    Raises CorpusError that names the failed jobs, after all jobs have ended. Raises an exception of `stop` at once.
    """
    failures = []
    for result in engine(task, jobs, stop=stop):
        on_result(result)
        if isinstance(result, JobFailure):
            failures.append(result)
    if failures:
        shown = "".join(f"\nshard {failure.job.name}: {failure.reason}" for failure in failures[:SHOWN])
        more = f"\nand {len(failures) - SHOWN:,} more" if len(failures) > SHOWN else ""
        raise CorpusError(
            f"{len(failures):,} of {len(jobs):,} shards could not be {participle}; the finished shards are kept{shown}{more}"
        )


def require_all(missing: Sequence[str], total: int, state: str, folder: Place) -> None:
    """Raises CorpusError if any shard is missing.

    missing  names of the shards that are not finished
    total    number of all shards
    state    how the message describes these shards, for example "missing" or "not scored"
    """
    if missing:
        raise CorpusError(
            f"{folder}: {len(missing):,} of {total:,} shards are {state}: "
            f"{', '.join(missing[:SHOWN])}{' …' if missing[SHOWN:] else ''}. "
            "Run their tasks again, or the command without --shards. Do all machines see this folder?"
        )
