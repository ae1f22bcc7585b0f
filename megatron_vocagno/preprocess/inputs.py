"""The inputs of a build: arguments -> files -> splits.

    find   files, folders, globs and lists of them -> files, always in the same order
    cut    a file -> splits that can be read independently; the first bytes of the file determine its kind
    take   the splits that contain the first N records

| file                                     | kind    | splits                                                          |
|------------------------------------------|---------|-----------------------------------------------------------------|
| parquet                                  | parquet | row groups                                                      |
| `*.txt`, compressed or not               | text    | one: the file is one document                                   |
| any other, plain                         | lines   | cut after line ends: JSON, one document per line                |
| any other, gzip, zstd, bzip2 or xz       | lines   | one: such a stream can only be read from its beginning          |
"""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias

from megatron_vocagno.corpus.places import Place, place
from megatron_vocagno.errors import BrokenInputError, CorpusError, missing_path_hint
from megatron_vocagno.preprocess.foreign import BOM, HEAD, refuse_foreign, refuse_layout
from megatron_vocagno.preprocess.streams import Compression, compression_of, open_bytes, open_raw

Kind: TypeAlias = Literal["lines", "parquet", "text"]
Keys: TypeAlias = str | Sequence[str] | None  # one key, or several: a record's first existing key is used

LONGEST_RECORD = 128 << 20  # bytes; a longer record is refused and not kept in memory
READ_BYTES = 1 << 20  # bytes of a long line that are read at once
CUT_BYTES = 64 << 10  # bytes that are read at once to find a line end
# Compressed text is assumed to expand four times. JSON lines of web text and of manuals expand 2.7 to 5 times. The true size is
# known only after reading, and this estimate only affects how evenly the work is distributed.
EXPANSION = 4

_NAMES = re.compile(r".*\.((jsonl|ndjson|json|txt)(\.(gz|zst|bz2|xz))?|parquet)", re.IGNORECASE | re.DOTALL)
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz", ".parquet": "parquet"}


class Line(NamedTuple):
    """A line of a text file."""

    number: int  # in the split, from 0
    offset: int  # byte of the (decompressed) file
    raw: bytes  # without line end and byte order marks; only the beginning if it is longer than LONGEST_RECORD
    size: int  # bytes, with line end


@dataclass(frozen=True)
class InputSplit:
    """A part of an input file that contains complete records. `take` and `documents.read` read it.

    start, stop  bytes of plain lines, row groups of parquet; for all other files 0 and the size of the file
    size         bytes of the file that are read
    weight       approximate bytes of uncompressed text
    limit        maximum number of records to read
    """

    url: str
    kind: Kind
    compression: Compression
    start: int
    stop: int
    size: int
    weight: int
    limit: int | None = None

    def open(self) -> BinaryIO:
        """The decompressed bytes of lines or text. Reading raises BrokenInputError at damaged data."""
        return open_bytes(place(self.url), self.compression, self.start, self.stop)

    def lines(self, on_bytes: Callable[[bytes], object]) -> Iterator[Line]:
        """The lines that are not blank. Raises BrokenInputError at damaged data.

        on_bytes: called with the bytes of all lines, blank ones too, each with a line end
        """
        number, offset = 0, self.start
        with self.open() as file:
            while raw := file.readline(READ_BYTES):
                on_bytes(raw)
                size = len(raw)
                if not raw.endswith(b"\n"):
                    raw, size = _rest_of_line(file, raw, on_bytes)
                while raw.startswith(BOM):  # files that cat has concatenated contain one per file
                    raw = raw.removeprefix(BOM)
                raw = raw.rstrip(b"\r\n")
                if (raw and not raw.isspace()) or size > LONGEST_RECORD:
                    yield Line(number, offset, raw, size)
                number += 1
                offset += size

    @functools.cached_property
    def first_line(self) -> int:
        """The number of the split's first line in the file, from 1. Reads all lines before it, so use it only for errors."""
        if self.compression or not self.start:
            return 1
        with open_bytes(place(self.url), "", 0, self.start) as file:
            return 1 + sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(READ_BYTES), b""))


def _rest_of_line(file: BinaryIO, first: bytes, on_bytes: Callable[[bytes], object]) -> tuple[bytes, int]:
    """The rest of a line that is longer than `first` or has no line end.

    Returns the line without line end, and its length with line end. The line is cut if it is longer than LONGEST_RECORD.
    """
    line, size, part = BytesIO(), len(first), first  # its value is not a copy, unlike that of a list of parts
    line.write(first)
    while not part.endswith(b"\n") and (part := file.readline(READ_BYTES)):
        on_bytes(part)
        size += len(part)
        if size <= LONGEST_RECORD:
            line.write(part)
        else:
            line.truncate(len(first))
    if not part.endswith(b"\n"):
        on_bytes(b"\n")
    with line.getbuffer() as written:
        end = len(written)
        while end and written[end - 1] in b"\r\n":
            end -= 1
    line.truncate(end)
    return line.getvalue(), size


# ---- find


def find(patterns: Sequence[str], on_note: Callable[[str], object] = lambda note: None) -> list[Place]:
    """The files that match the patterns, in the order of the patterns, each file once.

    on_note: called with a note about files of a folder that are skipped because of their names

    A pattern is one of the following, as a path or as a URL (`s3://bucket/data/*.parquet`):

    - A file with any name.
    - A folder. All files in it and below that match *.jsonl, *.ndjson, *.json or *.txt, optionally with .gz, .zst, .bz2 or .xz,
      or *.parquet are used, sorted by their path within the folder. Names that begin with a dot or an underscore are skipped, as
      Spark and Hadoop do (`_temporary/`). Links to folders are not followed. Other files are skipped with a note.
    - A glob, as in a shell, with `**` for any number of folders. Its matches are sorted.
    - `@LIST`: a text file with one of the patterns above per line. Blank lines and lines that begin with # are skipped.

    Raises CorpusError for a pattern without a match.
    """
    found: dict[str, Place] = {}
    for pattern in patterns:
        for name in _listed(pattern[1:]) if pattern.startswith("@") else [pattern]:
            with _reaching(name):
                for file in _matching(name, on_note):
                    found.setdefault(_url(file), file)
    return list(found.values())


def _listed(name: str) -> list[str]:
    with _reaching(name):
        # not splitlines: a file name may contain other line ends of Unicode
        lines = [line.strip() for line in re.split("[\r\n]", place(name).read_bytes().decode("utf-8-sig"))]
    if not (names := [line for line in lines if line and not line.startswith("#")]):
        raise CorpusError(f"{name}: this list contains no file names")
    return names


def _matching(name: str, on_note: Callable[[str], object]) -> list[Place]:
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
        raise CorpusError(f"{name}: no such file or folder{missing_path_hint(name) if isinstance(where, Path) else ''}")
    return files


def _in_folder(folder: Place, on_note: Callable[[str], object]) -> list[Place]:
    if isinstance(folder, Path):
        names = [found.relative_to(folder).as_posix() for found in folder.rglob("*")]
    else:
        names = [name.removeprefix(folder.path).lstrip("/") for name in folder.fs.find(folder.path)]
    seen = sorted(name for name in names if not any(part[:1] in "._" for part in name.split("/")))
    if isinstance(folder, Path):
        seen = [name for name in seen if (folder / name).is_file()]
    if skipped := [name for name in seen if not _NAMES.fullmatch(name)]:
        shown = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
        on_note(f"{folder}: {len(skipped):,} files are skipped, because their names are not those of inputs: {shown}")
    return [folder / name for name in seen if _NAMES.fullmatch(name)]


def _matches(pattern: Place) -> list[Place]:
    if isinstance(pattern, Path):
        # pathlib does not accept absolute patterns
        return [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    return [pattern.with_segments(name) for name in sorted(pattern.fs.glob(pattern.path))]


def _url(file: Place) -> str:
    """The absolute path or URL, which workers can use in any working directory."""
    return str(file.absolute())


@contextmanager
def _reaching(what: str | Place) -> Iterator[None]:
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        # each object store raises its own errors
        raise CorpusError(f"cannot read {what}: {type(error).__name__}: {error}") from error


# ---- cut


def cut(file: Place, shard_bytes: int, text_key: Keys = None, id_key: Keys = None) -> list[InputSplit]:
    """Cut a file into splits of about `shard_bytes`, which contain every record exactly once. An empty file has no splits.

    text_key, id_key  as for `documents.read`: parquet with rows must have such columns. None: do not check

    Raises CorpusError, with advice, for a file that is missing or contains no text.
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
    """The compression of a file with text. Raises CorpusError for a file of another format."""
    refuse_foreign(file, head)
    compression = compression_of(head)
    if _SUFFIXES.get(file.suffix.lower(), compression) != compression:
        text = re.fullmatch(rb"[\t\n\r -~\x80-\xff]*", head)
        advice = f"that is {compression}: rename it" if compression else "plain text? Rename it" if text else "is it damaged?"
        raise CorpusError(f"{file} is called {file.suffix}, but its first bytes are {head[:8]!r}: {advice}")
    if compression:
        # `documents.read` reports damaged data
        with suppress(BrokenInputError), open_bytes(file, compression, 0, min(size, READ_BYTES)) as stream:
            head = stream.read(HEAD)
            if inner := "parquet" if head.startswith(b"PAR1") else compression_of(head):
                raise CorpusError(f"{file} is {inner} inside {compression}: unpack it")
            refuse_foreign(file, head)
    if not _is_text(file):
        refuse_layout(file, head, compression)
    return compression


def _is_text(file: Place) -> bool:
    return re.fullmatch(r".*\.txt(\.(gz|zst|bz2|xz))?", file.name, re.IGNORECASE | re.DOTALL) is not None


def names(key: Keys) -> tuple[str, ...]:
    """The keys to search for, in their order.

    >>> names("text"), names(["text", "body"]), names(None)
    (('text',), ('text', 'body'), ())
    """
    return (key,) if isinstance(key, str) else tuple(key or ())


def _line_bounds(file: Place, size: int, shard_bytes: int) -> list[int]:
    """Offsets after line ends, about shard_bytes apart, from 0 to the size. Only a few bytes around each offset are read."""
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
    # imported here: pyarrow costs each process 0.2 s and 50 MB
    from megatron_vocagno.preprocess import parquet

    try:
        before = [0, *accumulate(group.weight for group in parquet.row_groups(file, names(text_key), names(id_key)))]
    except BrokenInputError as error:
        raise CorpusError(f"{file}: {error}{': is it complete?' if 'damaged' in str(error) else ''}") from None
    bounds = [0]
    for i in range(1, len(before) - 1):
        if before[i + 1] - before[bounds[-1]] > shard_bytes:
            bounds.append(i)
    # the bytes of a row group in the file are not known, so they are estimated by its share of the weight
    ends = [size * weight // max(1, before[-1]) for weight in before]
    spans = [(a, b) for a, b in pairwise([*bounds, len(before) - 1]) if a < b]
    return [InputSplit(_url(file), "parquet", "", a, b, ends[b] - ends[a], before[b] - before[a]) for a, b in spans]


# ---- take


def take(splits: Iterable[InputSplit], max_documents: int) -> list[InputSplit]:
    """The splits that contain the first `max_documents` records, the last split with a limit. Reads only these splits.

    Records are counted as `documents.read` yields them: bad and empty records count.
    """
    taken: list[InputSplit] = []
    left = max_documents
    for split in splits:
        if left <= 0:
            break
        n = _count(split, left)
        taken.append(replace(split, limit=left) if n == left else split)
        left -= n
    return taken


def _count(split: InputSplit, at_most: int) -> int:
    """The number of records of a split, or `at_most` if there are more."""
    if split.kind == "text":
        return 1
    if split.kind == "parquet":
        from megatron_vocagno.preprocess import parquet

        groups = parquet.row_groups(place(split.url))[split.start : split.stop]
        return min(at_most, sum(group.rows for group in groups))
    n = 0
    try:
        for _ in islice(split.lines(lambda _: None), at_most):
            n += 1
    except BrokenInputError:
        n += 1
    return n
