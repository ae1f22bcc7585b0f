"""A teacher that servers run: what is proved before its losses are used, and the losses of many prompts.

The canary is a fixed text. Its losses are requested at the start of a scoring, and before and after each shard, from each server.
If they change by more than rounding, another model answers, or the same one with other weights, an adapter or another
quantization.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Sequence

from megatron_vocagno.corpus.manifest import CANARY_TOLERANCE, Canary
from megatron_vocagno.errors import ServerError, ServerLostError
from megatron_vocagno.serving.client import Client, Servers
from megatron_vocagno.serving.engines import SGLANG_RESERVES, Description, Engine, Losses, Prompt, recognize

log = logging.getLogger(__name__)
CANARY = (
    "The derivative of x squared is 2x, and the integral of 2x is x squared plus a constant. In 1969 people walked on the Moon; "
    "Neil Armstrong was the first. def mean(values): return sum(values) / len(values)  # fails if there are none\n"
    "Wer im Glashaus sitzt, soll nicht mit Steinen werfen. If 17 of 40 seats are taken, 23 are free, and 23 / 40 = 57.5 %."
)


class ServedTeacher:
    """Requests losses from the servers of one teacher. For one event loop."""

    def __init__(self, client: Client, engine: Engine, description: Description) -> None:
        self.client, self.engine, self.description = client, engine, description

    @classmethod
    async def open(cls, client: Client, all_needed: bool = True) -> ServedTeacher:
        """all_needed: whether a server without an answer is an error. If not, it is left out, unless it is the last one.

        Raises ServerError if a server cannot give losses, or if two servers do not serve the same.
        """
        answered: dict[str, tuple[Engine, Description]] = {}
        for url in client.servers.urls:
            try:
                answered[url] = await recognize(client, url)
            except ServerLostError as error:
                if all_needed or (not answered and url == client.servers.urls[-1]):
                    raise
                log.warning("note: continuing without %s: %s", url, error)
        client.urls, found = list(answered), list(answered.values())
        for url, (engine, description) in answered.items():
            if (type(engine), description) != (type(found[0][0]), found[0][1]):
                raise ServerError(
                    "two servers are not alike, so their losses cannot be mixed:\n"
                    f"  {client.urls[0]}: {type(found[0][0]).__name__}, {found[0][1]}\n"
                    f"  {url}: {type(engine).__name__}, {description}"
                )
        return cls(client, *found[0])

    async def losses(self, prompt: Prompt, url: str | None = None) -> Losses:
        """[len(ids) - known], float32, nats. url: None means any server. Raises ServerError."""
        path, content = self.engine.request(self.description.model, prompt)
        return self.engine.losses(await self.client.post(path, content, url), prompt)

    async def canary(self, prompt: Prompt, before: Canary | None = None) -> Canary:
        """The canary of the first server. With `before`, servers that do not answer are left out, unless none does.

        Raises ServerLostError if one does not answer, if two differ, or if one differs from `before`.
        """
        found: dict[str, Canary] = {}
        for url in self.client.urls:
            try:
                found[url] = Canary(losses=tuple((await self.losses(prompt, url)).tolist()))
            except ServerLostError as error:
                if before is None or (not found and url == self.client.urls[-1]):
                    raise
                log.warning("note: continuing without %s: %s", url, error)
        first = next(iter(found))
        reference, where = (found[first], f"of {first}") if before is None else (before, "of before")
        for url, canary in found.items():
            if not all(map(math.isfinite, canary.losses)):
                raise ServerError(f"{url}: the teacher has losses of a plain text that are not finite: {canary}")
            if canary != reference:
                raise ServerLostError(
                    f"{url}: another model answers. Its losses of a fixed text differ by {canary.distance(reference):.2f} nats "
                    f"per token from those {where}; up to {CANARY_TOLERANCE} is rounding. Means: {canary}, {where} {reference}"
                )
        return found[first]

    async def of_many(
        self, prompts: Sequence[Prompt], name: Callable[[int], str], on_answer: Callable[[int, Losses], object]
    ) -> None:
        """Ask for the losses of all prompts, the longest first, and call `on_answer` with each index and result.

        name: how an error calls a prompt, by its index

        Raises ServerError of the first prompt that fails, and then sends no more.
        """
        order = iter(sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids)))
        tasks = [asyncio.create_task(self._work(order, prompts, name, on_answer)) for _ in range(self.client.servers.in_flight)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(
        self,
        order: Iterator[int],
        prompts: Sequence[Prompt],
        name: Callable[[int], str],
        on_answer: Callable[[int, Losses], object],
    ) -> None:
        for i in order:
            try:
                answered = await self.losses(prompts[i])
            except ServerLostError:
                raise
            except ServerError as error:
                raise ServerError(f"{name(i)}: {error}") from None
            on_answer(i, answered)


def introduce(servers: Servers, canary: Prompt, needed: int) -> tuple[Description, Canary]:
    """The description of the servers, and their canary. Waits for the answers.

    needed: tokens of the longest request, prompt and answer together

    Raises ServerError: see engines.recognize, and if a prompt would be too long.
    """

    async def ask() -> tuple[Description, Canary]:
        async with Client(servers) as client:
            teacher = await ServedTeacher.open(client)
            longest = teacher.description.longest
            if longest is not None and longest < needed:
                raise ServerError(
                    f"{servers.urls[0]} accepts {longest:,} tokens, and this scoring needs {needed:,}. Start it "
                    f"with --max-model-len {needed} (SGLang: --context-length {needed + SGLANG_RESERVES}), "
                    "or use a smaller --context"
                )
            return teacher.description, await teacher.canary(canary)

    return asyncio.run(ask())
