"""The inputs of a build: arguments -> files -> pieces.

    find   files, folders, globs and lists of them -> files, in an order that is the same every time
    cut    a file -> pieces that can be read apart from each other; what it is, is seen from its first bytes
    take   the pieces that hold the first so many records

| file                                     | kind    | pieces                                                          |
|------------------------------------------|---------|-----------------------------------------------------------------|
| parquet                                  | parquet | row groups                                                      |
| `*.txt`, perhaps compressed              | text    | one: the file is one document                                   |
| any other, plain                         | lines   | cut after line ends: JSON, one document a line                  |
| any other, gzip, zstd, bzip2 or xz       | lines   | one: such a stream can be read from its beginning only          |
"""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias

from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.errors import BrokenInput, CorpusError, looked_for
from megatron_vocagno.preprocess.foreign import BOM, HEAD, refuse_foreign, refuse_no_lines
from megatron_vocagno.preprocess.streams import Compression, compression_of, open_bytes, open_raw

Kind: TypeAlias = Literal["lines", "parquet", "text"]
Keys: TypeAlias = str | Sequence[str] | None  # one or several, of which the first that is there counts

LONGEST_RECORD = 128 << 20  # bytes; a longer one is refused without being held
PART = 1 << 20  # of a long line, read at once
CUT_BYTES = 64 << 10  # read at once where a line end is looked for
# Compressed text is taken for four times its size. JSON lines of web text and of manuals make 2.7 to 5; the true size is
# known only after reading, and this one decides nothing but how evenly the work is spread.
EXPANSION = 4

_NAMES = re.compile(r".*\.((jsonl|ndjson|json|txt)(\.(gz|zst|bz2|xz))?|parquet)", re.IGNORECASE | re.DOTALL)
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz", ".parquet": "parquet"}


class Line(NamedTuple):
    """A line of a text file."""

    number: int  # in the piece, from 0
    offset: int  # byte of the (decompressed) file
    raw: bytes  # without line end and byte order marks; of one longer than LONGEST_RECORD the beginning
    size: int  # bytes, with line end


@dataclass(frozen=True)
class InputSplit:
    """Whole records of one input file. `take` and `documents.read` read it."""

    url: str
    kind: Kind
    compression: Compression
    start: int  # plain lines: bytes [start, stop); parquet: row groups [start, stop); else 0 and the file's size
    stop: int
    size: int  # bytes of the file that are read
    weight: int  # about how many bytes of uncompressed text
    limit: int | None = None  # records to read at most

    def open(self) -> BinaryIO:
        """Its bytes, decompressed; not of parquet. Reading raises BrokenInput at a damage."""
        return open_bytes(place(self.url), self.compression, self.start, self.stop)

    def lines(self, on_bytes: Callable[[bytes], object]) -> Iterator[Line]:
        """Those that are not blank. on_bytes is handed all of them, each with a line end. Raises BrokenInput at a damage."""
        number, offset = 0, self.start
        with self.open() as file:
            while raw := file.readline(PART):
                on_bytes(raw)
                size = len(raw)
                if not raw.endswith(b"\n"):
                    raw, size = _rest_of_line(file, raw, on_bytes)
                while raw.startswith(BOM):  # files put together by cat have one within
                    raw = raw.removeprefix(BOM)
                raw = raw.rstrip(b"\r\n")
                if (raw and not raw.isspace()) or size > LONGEST_RECORD:
                    yield Line(number, offset, raw, size)
                number += 1
                offset += size

    @functools.cached_property
    def first_line(self) -> int:
        """The number of its first line in the file, from 1; reads all before it, so it is asked only for an error."""
        if self.compression or not self.start:
            return 1
        with open_bytes(place(self.url), "", 0, self.start) as file:
            return 1 + sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(PART), b""))


def _rest_of_line(file: BinaryIO, first: bytes, on_bytes: Callable[[bytes], object]) -> tuple[bytes, int]:
    """A line longer than `first`, or the last one without its end, and its length; its beginning if it is too long."""
    parts, size, part = [first], len(first), first
    while not part.endswith(b"\n") and (part := file.readline(PART)):
        on_bytes(part)
        size += len(part)
        parts = [*parts, part] if size <= LONGEST_RECORD else parts[:1]
    if not part.endswith(b"\n"):
        on_bytes(b"\n")
    return b"".join(parts), size


# ---- find


def find(patterns: Sequence[str], on_note: Callable[[str], object] = lambda note: None) -> list[Place]:
    """The files that are meant, in the order of the patterns, each once. Raises CorpusError for a pattern that means none.

    on_note: called with what a user should know: files of a folder that are left out by their names.

    A pattern is one of these, on this machine or by URL (`s3://bucket/data/*.parquet`):

    - a file, whatever its name;
    - a folder: all files in it and below that are called *.jsonl, *.ndjson, *.json or *.txt, also with .gz, .zst, .bz2 or
      .xz after it, or *.parquet, sorted by their path within it. Names that begin with a dot or an underscore are left
      out, as Spark and Hadoop do (`_temporary/`), and links to folders are not followed; others are left out with a note;
    - a glob, `**` for any number of folders: what a shell would make of it, sorted;
    - `@LIST`: a text file with one of the above a line; blank lines and lines that begin with # are left out.
    """
    found: dict[str, Place] = {}
    for pattern in patterns:
        for name in _listed(pattern[1:]) if pattern.startswith("@") else [pattern]:
            with _reaching(name):
                for file in _meant_by(name, on_note):
                    found.setdefault(_url(file), file)
    return list(found.values())


def _listed(name: str) -> list[str]:
    with _reaching(name):
        # a name may hold what Unicode takes for a line end
        lines = [line.strip() for line in re.split("[\r\n]", place(name).read_bytes().decode("utf-8-sig"))]
    if not (names := [line for line in lines if line and not line.startswith("#")]):
        raise CorpusError(f"{name}: this list names no file")
    return names


def _meant_by(name: str, on_note: Callable[[str], object]) -> list[Place]:
    where = place(name)
    if where.is_dir():
        if files := _in_folder(where, on_note):
            return files
        raise CorpusError(
            f"{name}: no *.jsonl, *.ndjson, *.json, *.txt (perhaps .gz, .zst, .bz2, .xz) or *.parquet in this folder"
        )
    if where.exists():
        return [where]
    files = [file for match in _matches(where) for file in (_in_folder(match, on_note) if match.is_dir() else [match])]
    if not files:
        raise CorpusError(f"{name}: no such file or folder{looked_for(name) if isinstance(where, Path) else ''}")
    return files


def _in_folder(folder: Place, on_note: Callable[[str], object]) -> list[Place]:
    if isinstance(folder, Path):
        names = [found.relative_to(folder).as_posix() for found in folder.rglob("*")]
    else:
        names = [name.removeprefix(folder.path).lstrip("/") for name in folder.fs.find(folder.path)]
    seen = sorted(name for name in names if not any(part[:1] in "._" for part in name.split("/")))
    if isinstance(folder, Path):
        seen = [name for name in seen if (folder / name).is_file()]
    if left_out := [name for name in seen if not _NAMES.fullmatch(name)]:
        shown = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        on_note(f"{folder}: {len(left_out):,} files are left out, for their names are not those of inputs: {shown}")
    return [folder / name for name in seen if _NAMES.fullmatch(name)]


def _matches(pattern: Place) -> list[Place]:
    if isinstance(pattern, Path):
        # pathlib takes no absolute patterns
        return [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    return [pattern.with_segments(name) for name in sorted(pattern.fs.glob(pattern.path))]


def _url(file: Place) -> str:
    """That workers understand in whatever folder they run."""
    return str(file.absolute())


@contextmanager
def _reaching(what: str | Place) -> Iterator[None]:
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        # each object store has errors of its own
        raise CorpusError(f"cannot read {what}: {type(error).__name__}: {error}") from error


# ---- cut


def cut(file: Place, shard_bytes: int, text_key: Keys = None, id_key: Keys = None) -> list[InputSplit]:
    """Pieces of about `shard_bytes`, which hold all of the file and nothing twice; none of an empty file.

    text_key, id_key  as for `documents.read`: parquet with rows must have such columns. None: it is not asked

    Raises CorpusError for a file that is missing or holds no text, with what to do about it.
    """
    with _reaching(file):
        if not file.is_file():
            raise CorpusError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
        size = file.stat().st_size
        if not size:
            return []
        with open_raw(file) as raw:
            head = raw.read(HEAD)
        if head.startswith(b"PAR1"):
            return _cut_parquet(file, size, shard_bytes, text_key, id_key)
        compression = _compression(file, head, size)
        url = _url(file)
        if _is_text(file):
            return [InputSplit(url, "text", compression, 0, size, size, size * (EXPANSION if compression else 1))]
        if compression:
            return [InputSplit(url, "lines", compression, 0, size, size, size * EXPANSION)]
        bounds = _line_bounds(file, size, shard_bytes)
        return [InputSplit(url, "lines", "", a, b, b - a, b - a) for a, b in pairwise(bounds)]


def _compression(file: Place, head: bytes, size: int) -> Compression:
    """Of a file with text; a file with anything else is refused."""
    refuse_foreign(file, head)
    compression = compression_of(head)
    if _SUFFIXES.get(file.suffix.lower(), compression) != compression:
        text = re.fullmatch(rb"[\t\n\r -~\x80-\xff]*", head)
        what = f"that is {compression}: rename it" if compression else "plain text? Rename it" if text else "is it damaged?"
        raise CorpusError(f"{file} is called {file.suffix}, but its first bytes are {head[:8]!r}: {what}")
    if compression:
        # of a damaged file `read` will tell
        with suppress(BrokenInput), open_bytes(file, compression, 0, min(size, PART)) as stream:
            head = stream.read(HEAD)
            if inner := "parquet" if head.startswith(b"PAR1") else compression_of(head):
                raise CorpusError(f"{file} is {inner} inside {compression}: unpack it")
            refuse_foreign(file, head)
    if not _is_text(file):
        refuse_no_lines(file, head, compression)
    return compression


def _is_text(file: Place) -> bool:
    return re.fullmatch(r".*\.txt(\.(gz|zst|bz2|xz))?", file.name, re.IGNORECASE | re.DOTALL) is not None


def names(key: Keys) -> tuple[str, ...]:
    """What is to be looked for, in this order.

    >>> names("text"), names(["text", "body"]), names(None)
    (('text',), ('text', 'body'), ())
    """
    return (key,) if isinstance(key, str) else tuple(key or ())


def _line_bounds(file: Place, size: int, shard_bytes: int) -> list[int]:
    """Bytes after a line end, about shard_bytes apart, from 0 to the size; little is read around each."""
    bounds = [0]
    with open_raw(file) as raw:
        while (at := bounds[-1] + shard_bytes) < size:
            raw.seek(at - 1)
            at -= 1
            while (chunk := raw.read(CUT_BYTES)) and (end := chunk.find(b"\n")) < 0:
                at += len(chunk)
            bounds.append(at + end + 1 if chunk else size)
    return bounds if bounds[-1] == size else [*bounds, size]


def _cut_parquet(file: Place, size: int, shard_bytes: int, text_key: Keys, id_key: Keys) -> list[InputSplit]:
    # pyarrow takes 0.2 s and 50 MB of every process that imports it
    from megatron_vocagno.preprocess import parquet

    try:
        before = [0, *accumulate(group.weight for group in parquet.row_groups(file, names(text_key), names(id_key)))]
    except BrokenInput as error:
        raise CorpusError(f"{file}: {error}{': is it complete?' if 'damaged' in str(error) else ''}") from None
    bounds = [0]
    for i in range(1, len(before) - 1):
        if before[i + 1] - before[bounds[-1]] > shard_bytes:
            bounds.append(i)
    # what a row group takes of the file is not in reach: its share of the whole
    ends = [size * weight // max(1, before[-1]) for weight in before]
    spans = [(a, b) for a, b in pairwise([*bounds, len(before) - 1]) if a < b]
    return [InputSplit(_url(file), "parquet", "", a, b, ends[b] - ends[a], before[b] - before[a]) for a, b in spans]


# ---- take


def take(pieces: Iterable[InputSplit], max_documents: int) -> list[InputSplit]:
    """The pieces that hold the first so many records, the last one with a limit. Reads these and no more.

    A record is what `documents.read` delivers: a bad one and an empty one count.
    """
    taken: list[InputSplit] = []
    left = max_documents
    for piece in pieces:
        if left <= 0:
            break
        n = _count(piece, left)
        taken.append(replace(piece, limit=left) if n == left else piece)
        left -= n
    return taken


def _count(piece: InputSplit, at_most: int) -> int:
    """Records of a piece, as far as `at_most`."""
    if piece.kind == "text":
        return 1
    if piece.kind == "parquet":
        from megatron_vocagno.preprocess import parquet

        groups = parquet.row_groups(place(piece.url))[piece.start : piece.stop]
        return min(at_most, sum(group.rows for group in groups))
    n = 0
    try:
        for _ in islice(piece.lines(lambda _: None), at_most):
            n += 1
    except BrokenInput:
        n += 1
    return n
