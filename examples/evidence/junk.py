"""Insert junk into real text, with the kind of every byte known.

A noisy text alternates clean pieces and runs of junk. There are three kinds of junk, as in crawled text: word salad, encoded
data, and notices that are on every page. Junk goes between two words. If a tokenizer cuts before spaces, no token then has both.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.uint8]


class Kind(IntEnum):
    """The kind of a byte, or of a token whose bytes are all of that kind."""

    CLEAN = 0
    SALAD = 1
    """Words of another text, in random order."""
    ENCODED = 2
    """Random bytes in base64 or in hexadecimal digits."""
    NOTICE = 3
    """One of a few notices, identical each time."""
    MIXED = 4
    """A token with bytes of two kinds, or without bytes. No byte has this kind."""


JUNK = (Kind.SALAD, Kind.ENCODED, Kind.NOTICE)
RATE = 1 / 15
"""Junk follows one word in this many. About half of the tokens are then junk."""
NOTICES = (
    "We use cookies to personalise content and to analyse our traffic. By continuing to browse you accept our cookie policy.",
    "Copyright 2009-2024. All rights reserved. No part of this page may be reproduced without written permission.",
    "Subscribe to our newsletter and never miss an update! Enter your e-mail address below. You can unsubscribe at any time.",
    "Home | Products | Pricing | Documentation | Blog | Contact | Log in | Sign up for free",
    "JavaScript is disabled in your browser. Please enable it to use all features of this site, then reload the page.",
    "Share this: Click to share on Twitter (Opens in new window) Click to share on Facebook (Opens in new window)",
    "Was this page helpful? Yes No Thank you for your feedback! Report a problem with this page Last modified: 3 months ago",
    "Error 503 Backend fetch failed. Guru Meditation: XID: 98715432. Varnish cache server. Please try again in a few minutes.",
)


class Run(NamedTuple):
    """A number of bytes of one kind."""

    kind: Kind
    length: int


class NoisyText(NamedTuple):
    text: str
    runs: list[Run]

    def labels(self) -> Labels:
        """[bytes of text] a Kind each."""
        kinds = np.array([run.kind for run in self.runs], np.uint8)
        return np.repeat(kinds, [run.length for run in self.runs])

    def clean(self) -> str:
        """The text without its junk."""
        kept = np.frombuffer(self.text.encode(), np.uint8)[self.labels() == Kind.CLEAN]
        return bytes(kept).decode()


def insert_junk(text: str, others: Sequence[str], random: np.random.Generator) -> NoisyText:
    """Insert junk between the words of a text. others: texts whose words are shuffled."""
    makers: dict[Kind, Callable[[], str]] = {
        Kind.SALAD: lambda: _salad(others, random),
        Kind.ENCODED: lambda: _encoded(random),
        Kind.NOTICE: lambda: str(random.choice(NOTICES)),
    }
    pieces: list[tuple[Kind, str]] = []
    done = 0
    for border in re.finditer(r"(?<=\S)(?=\s)", text):
        if random.random() < RATE:
            kind = JUNK[int(random.integers(len(JUNK)))]
            pieces += [(Kind.CLEAN, text[done : border.start()]), (kind, " " + makers[kind]())]
            done = border.start()
    pieces.append((Kind.CLEAN, text[done:]))
    return NoisyText("".join(piece for _, piece in pieces), [Run(kind, len(piece.encode())) for kind, piece in pieces])


def token_labels(labels: Labels, ends: NDArray[np.int64]) -> Labels:
    """[N] the Kind of each token, from that of each byte.

    ends  [N] the byte at which each token ends; tokens are contiguous, and a token without bytes is MIXED
    """
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    changes = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.diff(labels) != 0)])
    kinds = np.full(len(ends), Kind.MIXED, np.uint8)
    some = starts < ends
    first, last = starts[some], ends[some] - 1
    kinds[some] = np.where(changes[first] == changes[last], labels[first], Kind.MIXED)
    return kinds


def _salad(others: Sequence[str], random: np.random.Generator) -> str:
    """8 to 20 consecutive words of another text, shuffled."""
    words = others[int(random.integers(len(others)))].split()
    count = int(random.integers(8, 21))
    start = int(random.integers(max(1, len(words) - count)))
    return " ".join(random.permutation(words[start : start + count]).tolist())


def _encoded(random: np.random.Generator) -> str:
    data = random.bytes(int(random.integers(12, 37)))
    return base64.b64encode(data).decode() if random.random() < 0.5 else data.hex()
