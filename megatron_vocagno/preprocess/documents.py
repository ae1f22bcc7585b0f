"""Splits of input files -> documents.

A record without a text (invalid JSON, a missing key, invalid UTF-8) gives a document whose text is None, with the reason. A file
that is cut off or damaged gives such a document at that place. It is the last document of its split.

A text of many megabytes stays as it is in the file, and is decoded piece by piece when it is tokenized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import orjson

from megatron_vocagno.corpus.places import place
from megatron_vocagno.errors import BrokenInputError
from megatron_vocagno.preprocess.inputs import LONGEST_RECORD, READ_BYTES, InputSplit, Keys, Line, names
from megatron_vocagno.preprocess.long_texts import PART_CHARACTERS

BROKEN = "broken input: "  # the beginning of the reason if the rest of a file cannot be read
OnBytes: TypeAlias = Callable[[bytes], object]
Strings: TypeAlias = Sequence[str]

LONG_BYTES = 4 << 20  # a text of more bytes is decoded in pieces, if it has more than PART_CHARACTERS characters
PIECE_BYTES = 1 << 18
ESCAPE_BYTES = 12  # of the longest escape of one character in JSON, two surrogates

_NULL = b"\xff" * 8  # a length that no text has
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKS = re.compile(b"(?:^|(?<=[\r\n]))(?:\xef\xbb\xbf)+")
_ABSENT = object()
_CAUSE_BYTES = 64 << 10  # the first and last bytes of an invalid line that are compared with the patterns below
_CAUSES_BY_BEGINNING = 3  # number of patterns, the first ones, that only need the beginning of a line
# Patterns of lines that are not valid JSON, each with the likely cause and the fix. A reason is stored in quarantine.jsonl, whose
# hash is part of the dataset's: do not reword it.
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


@dataclass(frozen=True)
class LongText:
    """A text that is not decoded: Python stores up to four bytes per character, and a few copies while it parses JSON.

    The text is raw[start:stop], as UTF-8, or as the content of a JSON string if it is `escaped`.
    """

    raw: bytes
    start: int
    stop: int
    escaped: bool

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about PIECE_BYTES. Raises ValueError if the bytes are not valid."""
        start = self.start
        while start < self.stop:
            end = min(start + PIECE_BYTES, self.stop)
            shortest = max(start + 1, end - ESCAPE_BYTES)
            while True:
                part = self.raw[start:end]
                try:
                    piece: str = orjson.loads(b'"%b"' % part) if self.escaped else part.decode()
                    break
                except ValueError:  # the piece ends inside a character or an escape, or the bytes are not valid
                    if end == shortest:
                        raise
                    end -= 1
            yield piece
            start = end


def pieces_of(text: str | LongText) -> Iterator[str]:
    """A text in pieces of at most a few megabytes."""
    if isinstance(text, LongText):
        yield from text.pieces()
    else:
        yield from (text[start : start + PART_CHARACTERS] for start in range(0, len(text), PART_CHARACTERS))


class InputRecord(NamedTuple):
    """One record of the input.

    number  line or row within the split, from 0
    offset  byte of the (decompressed) file at which the record starts; for parquet its row in the file, from 0
    raw     the record in the input, without line end; only the beginning if it is longer than LONGEST_RECORD
    text    None if the record has no text, with the `reason`
    id      "" if no ids are read

    It is a named tuple because there are millions: a frozen dataclass takes three times as long to construct.
    """

    split: InputSplit
    number: int
    offset: int
    raw: bytes
    text: str | LongText | None
    reason: str = ""
    id: str = ""

    def __str__(self) -> str:
        """path:line:byte, line from 1, byte from 0; or path:row N, from 1. Reads the lines before the split to count them."""
        if self.split.kind == "parquet":
            return f"{self.split.url}:row {self.offset + 1}"
        return f"{self.split.url}:{self.split.first_line + self.number}:{self.offset}"


class _NoText(Exception):
    """The reason why a record has no text. quarantine.jsonl contains it, so that its wording decides the dataset's hash."""


def read(split: InputSplit, text_key: Keys, id_key: Keys, on_bytes: OnBytes) -> Iterator[InputRecord]:
    """The records of a split in order. Blank lines are not records. Memory is a few times the longest record.

    text_key, id_key  keys of a line's object, or columns of parquet. If nothing is called `a.b`, it means the key b of the object
                      a, or the field b of the struct a. If there are several keys, the first key of the line whose value is not
                      null is used, and the first column of a parquet file. A text file has no keys: its id is its name.
    on_bytes          called with the bytes that determine the documents and their order: lines with their ends, texts and rows
                      with their lengths. The division of the bytes into calls has no meaning.

    Raises CorpusError for parquet without such columns, OSError if a file cannot be read.

    For example, `text_key="doc.body"` reads "x" from `{"doc": {"body": "x"}}`, and also from `{"doc.body": "x"}`.
    """
    readers = {"lines": _read_lines, "text": _read_text, "parquet": _read_parquet}
    return islice(readers[split.kind](split, names(text_key), names(id_key), on_bytes), split.limit)


def _broken(split: InputSplit, number: int, offset: int, error: BrokenInputError, on_bytes: OnBytes) -> InputRecord:
    on_bytes(b"\0broken\n")
    return InputRecord(split, number, offset, b"", None, f"{BROKEN}{error}")


def _too_long(size: int) -> str:
    return f"{size:,} bytes long; the longest record that is read has {LONGEST_RECORD:,}"


# ---- lines


def _read_lines(split: InputSplit, text_keys: Strings, id_keys: Strings, on_bytes: OnBytes) -> Iterator[InputRecord]:
    number, offset = 0, split.start
    try:
        for line in split.lines(on_bytes):
            number, offset = line.number + 1, line.offset + line.size
            try:
                text, id_ = _parse(line, text_keys, id_keys)
            except _NoText as bad:
                yield InputRecord(split, line.number, line.offset, line.raw, None, str(bad))
            else:
                yield InputRecord(split, line.number, line.offset, line.raw, text, "", id_)
    except BrokenInputError as error:
        yield _broken(split, number, offset, error, on_bytes)


def _parse(line: Line, text_keys: Strings, id_keys: Strings) -> tuple[str | LongText, str]:
    """text, id. Raises _NoText."""
    if line.size > LONGEST_RECORD:
        raise _NoText(_too_long(line.size) + _cause(line.raw, whole=False))
    if line.size > LONG_BYTES and (found := _parse_around_longest_string(line, text_keys, id_keys)) is not None:
        return found
    try:
        row, strict = orjson.loads(line.raw), True
    except orjson.JSONDecodeError:
        row, strict = _lenient(line.raw), False
    key = text_keys[0]
    if not isinstance(row, dict) or not isinstance(text := row.get(key), str):  # rare: the common case is fast
        key, text = _value(row, text_keys, "--text-key")
        if not isinstance(text, str):
            raise _NoText(f"{key!r} is {_kind(text)}, not a string")
    if not strict:
        _refuse_lone_surrogates(key, text)
    return text, _id(row, id_keys, line.raw, strict) if id_keys else ""


def _parse_around_longest_string(line: Line, text_keys: Strings, id_keys: Strings) -> tuple[str | LongText, str] | None:
    """As `_parse`, without decoding the longest string at once. None if the complete line must be parsed, for example because
    it is invalid.
    """
    start, stop = _longest_string(line.raw)
    around = b"\\u0000".join([line.raw[:start], line.raw[stop:]])
    if around.count(b"\\u0000") > 1 or (long := _long_text(line.raw, start, stop, escaped=True)) is None:
        return None
    try:
        text, id_ = _parse(line._replace(raw=around, size=len(around)), text_keys, id_keys)
    except _NoText:
        return None
    return None if id_ == "\0" else (long if text == "\0" else text, id_)


def _longest_string(raw: bytes) -> tuple[int, int]:
    """[start, stop) of the content of the longest string of a JSON line; an empty range if there is no string."""
    longest = 0, 0
    start = raw.find(b'"') + 1
    while start:
        stop = raw.find(b'"', start)
        while stop > 0 and _is_escaped(raw, stop):
            stop = raw.find(b'"', stop + 1)
        if stop < 0:
            break
        longest = max(longest, (start, stop), key=lambda string: string[1] - string[0])
        start = raw.find(b'"', stop + 1) + 1
    return longest


def _is_escaped(raw: bytes, quote: int) -> bool:
    first = quote
    while raw[first - 1] == ord("\\"):
        first -= 1
    return (quote - first) % 2 == 1


def _long_text(raw: bytes, start: int = 0, stop: int | None = None, escaped: bool = False) -> LongText | None:
    """The text in these bytes. None if it is not valid, or not long."""
    text = LongText(raw, start, len(raw) if stop is None else stop, escaped)
    try:
        is_long = LONG_BYTES < text.stop - start <= LONGEST_RECORD and sum(map(len, text.pieces())) > PART_CHARACTERS
        return text if is_long else None
    except ValueError:
        return None


def _lenient(raw: bytes) -> Any:
    """Parse lines that strict JSON does not allow: with NaN, huge numbers, lone surrogates, or the separator of RFC 7464."""
    try:
        text = raw.removeprefix(b"\x1e").decode()
    except UnicodeDecodeError as error:
        raise _NoText(f"invalid UTF-8 at byte {error.start} of the line{_cause(raw)}") from None
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # more digits than Python converts to an integer
            return json.loads(text, parse_int=float)
    except RecursionError:
        raise _NoText("nested too deeply: more than some thousand lists and objects within each other") from None
    except ValueError as error:
        raise _NoText(f"invalid JSON ({error}){_cause(raw)}") from None


def _cause(raw: bytes, whole: bool = True) -> str:
    """The likely cause of an invalid line, or "". whole: `raw` is the complete line, so that its end can be compared too."""
    shown = raw if len(raw) <= 2 * _CAUSE_BYTES else raw[:_CAUSE_BYTES] + raw[-_CAUSE_BYTES:]
    causes = _CAUSES if whole else _CAUSES[:_CAUSES_BY_BEGINNING]
    return next((f": {cause}" for pattern, cause in causes if pattern.match(shown)), "")


def _value(row: Any, keys: Strings, option: str) -> tuple[str, Any]:
    """The first key that exists and is not null, and its value. Raises _NoText if no key exists."""
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
    existing = ", ".join(map(repr, list(row)[:5])) or "none"
    raise _NoText(f"no key {_named(keys)} (it has {existing}); {option} names another")


def _within(row: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(row, dict) or key not in row:
            return _ABSENT
        row = row[key]
    return row


def _id(row: Any, keys: Strings, raw: bytes, strict: bool) -> str:
    key, value = _value(row, keys, "--id-key")
    if strict and isinstance(value, float):
        key, value = _value(_lenient(raw), keys, "--id-key")  # strict parsing makes floats of integers beyond 64 bits
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _NoText(f"{key!r} is {_kind(value)}, not a string or an integer")
    if isinstance(value, str) and not strict:
        _refuse_lone_surrogates(key, value)
    return str(value)


def _refuse_lone_surrogates(key: str, value: str) -> None:
    if lone := _LONE_SURROGATE.search(value):
        raise _NoText(f"a lone surrogate at character {lone.start()} of {key!r}")


def _kind(value: object) -> str:
    """The JSON type of a value."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


# ---- text files


def _read_text(split: InputSplit, text_keys: Strings, id_keys: Strings, on_bytes: OnBytes) -> Iterator[InputRecord]:
    parts: list[bytes] = []
    size = 0
    try:
        with split.open() as file:
            while part := file.read(READ_BYTES):
                on_bytes(part)
                size += len(part)
                parts = [*parts, part] if size <= LONGEST_RECORD else parts[:1]
    except BrokenInputError as error:
        yield _broken(split, 0, 0, error, on_bytes)
        return
    # a file name may contain any bytes
    id_ = "" if not id_keys else place(split.url).name.encode(errors="replace").decode()
    on_bytes(size.to_bytes(8, "little") + id_.encode() + b"\0text\n")
    raw = b"".join(parts)
    del parts
    try:
        if _long_text(raw) is None:
            _decode(raw, size)
        # files that cat has concatenated have a byte order mark at the beginning of each
        text = _MARKS.sub(b"", raw)
        yield InputRecord(split, 0, 0, raw, _long_text(text) or text.decode(), "", id_)
    except _NoText as bad:
        yield InputRecord(split, 0, 0, raw, None, str(bad))


# ---- parquet


def _read_parquet(split: InputSplit, text_keys: Strings, id_keys: Strings, on_bytes: OnBytes) -> Iterator[InputRecord]:
    # imported here: pyarrow costs each worker 0.2 s and 50 MB
    from megatron_vocagno.preprocess import parquet

    number, offset = 0, 0
    try:
        rows = parquet.rows(place(split.url), split.start, split.stop, text_keys, id_keys)
        for row, text, id_ in rows:
            on_bytes(_framed(text) + _framed(id_) if id_keys else _framed(text))
            raw = text or b""
            try:
                decoded = _long_text(raw) or _column(text, text_keys), _column(id_, id_keys) if id_keys else ""
            except _NoText as bad:
                yield InputRecord(split, number, row, raw, None, str(bad))
            else:
                yield InputRecord(split, number, row, raw, decoded[0], "", decoded[1])
            number, offset = number + 1, row + 1
    except BrokenInputError as error:
        yield _broken(split, number, offset, error, on_bytes)


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
