"""Input files -> the plan of a dataset: which pieces make which shard. The same input gives the same plan, every time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import TypeVar

import orjson

from megatron_vocagno.corpus.manifest import Record
from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.inputs import InputSplit, cut, take
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJob

SHARD_BYTES = 64 << 20  # of text, about

J = TypeVar("J")


class Source(Record):
    """An input file as the plan saw it. modified: nanoseconds, or an object store's tag."""

    url: str
    size: int
    modified: str


class Plan(Record):
    """.build/plan.json: what each shard is made from, and with."""

    settings: str  # sha256
    nfc: bool
    id_key: str | None
    sources: tuple[Source, ...]
    shards: tuple[tuple[InputSplit, ...], ...]
    in_words: dict[str, str] | None = None  # what `settings` is made of; nothing where an older release planned

    @property
    def input(self) -> str:
        """sha256 of how the input is cut; not of names: a moved input is the same one."""
        pieces = [[(p.kind, p.compression, p.start, p.stop, p.limit) for p in shard] for shard in self.shards]
        return hashlib.sha256(orjson.dumps(pieces)).hexdigest()

    @property
    def stamps(self) -> tuple[tuple[str, int, str], ...]:
        """Name, size and time of each input file."""
        return tuple((place(source.url).name, source.size, source.modified) for source in self.sources)

    def other_settings(self, now: Plan) -> str:
        """What was asked for otherwise; empty where nothing was."""
        if self.settings == now.settings:
            return ""
        hashes = f"({self.settings}, now {now.settings})"
        if self.in_words is None or now.in_words is None:
            return f"an older release planned it, and recorded the hash of its settings alone {hashes}"
        told = []
        for name, value in now.in_words.items():
            then = self.in_words.get(name, "unknown")
            if _decisive(name, then) != _decisive(name, value):
                told.append(f"{name} {then} then, {value} now")
        return "; ".join(told) or f"another release planned it {hashes}"

    def other_input(self, now: Plan) -> str:
        """Which file is another one, or that they are cut otherwise; empty where nothing is."""
        if self.input == now.input:
            return ""
        for then, file in zip_longest(self.stamps, now.stamps):
            if (then and then[:2]) != (file and file[:2]):
                return " then, ".join(f"{each[0]} of {each[1]:,} bytes" if each else "no file" for each in (then, file)) + " now"
        return "files of the same names and sizes, cut otherwise: other lines in them, or another --shard-mb or --max-documents"

    @property
    def text_bytes(self) -> int:
        """About how much text it holds."""
        return sum(p.weight for shard in self.shards for p in shard)

    @property
    def root(self) -> str:
        """The folder that all input files have in common, with a slash."""
        folders = [source.url.split("/")[:-1] for source in self.sources]
        common = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
        return "".join(f"{parts[0]}/" for parts in common)

    def jobs(self, out: str, settings: BuildConfig, trusted: bool = False, force: bool = False) -> list[ShardJob]:
        """One a shard, in their order; see ShardJob."""
        return [
            ShardJob(i, pieces, self.root, out, settings, self.settings, trusted, force) for i, pieces in enumerate(self.shards)
        ]


def _decisive(name: str, value: str) -> str:
    """Of a setting in words; of a tokenizer, it does not matter where it lies."""
    return value.partition(" (")[0] if name in ("--student", "--teacher") else value


@dataclass(frozen=True)
class Slice:
    """The shards i, i + n, i + 2 n, …, with i from 1 to n: one task of a job array."""

    i: int = 1
    n: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.i <= self.n:
            raise CorpusError(f"--shards {self.i}/{self.n}: the first number goes from 1 to the second")

    def of(self, jobs: Sequence[J]) -> Sequence[J]:
        """Those of this task; none where there are fewer jobs than tasks.

        >>> Slice(2, 3).of([0, 1, 2, 3, 4])
        [1, 4]
        """
        return jobs[self.i - 1 :: self.n]


def plan(
    inputs: Sequence[Place], settings: BuildConfig, shard_bytes: int = SHARD_BYTES, max_documents: int | None = None
) -> Plan:
    """Shards of about `shard_bytes` of text each: long files are cut, short ones in a row share a shard.

    Raises CorpusError for a file that is missing or cannot be read.
    """
    pieces: Iterable[InputSplit] = (
        piece for file in inputs for piece in cut(file, shard_bytes, settings.text_key, settings.id_key)
    )
    if max_documents is not None:
        pieces = take(pieces, max_documents)
    shards: list[list[InputSplit]] = []
    room = 0
    for piece in pieces:
        if piece.weight > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= piece.weight
    return Plan(
        settings=settings.sha256,
        nfc=settings.nfc,
        id_key=settings.id_name,
        sources=tuple(_source(file) for file in inputs),
        shards=tuple(map(tuple, shards)),
        in_words=settings.in_words,
    )


def _source(file: Place) -> Source:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise CorpusError(f"{str(file)!r}: a file name that is not UTF-8 cannot be recorded; rename it") from None
    stat = file.stat()
    if isinstance(file, Path):
        modified = str(stat.st_mtime_ns)
    else:
        info = file.fs.info(file.path)
        modified = str(next((info[key] for key in ("ETag", "etag", "md5Hash", "created", "LastModified") if key in info), ""))
    return Source(url=str(file.absolute()), size=stat.st_size, modified=modified)
