"""Input files -> the plan of a dataset: which input splits make which shard. The same input always gives the same plan."""

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

SHARD_BYTES = 64 << 20  # of text, approximately

J = TypeVar("J")


class InputFile(Record):
    """An input file at the time of planning. modified: nanoseconds, or an object store's tag."""

    url: str
    size: int
    modified: str


class Plan(Record):
    """.build/plan.json: the input splits of each shard, and the settings."""

    settings: str  # sha256
    nfc: bool
    id_key: str | None
    sources: tuple[InputFile, ...]
    shards: tuple[tuple[InputSplit, ...], ...]
    in_words: dict[str, str] | None = None  # the values that `settings` hashes; None if an older release planned

    @property
    def input(self) -> str:
        """sha256 of the splits without the names of their files: moved input has the same hash."""
        splits = [[(s.kind, s.compression, s.start, s.stop, s.limit) for s in shard] for shard in self.shards]
        return hashlib.sha256(orjson.dumps(splits)).hexdigest()

    @property
    def stamps(self) -> tuple[tuple[str, int, str], ...]:
        """Name, size and modification time of each input file."""
        return tuple((place(source.url).name, source.size, source.modified) for source in self.sources)

    def other_settings(self, now: Plan) -> str:
        """The settings that differ in the plan `now`, each with both values; "" if none differs.

        --on-bad-line may differ. It decides only about shards with bad records, and `finished` compares it for each of them.
        """
        if self.settings == now.settings:
            return ""
        hashes = f"({self.settings}, now {now.settings})"
        if self.in_words is None or now.in_words is None:
            return f"an older release planned it, and recorded only the hash of its settings {hashes}"
        differences = []
        policy_changed = False
        for name, value in now.in_words.items():
            then = self.in_words.get(name, "unknown")
            if _decisive(name, then) == _decisive(name, value):
                continue
            if name == "--on-bad-line":
                policy_changed = True
            else:
                differences.append(f"{name} {then} then, {value} now")
        if not differences and not policy_changed:
            return f"another release planned it {hashes}"
        return "; ".join(differences)

    def other_input(self, now: Plan) -> str:
        """The first input file that differs in the plan `now`, or that the splits differ; "" if nothing differs."""
        if self.input == now.input:
            return ""
        for then, file in zip_longest(self.stamps, now.stamps):
            if (then and then[:2]) != (file and file[:2]):
                return " then, ".join(f"{each[0]} of {each[1]:,} bytes" if each else "no file" for each in (then, file)) + " now"
        return "same names and sizes, split differently: did their lines, --shard-mb or --max-documents change?"

    @property
    def text_bytes(self) -> int:
        """Approximate number of bytes of text."""
        return sum(split.weight for shard in self.shards for split in shard)

    @property
    def root(self) -> str:
        """The common folder of all input files, with a slash at the end."""
        folders = [source.url.split("/")[:-1] for source in self.sources]
        common = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
        return "".join(f"{parts[0]}/" for parts in common)

    def jobs(self, out: str, settings: BuildConfig, trusted: bool = False, force: bool = False) -> list[ShardJob]:
        """The job of each shard, in their order; see ShardJob for the arguments."""
        hashes = settings.hashes
        return [ShardJob(i, splits, self.root, out, settings, hashes, trusted, force) for i, splits in enumerate(self.shards)]


def _decisive(name: str, value: str) -> str:
    """The part of a setting's value that must not change: a tokenizer's path may."""
    return value.partition(" (")[0] if name in ("--student", "--teacher") else value


@dataclass(frozen=True)
class Slice:
    """The shards of one task of a job array: i, i + n, i + 2 n, …, with i from 1 to n."""

    i: int = 1
    n: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.i <= self.n:
            raise CorpusError(f"--shards {self.i}/{self.n}: the first number must be from 1 to the second")

    def of(self, jobs: Sequence[J]) -> Sequence[J]:
        """The jobs of this task. A task has no jobs if there are fewer jobs than tasks.

        >>> Slice(2, 3).of([0, 1, 2, 3, 4])
        [1, 4]
        """
        return jobs[self.i - 1 :: self.n]


def plan(
    inputs: Sequence[Place], settings: BuildConfig, shard_bytes: int = SHARD_BYTES, max_documents: int | None = None
) -> Plan:
    """Shards of about `shard_bytes` of text each. Long files are split; short files in sequence share a shard.

    Raises CorpusError for a file that is missing or cannot be read.
    """
    splits: Iterable[InputSplit] = (
        split for file in inputs for split in cut(file, shard_bytes, settings.text_key, settings.id_key)
    )
    if max_documents is not None:
        splits = take(splits, max_documents)
    shards: list[list[InputSplit]] = []
    room = 0
    for split in splits:
        if split.weight > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(split)
        room -= split.weight
    return Plan(
        settings=settings.sha256,
        nfc=settings.nfc,
        id_key=settings.id_name,
        sources=tuple(_input_file(file) for file in inputs),
        shards=tuple(map(tuple, shards)),
        in_words=settings.in_words,
    )


def _input_file(file: Place) -> InputFile:
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
    return InputFile(url=str(file.absolute()), size=stat.st_size, modified=modified)
