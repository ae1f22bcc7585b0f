"""JSON-lines files -> texts: cut into pieces of whole lines, parsed, gathered into batches of bounded size."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_vocagno.corpus import CorpusError

BATCH_BYTES = 1 << 20  # of text held and tokenized at once; a longer document goes alone
OTHER_FORMATS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PAR1": "parquet"}


class InputError(CorpusError):
    """An input that is missing, in another format, or holds a bad line."""


@dataclass(frozen=True)
class Piece:
    """The bytes [start, stop) of a JSON-lines file: whole lines."""

    path: Path
    start: int
    stop: int

    def lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            while file.tell() < self.stop:
                yield file.readline()

    @functools.cached_property
    def first_line(self) -> int:
        """The number of its first line in the file, from 1; reads all before it, so it is asked only for an error."""
        with self.path.open("rb") as file:
            chunks = iter(lambda: file.read(min(1 << 20, self.start - file.tell())), b"")
            return 1 + sum(chunk.count(b"\n") for chunk in chunks)


def cut(path: Path, shard_bytes: int) -> list[Piece]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size
    bounds = [0]
    with path.open("rb") as file:
        head = file.read(8)
        for magic, name in OTHER_FORMATS.items():
            if head.startswith(magic):
                raise InputError(f"{path} is {name}; only plain JSON lines are read: unpack or convert it first")
        while bounds[-1] + shard_bytes < size:
            file.seek(bounds[-1] + shard_bytes)
            file.readline()
            bounds.append(file.tell())
    return [Piece(path, a, b) for a, b in zip(bounds, [*bounds[1:], size], strict=True) if a < b]


@dataclass(frozen=True)
class Line:
    piece: Piece
    number: int  # within the piece, from 0
    raw: bytes

    def __str__(self) -> str:
        return f"{self.piece.path}:{self.piece.first_line + self.number}"


class BadLine(Exception):
    """The reason why a line holds no text."""


def text_of(raw: bytes, key: str) -> str:
    """The text in a line of JSON. Raises BadLine with the reason."""
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError:
        row = _lenient(raw)
    if not isinstance(row, dict):
        raise BadLine(f"a JSON {type(row).__name__}, not an object")
    if key not in row:
        raise BadLine(f"no key {key!r} (it has {', '.join(map(repr, list(row)[:5])) or 'none'}); --text-key names another")
    text = row[key]
    if not isinstance(text, str):
        raise BadLine(f"{key!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"a lone surrogate at character {error.start} of {key!r}") from None
    return text


def _lenient(raw: bytes) -> Any:
    """Lines that Python's json writes and strict JSON refuses: NaN among the other keys, escaped surrogates."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise BadLine(f"invalid JSON ({error})") from None


def batches(documents: Iterable[tuple[Line, str]]) -> Iterator[list[tuple[Line, str]]]:
    batch: list[tuple[Line, str]] = []
    size = 0
    for line, text in documents:
        if batch and size + len(line.raw) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((line, text))
        size += len(line.raw)
    if batch:
        yield batch
