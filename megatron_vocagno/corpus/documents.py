"""Pieces of input files -> documents.

A record that holds no text (no JSON, no such key, not UTF-8) is a document without text and with the reason. So is the
place at which a file is cut off or damaged: the last document of its piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import orjson

from megatron_vocagno.corpus.inputs import LONGEST_RECORD, PART, Line, Piece
from megatron_vocagno.corpus.places import place
from megatron_vocagno.corpus.streams import BrokenInput

BROKEN = "broken input: "  # how the reason begins where a file gives no more
OnBytes: TypeAlias = Callable[[bytes], object]

_NULL = b"\xff" * 8  # no length
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One record. A named tuple is made three times as fast as a frozen dataclass, and there are millions."""

    piece: Piece
    number: int  # line or row within the piece, from 0
    offset: int  # byte of the (decompressed) file at which it starts; parquet: its row in the file, from 0
    raw: bytes  # as it stands in the input, without line end; of a line or file longer than LONGEST_RECORD the beginning
    text: str | None  # None: there is none, `reason` says why
    reason: str = ""
    id: str = ""  # "" where none is asked for

    def __str__(self) -> str:
        """path:line:byte, line from 1, byte from 0; or path:row N, from 1. Reads what is before the piece."""
        if self.piece.kind == "parquet":
            return f"{self.piece.url}:row {self.offset + 1}"
        return f"{self.piece.url}:{self.piece.first_line + self.number}:{self.offset}"


class _NoText(Exception):
    """The reason why a record holds no text."""


def read(piece: Piece, text_key: str, id_key: str | None, on_bytes: OnBytes) -> Iterator[Document]:
    """The records of a piece in order; memory is a few times the longest.

    text_key, id_key  top-level keys of a line's object; columns of parquet. A text file has none: its id is its name.
    on_bytes          is handed what decides the documents, so that another document or order gives other bytes: lines
                      with their ends, texts and rows with their lengths. How it is divided into calls means nothing.

    Blank lines are no records. Raises InputError for parquet without such columns, OSError where a file cannot be read.
    """
    readers = {"lines": _read_lines, "text": _read_text, "parquet": _read_parquet}
    return islice(readers[piece.kind](piece, text_key, id_key, on_bytes), piece.limit)


def _broken(piece: Piece, number: int, offset: int, error: BrokenInput, on_bytes: OnBytes) -> Document:
    on_bytes(b"\0broken\n")
    return Document(piece, number, offset, b"", None, f"{BROKEN}{error}")


def _too_long(size: int) -> str:
    return f"{size:,} bytes long; the longest record that is read has {LONGEST_RECORD:,}"


# ---- lines


def _read_lines(piece: Piece, text_key: str, id_key: str | None, on_bytes: OnBytes) -> Iterator[Document]:
    number, offset = 0, piece.start
    try:
        for line in piece.lines(on_bytes):
            number, offset = line.number + 1, line.offset + line.size
            try:
                text, id_ = _parse(line, text_key, id_key)
            except _NoText as bad:
                yield Document(piece, line.number, line.offset, line.raw, None, str(bad))
            else:
                yield Document(piece, line.number, line.offset, line.raw, text, "", id_)
    except BrokenInput as error:
        yield _broken(piece, number, offset, error, on_bytes)


def _parse(line: Line, text_key: str, id_key: str | None) -> tuple[str, str]:
    """text, id. Raises _NoText."""
    if line.size > LONGEST_RECORD:
        raise _NoText(_too_long(line.size))
    try:
        row = orjson.loads(line.raw)
    except orjson.JSONDecodeError:
        row = _lenient(line.raw, (text_key, id_key))
    if not isinstance(row, dict):
        raise _NoText(f"{_kind(row)}, not a JSON object")
    text = _value(row, text_key, "--text-key")
    if not isinstance(text, str):
        raise _NoText(f"{text_key!r} is {_kind(text)}, not a string")
    return text, "" if id_key is None else _id(_value(row, id_key, "--id-key"), id_key)


def _lenient(raw: bytes, keys: Container[str | None]) -> Any:
    """Lines that Python's json writes and strict JSON refuses: with NaN, or with lone surrogates in keys but these."""
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise _NoText(f"invalid UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise _NoText(f"invalid JSON ({error})") from None
    for key, value in row.items() if isinstance(row, dict) else ():
        if key in keys and isinstance(value, str) and (lone := _LONE_SURROGATE.search(value)):
            raise _NoText(f"a lone surrogate at character {lone.start()} of {key!r}")
    return row


def _value(row: dict[str, Any], key: str, option: str) -> Any:
    if key not in row:
        raise _NoText(f"no key {key!r} (it has {', '.join(map(repr, list(row)[:5])) or 'none'}); {option} names another")
    return row[key]


def _id(value: object, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _NoText(f"{key!r} is {_kind(value)}, not a string or an integer")
    return str(value)


def _kind(value: object) -> str:
    """In the words of JSON."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


# ---- text files


def _read_text(piece: Piece, text_key: str, id_key: str | None, on_bytes: OnBytes) -> Iterator[Document]:
    parts: list[bytes] = []
    size = 0
    try:
        with piece.open() as file:
            while part := file.read(PART):
                on_bytes(part)
                size += len(part)
                parts = [*parts, part] if size <= LONGEST_RECORD else parts[:1]
    except BrokenInput as error:
        yield _broken(piece, 0, 0, error, on_bytes)
        return
    # a file name may be any bytes
    id_ = "" if id_key is None else place(piece.url).name.encode(errors="replace").decode()
    on_bytes(size.to_bytes(8, "little") + id_.encode() + b"\0text\n")
    raw = b"".join(parts)
    del parts
    try:
        yield Document(piece, 0, 0, raw, _decode(raw, size).removeprefix("\ufeff"), "", id_)
    except _NoText as bad:
        yield Document(piece, 0, 0, raw, None, str(bad))


# ---- parquet


def _read_parquet(piece: Piece, text_key: str, id_key: str | None, on_bytes: OnBytes) -> Iterator[Document]:
    # pyarrow takes 0.2 s and 50 MB of every worker that imports it
    from megatron_vocagno.corpus import parquet

    number, offset = 0, 0
    try:
        for row, text, id_ in parquet.rows(place(piece.url), piece.start, piece.stop, text_key, id_key):
            on_bytes(_framed(text) if id_key is None else _framed(text) + _framed(id_))
            raw = text or b""
            try:
                decoded = _column(text, text_key), "" if id_key is None else _column(id_, id_key)
            except _NoText as bad:
                yield Document(piece, number, row, raw, None, str(bad))
            else:
                yield Document(piece, number, row, raw, decoded[0], "", decoded[1])
            number, offset = number + 1, row + 1
    except BrokenInput as error:
        yield _broken(piece, number, offset, error, on_bytes)


def _column(value: bytes | None, key: str) -> str:
    if value is None:
        raise _NoText(f"{key!r} is null")
    return _decode(value, len(value), f" of {key!r}")


def _decode(raw: bytes, size: int, where: str = "") -> str:
    if size > LONGEST_RECORD:
        raise _NoText(_too_long(size))
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _NoText(f"invalid UTF-8 at byte {error.start}{where}") from None


def _framed(value: bytes | None) -> bytes:
    return _NULL if value is None else len(value).to_bytes(8, "little") + value
