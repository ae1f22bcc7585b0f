"""Facts to recall, and wrong versions of them: lines such as `17+4=385.`, a key and a value that a model can only memorize.

A corpus has many lines per fact, and in a share of them the value is wrong. Every token is known to be right or wrong, so the
right and wrong tokens that a selection keeps can be counted. A wrong value differs from the right one in every digit, so none of
its tokens is right by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

Corruption = Literal["random", "systematic"]
EOS = "<eos>"


@dataclass(frozen=True)
class Fact:
    key: str
    value: str
    distractor: str
    """The value that systematic corruption puts in its place."""
    mistake: str
    """The wrong value that a teacher with gaps may have learned."""

    @property
    def prompt(self) -> str:
        return f"{self.key}="


@dataclass(frozen=True)
class Line:
    """One document. fact: the number of its fact; wrong: whether its value is wrong."""

    text: str
    fact: int
    wrong: bool


def invent_facts(count: int, seed: int) -> list[Fact]:
    """Facts with different keys of one or two digits per side, and a random value each."""
    random = np.random.default_rng([seed, count])
    keys = random.choice(100 * 100, count, replace=False)
    values = random.integers(100, 1000, count)
    others = other_values(np.stack([values, values]), random)
    return [
        Fact(f"{key // 100}+{key % 100}", *map(str, three))
        for key, *three in zip(keys.tolist(), values.tolist(), *others.tolist(), strict=True)
    ]


def other_values(values: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """For each value, another that differs in every digit and does not begin with 0. [...] int64, from 100 to 999."""
    first, rest = values // 100, np.stack([values // 10 % 10, values % 10])
    first = 1 + (first - 1 + random.integers(1, 9, values.shape)) % 9
    rest = (rest + random.integers(1, 10, rest.shape)) % 10
    others: NDArray[np.int64] = 100 * first + 10 * rest[0] + rest[1]
    return others


def write_lines(
    facts: Sequence[Fact], count: int, corruption: Corruption, share: float, random: np.random.Generator
) -> list[Line]:
    """`count` lines, each of a randomly drawn fact. A share of them, exact to one line, has a wrong value.

    `random`: a new wrong value each time. `systematic`: always the fact's distractor.
    """
    wrong = np.arange(count) < round(share * count)
    random.shuffle(wrong)
    chosen = random.integers(0, len(facts), count)
    others = other_values(np.array([int(fact.value) for fact in facts])[chosen], random)
    lines = []
    for number, is_wrong, other in zip(chosen.tolist(), wrong.tolist(), others.tolist(), strict=True):
        fact = facts[number]
        said = fact.distractor if corruption == "systematic" else str(other)
        lines.append(Line(f"{fact.prompt}{said if is_wrong else fact.value}.", number, is_wrong))
    return lines


def save_corpus(lines: Sequence[Line], path: Path) -> None:
    """Write one JSON line per document: the text for build_dataset, and the fact and label of the line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": line.text, "fact": line.fact, "wrong": line.wrong} for line in lines]
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def load_corpus(path: Path) -> list[Line]:
    return [Line(**orjson.loads(row)) for row in path.read_bytes().splitlines()]


def answer_tokens(tokens: Sequence[str]) -> list[bool]:
    """Whether each token of a line belongs to its value. tokens: the pieces of the line's text."""
    value, found = False, []
    for token in tokens:
        found.append(value and token.isdigit())
        value = value or token == "="
    return found


# ---- tokenizers


def write_tokenizer(folder: Path, digits: int) -> None:
    """A byte-level BPE of the lines' characters that cuts numbers from the left into pieces of 1 or 2 digits."""
    characters = "0123456789+=."
    pairs = [(a, b) for a in characters[:10] for b in characters[:10]] if digits == 2 else []
    pieces = [EOS, *characters, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"[0-9]{{1,{digits}}}|[^0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([EOS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps({"eos_token": EOS}))
