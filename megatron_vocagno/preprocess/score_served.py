"""Losses from a server that runs the teacher: what a scoring records of it, and the losses of one shard.

The prompts are the windows that a teacher of this process reads, with the same ids in front of them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno import hub
from megatron_vocagno.corpus.manifest import SERVED, Canary, LossTotals, Scoring, Served
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.errors import ServerError
from megatron_vocagno.preprocess.windows import Windows, plan_windows
from megatron_vocagno.serving.client import Client, Servers
from megatron_vocagno.serving.engines import Description, Losses, Prompt
from megatron_vocagno.serving.teacher import CANARY, ServedTeacher, introduce

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedShard:
    """A served teacher, as a shard needs it. canary: the ids of the prompt"""

    servers: Servers
    canary: tuple[int, ...]


def canary_prompt(tokenizer: Path, lead: Sequence[int]) -> tuple[int, ...]:
    """The ids of the canary. lead: the ids in front of it, at least one. tokenizer: the folder of the teacher's tokenizer."""
    [tokens] = open_tokenizer(tokenizer).encode_batch([CANARY])
    return (*lead, *tokens.ids.tolist())


def ask_servers(
    servers: Servers, canary: Sequence[int], needed: int, vocabulary: int, teacher: Path, folder: Path
) -> tuple[Served, str, bool]:
    """What to record of the servers, the type of their forward, and whether their weights are known to be those of --teacher.

    needed      tokens of the longest request, prompt and answer together
    vocabulary  the teacher's number of ids
    teacher     the value of --teacher. Its configuration is in `folder`

    Raises ServerError: see serving.teacher, and if the weights are those of another folder.
    """
    description, losses = introduce(servers, Prompt(canary, 1, vocabulary), max(needed, len(canary) + 1))
    known = _require_root(description, servers, teacher, folder)
    served = Served(
        engine=description.engine,
        version=description.version,
        model=description.model,
        quantization=description.quantization,
        kv_cache_dtype=description.kv_cache_dtype,
        canary=losses,
    )
    return served, description.dtype, known


def _require_root(description: Description, servers: Servers, teacher: Path, folder: Path) -> bool:
    """Compare the place of the served weights with --teacher. False if they cannot be compared here. Raises ServerError."""
    root = description.root
    if root is None:
        return False
    if hub.is_id(teacher) and hub.is_id(root):
        same = os.fspath(teacher).partition("@")[0] == root.partition("@")[0]
    elif Path(root).exists():
        same = Path(root).resolve() in (folder.resolve(), teacher.resolve())
    else:
        return False
    if not same:
        raise ServerError(f"{servers.urls[0]} serves the weights at {root}, and --teacher is {teacher}: serve that, or name this")
    return True


def served_fingerprint(config: Path, model: str) -> str:
    """A fingerprint that no weights have: of the configuration, and the name under which a server has the weights."""
    content = json.dumps([json.loads(config.read_text(encoding="utf-8")), model], sort_keys=True)
    return SERVED + hashlib.sha256(content.encode()).hexdigest()


def served_losses(
    shard: ServedShard,
    scoring: Scoring,
    ids: NDArray[np.integer],
    lengths: NDArray[np.int32],
    documents: Sequence[int],
    on_progress: Callable[[int, str], object],
) -> tuple[NDArray[np.float32], LossTotals]:
    """As score_local.score_documents, by servers. The canary comes first and last.

    documents    [D], number of each document in the dataset, for errors
    on_progress  called with the number of tokens that have losses, and the state of the requests

    Raises ServerError, ServerLostError.
    """
    assert scoring.served is not None
    windows = plan_windows(lengths.astype(np.int64), scoring.context, scoring.stride)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    losses, done = np.full(len(ids), np.nan, np.float32), 0
    prompts = _Prompts(windows, starts, ids, scoring)

    def add(i: int, answered: Losses, client: Client) -> None:
        nonlocal done
        stop = int(starts[windows.document[i]] + windows.stop[i])
        losses[stop - len(answered) : stop] = answered
        done += len(answered)
        again = f", {client.retries} sent again" if client.retries else ""
        on_progress(done, f"{sum(client.open.values())} in flight{again}")

    def name(i: int) -> str:
        return f"document {documents[windows.document[i]]}, teacher tokens {windows.start[i]:,} to {windows.stop[i]:,}"

    async def ask(canary: Canary) -> None:
        async with Client(shard.servers) as client:
            teacher = await ServedTeacher.open(client, all_needed=False)
            await teacher.canary(Prompt(shard.canary, 1), canary)
            await teacher.of_many(prompts, name, lambda i, answered: add(i, answered, client))
            # nothing was written yet: losses of a model that came in between are not kept
            await teacher.canary(Prompt(shard.canary, 1), canary)

    asyncio.run(ask(scoring.served.canary))
    return losses, LossTotals(positions=sum(len(prompts[i].ids) - 1 for i in range(len(prompts))))


class _Prompts(Sequence[Prompt]):
    """The prompt of each window, made when it is read."""

    def __init__(self, windows: Windows, starts: NDArray[np.int64], ids: NDArray[np.integer], scoring: Scoring) -> None:
        self.windows, self.starts, self.ids, self.scoring = windows, starts, ids, scoring

    def __len__(self) -> int:
        return len(self.windows.document)

    def __getitem__(self, i: int) -> Prompt:  # type: ignore[override]
        start, first, stop = (int(of[i]) for of in (self.windows.start, self.windows.first, self.windows.stop))
        base = int(self.starts[self.windows.document[i]])
        front = self.scoring.front
        lead = [*(front or (self.scoring.before,))] if start == 0 else [*front, int(self.ids[base + start - 1])]
        return Prompt([*lead, *self.ids[base + start : base + stop].tolist()], len(lead) + first - start)
