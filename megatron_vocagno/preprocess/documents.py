"""Pieces of input files -> documents.

A record that holds no text (no JSON, no such key, not UTF-8) is a document without text and with the reason. So is the
place at which a file is cut off or damaged: the last document of its piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import orjson

from megatron_vocagno.corpus.places import place
from megatron_vocagno.errors import BrokenInput
from megatron_vocagno.preprocess.inputs import LONGEST_RECORD, PART, InputSplit, Keys, Line, names

BROKEN = "broken input: "  # how the reason begins where a file gives no more
OnBytes: TypeAlias = Callable[[bytes], object]
Strings: TypeAlias = Sequence[str]

_NULL = b"\xff" * 8  # no length
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = re.compile("(?:^|(?<=[\r\n]))\ufeff+")
_ABSENT = object()
# of a line that is no JSON: what it may be, and what to do about it; the first and last bytes are looked at
_CAUSE_BYTES = 64 << 10
_OF_ITS_BEGINNING = 3
"""So many of them, the first, are told by how a line begins."""
_CAUSES = tuple(
    (re.compile(pattern, re.DOTALL), cause)
    for pattern, cause in (
        (rb"\0+\Z", "nothing but zero bytes: space that was set aside and never written?"),
        (rb"\xff\xfe|\xfe\xff", "UTF-16 text begins here: iconv -f UTF-16 -t UTF-8 FILE, before it is put behind others"),
        (rb".*\}[ \t]*\r\s*\{", "the lines of this file end in CR alone: tr '\\r' '\\n' < FILE > FILE.jsonl"),
        (
            rb"(?=.*\}\s*\Z)\{.*\}[ \t]*(\xef\xbb\xbf)*\x1e?\{",
            "several objects on one line? jq -c . FILE > FILE.jsonl parts them",
        ),
        (rb"\{.*\}\s*,\s*\Z", "a comma behind the object: sed 's/,\\r*$//' FILE > FILE.jsonl takes it away"),
        (rb"\{.*\}\s*\0+\Z", "zero bytes behind the object: space that was set aside and never written?"),
        (rb"\{.*[^}\s]\s*\Z|\{\s*\Z", "cut off, or one object over several lines? Then jq -c . FILE > FILE.jsonl joins them"),
        (rb"[A-Za-z#*\xc3-\xf4]", "plain text? That is read from files that are called *.txt"),
    )
)


class Document(NamedTuple):
    """One record. A named tuple is made three times as fast as a frozen dataclass, and there are millions."""

    piece: InputSplit
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


def read(piece: InputSplit, text_key: Keys, id_key: Keys, on_bytes: OnBytes) -> Iterator[Document]:
    """The records of a piece in order; memory is a few times the longest.

    text_key, id_key  keys of a line's object, columns of parquet. `a.b` is the key b of the object a, or the field b of the
                      struct a, where nothing is called `a.b`. Of several, a line takes the first that it has and that is
                      not null; a parquet file the first that is a column. A text file has none: its id is its name.
    on_bytes          is handed what decides the documents, so that another document or order gives other bytes: lines
                      with their ends, texts and rows with their lengths. How it is divided into calls means nothing.

    Blank lines are no records. Raises CorpusError for parquet without such columns, OSError where a file cannot be read.
    """
    readers = {"lines": _read_lines, "text": _read_text, "parquet": _read_parquet}
    return islice(readers[piece.kind](piece, names(text_key), names(id_key), on_bytes), piece.limit)


def _broken(piece: InputSplit, number: int, offset: int, error: BrokenInput, on_bytes: OnBytes) -> Document:
    on_bytes(b"\0broken\n")
    return Document(piece, number, offset, b"", None, f"{BROKEN}{error}")


def _too_long(size: int) -> str:
    return f"{size:,} bytes long; the longest record that is read has {LONGEST_RECORD:,}"


# ---- lines


def _read_lines(piece: InputSplit, text_keys: Strings, id_keys: Strings, on_bytes: OnBytes) -> Iterator[Document]:
    number, offset = 0, piece.start
    try:
        for line in piece.lines(on_bytes):
            number, offset = line.number + 1, line.offset + line.size
            try:
                text, id_ = _parse(line, text_keys, id_keys)
            except _NoText as bad:
                yield Document(piece, line.number, line.offset, line.raw, None, str(bad))
            else:
                yield Document(piece, line.number, line.offset, line.raw, text, "", id_)
    except BrokenInput as error:
        yield _broken(piece, number, offset, error, on_bytes)


def _parse(line: Line, text_keys: Strings, id_keys: Strings) -> tuple[str, str]:
    """text, id. Raises _NoText."""
    if line.size > LONGEST_RECORD:
        raise _NoText(_too_long(line.size) + _cause(line.raw, whole=False))
    try:
        row, strict = orjson.loads(line.raw), True
    except orjson.JSONDecodeError:
        row, strict = _lenient(line.raw), False
    key = text_keys[0]
    if not isinstance(row, dict) or not isinstance(text := row.get(key), str):  # it mostly is one
        key, text = _value(row, text_keys, "--text-key")
        if not isinstance(text, str):
            raise _NoText(f"{key!r} is {_kind(text)}, not a string")
    if not strict:
        _refuse_lone_surrogates(key, text)
    return text, _id(row, id_keys, line.raw, strict) if id_keys else ""


def _lenient(raw: bytes) -> Any:
    """Lines that others write and strict JSON refuses: with NaN, huge numbers, lone surrogates, or RFC 7464's separator."""
    try:
        text = raw.removeprefix(b"\x1e").decode()
    except UnicodeDecodeError as error:
        raise _NoText(f"invalid UTF-8 at byte {error.start} of the line{_cause(raw)}") from None
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # more digits than Python takes for an integer
            return json.loads(text, parse_int=float)
    except RecursionError:
        raise _NoText("nested too deeply: more than some thousand lists and objects within each other") from None
    except ValueError as error:
        raise _NoText(f"invalid JSON ({error}){_cause(raw)}") from None


def _cause(raw: bytes, whole: bool = True) -> str:
    """whole: `raw` is all of the line, and its end says something."""
    shown = raw if len(raw) <= 2 * _CAUSE_BYTES else raw[:_CAUSE_BYTES] + raw[-_CAUSE_BYTES:]
    causes = _CAUSES if whole else _CAUSES[:_OF_ITS_BEGINNING]
    return next((f": {cause}" for pattern, cause in causes if pattern.match(shown)), "")


def _value(row: Any, keys: Strings, option: str) -> tuple[str, Any]:
    """The first of the keys that is there and not null, and its value. Raises _NoText where none is there."""
    if not isinstance(row, dict):
        raise _NoText(f"{_kind(row)}, not a JSON object")
    null = ""
    for key in keys:
        value = row.get(key, _ABSENT)
        if value is _ABSENT and "." in key:
            value = _within(row, key)
        if value is None:
            null = null or key
        elif value is not _ABSENT:
            return key, value
    if null:
        return null, None
    there = ", ".join(map(repr, list(row)[:5])) or "none"
    raise _NoText(f"no key {_named(keys)} (it has {there}); {option} names another")


def _within(row: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            return _ABSENT
        row = row[key]
    return row


def _id(row: Any, keys: Strings, raw: bytes, strict: bool) -> str:
    key, value = _value(row, keys, "--id-key")
    if strict and isinstance(value, float):
        key, value = _value(_lenient(raw), keys, "--id-key")  # strict parsing has no integer beyond 64 bits
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _NoText(f"{key!r} is {_kind(value)}, not a string or an integer")
    if isinstance(value, str) and not strict:
        _refuse_lone_surrogates(key, value)
    return str(value)


def _refuse_lone_surrogates(key: str, value: str) -> None:
    if lone := _LONE_SURROGATE.search(value):
        raise _NoText(f"a lone surrogate at character {lone.start()} of {key!r}")


def _kind(value: object) -> str:
    """In the words of JSON."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


# ---- text files


def _read_text(piece: InputSplit, text_keys: Strings, id_keys: Strings, on_bytes: OnBytes) -> Iterator[Document]:
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
    id_ = "" if not id_keys else place(piece.url).name.encode(errors="replace").decode()
    on_bytes(size.to_bytes(8, "little") + id_.encode() + b"\0text\n")
    raw = b"".join(parts)
    del parts
    try:
        # files put together by cat have a mark at each of their beginnings
        yield Document(piece, 0, 0, raw, _MARKS.sub("", _decode(raw, size)), "", id_)
    except _NoText as bad:
        yield Document(piece, 0, 0, raw, None, str(bad))


# ---- parquet


def _read_parquet(piece: InputSplit, text_keys: Strings, id_keys: Strings, on_bytes: OnBytes) -> Iterator[Document]:
    # pyarrow takes 0.2 s and 50 MB of every worker that imports it
    from megatron_vocagno.preprocess import parquet

    number, offset = 0, 0
    try:
        rows = parquet.rows(place(piece.url), piece.start, piece.stop, text_keys, id_keys)
        for row, text, id_ in rows:
            on_bytes(_framed(text) + _framed(id_) if id_keys else _framed(text))
            raw = text or b""
            try:
                decoded = _column(text, text_keys), _column(id_, id_keys) if id_keys else ""
            except _NoText as bad:
                yield Document(piece, number, row, raw, None, str(bad))
            else:
                yield Document(piece, number, row, raw, decoded[0], "", decoded[1])
            number, offset = number + 1, row + 1
    except BrokenInput as error:
        yield _broken(piece, number, offset, error, on_bytes)


def _column(value: bytes | None, keys: Strings) -> str:
    if value is None:
        raise _NoText(f"{_named(keys)} is null")
    return _decode(value, len(value), keys)


def _named(keys: Strings) -> str:
    return " or ".join(map(repr, keys))


def _decode(raw: bytes, size: int, keys: Strings = ()) -> str:
    if size > LONGEST_RECORD:
        raise _NoText(_too_long(size))
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _NoText(f"invalid UTF-8 at byte {error.start}{' of ' if keys else ''}{_named(keys)}") from None


def _framed(value: bytes | None) -> bytes:
    return _NULL if value is None else len(value).to_bytes(8, "little") + value
