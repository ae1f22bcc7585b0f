"""Requests over HTTP to servers that give the same answers.

At most `in_flight` requests are open at a time. Each goes to the server with the fewest failures since its last answer, and of
these to the one with the fewest open requests. A request is sent again if
the connection fails or times out, or if the server answers 408, 425, 429 or 5xx.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2
from typing_extensions import Self

from megatron_vocagno.errors import ServerError, ServerLostError

Json = Any
SENT_AGAIN = frozenset({408, 425, 429, *range(500, 600)})
ABSENT = (403, 404, 405)
"""Statuses of a path that a server does not have, or that it does not allow."""
LONGEST_PAUSE = 60.0
"""Seconds."""
NOT_A_NUMBER = "Out of range float values"
"""In vLLM's answer if a log-probability is NaN, which JSON does not have."""
SHOWN = 500
"""Characters of an answer that a message shows."""


@dataclass(frozen=True)
class Servers:
    """The servers of a teacher, and how requests are sent.

    urls       base URLs, without /v1. All serve the same teacher
    model      the name under which it is served. None: the only one that the server has
    in_flight  open requests at a time, over all URLs
    timeout    seconds until a request without an answer is sent again
    tries      how often a request is sent at most
    key        sent as a bearer token
    """

    urls: tuple[str, ...]
    model: str | None = None
    in_flight: int = 64
    timeout: float = 600.0
    tries: int = 8
    key: str | None = None


@dataclass(frozen=True)
class Answer:
    """The content of an answer with status 200, and the URL of the server that gave it."""

    url: str
    content: Json


class Client:
    """Sends requests from one event loop.

    urls     the servers; a caller may leave out one that does not answer
    open     requests that are being answered, by URL
    retries  requests that were sent again
    """

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.urls: Sequence[str] = servers.urls
        self.open = dict.fromkeys(servers.urls, 0)
        self.retries = 0
        self._failures = dict.fromkeys(servers.urls, 0)
        headers = {"Authorization": f"Bearer {servers.key}"} if servers.key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=servers.in_flight)
        # no proxy of the environment: it may change a prompt, and the servers are named by the user
        self._http = httpx2.AsyncClient(headers=headers, timeout=servers.timeout, limits=limits, trust_env=False)
        self._free = asyncio.Semaphore(servers.in_flight)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def get(self, url: str, path: str) -> Json | None:
        """The answer of one server, or None if it does not have this path or does not allow it. Raises ServerError."""
        _, answer = await self._send("GET", path, None, [url], (200, *ABSENT))
        return None if answer.status_code in ABSENT else _content(answer)

    async def has(self, url: str, path: str) -> bool:
        """Whether a server has an endpoint for POST. An empty request is sent, which the endpoint refuses. Raises ServerError."""
        _, answer = await self._send("POST", path, {}, [url], (200, 400, 422, *ABSENT))
        return answer.status_code not in ABSENT

    async def post(self, path: str, body: Json, url: str | None = None) -> Answer:
        """The answer of a server. url: None means any of them. Raises ServerError."""
        async with self._free:
            asked, answer = await self._send("POST", path, body, self.urls if url is None else [url])
        return Answer(asked, _content(answer))

    async def _send(
        self, method: str, path: str, body: Json, urls: Sequence[str], expected: Sequence[int] = (200,)
    ) -> tuple[str, httpx2.Response]:
        """The first answer with an expected status, and the URL that it came from."""
        url = cause = ""
        for attempt in range(1, self.servers.tries + 1):
            url = min(urls, key=lambda one: (self._failures[one], self.open[one]))
            self.open[url] += 1
            try:
                answer = await self._http.request(method, url + path, json=body)
            except httpx2.TransportError as error:
                cause, pause = f"{type(error).__name__}: {error}".removesuffix(": "), 0.0
            else:
                if answer.status_code in expected:
                    self._failures[url] = 0
                    return url, answer
                cause = f"{answer.status_code} {answer.text[:SHOWN]}"
                if answer.status_code not in SENT_AGAIN:
                    raise ServerError(f"{method} {url}{path} was refused: {cause}{_advice(answer)}")
                pause = _pause(answer)
            finally:
                self.open[url] -= 1
            self._failures[url] += 1
            if attempt < self.servers.tries:
                self.retries += 1
                backoff = min(LONGEST_PAUSE, 2.0 ** (attempt - 1)) * (0.5 + random.random())
                await asyncio.sleep(max(backoff, pause))
        raise ServerLostError(
            f"{method} {url}{path}: no answer in {self.servers.tries} tries of at most {self.servers.timeout:g} seconds. "
            f"The last one: {cause}. Is the server running, and does it have enough memory?"
        )


def _content(answer: httpx2.Response) -> Json:
    try:
        return answer.json()
    except ValueError:
        raise ServerError(
            f"{answer.request.method} {answer.request.url} answered with something else than JSON: {answer.text[:SHOWN]}"
        ) from None


def _pause(answer: httpx2.Response) -> float:
    """The pause in seconds that the server requests, at most LONGEST_PAUSE. 0 if it requests none."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(answer.headers.get("Retry-After", ""))))
    except ValueError:
        return 0.0


def _advice(answer: httpx2.Response) -> str:
    if answer.status_code == 401:
        return ". Set MEGATRON_VOCAGNO_SERVER_KEY to the key of the server"
    if NOT_A_NUMBER in answer.text:
        return (
            ". The teacher's losses of this text are not numbers, which vLLM cannot answer. Does its dtype overflow? "
            "Start the server with --dtype float32, or leave the document out"
        )
    return ""
