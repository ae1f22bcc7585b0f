"""A file that is no input -> what it is, by its first bytes or its name, and what to do about it.

What begins as JSON lines, parquet or text does is none of these: no plain text begins with the bytes below. A name counts
only where the bytes say nothing: a file of JSON lines is one, whatever it is called.
"""

from __future__ import annotations

import re

from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.streams import Compression

HEAD = 512  # bytes that tell what a file is
BOM = b"\xef\xbb\xbf"

_UNPACK, _LINES, _PARQUET = "unpack it", "write its texts as JSON lines", "write it as parquet"
_REPACK = "pack it with zstd or gzip"
_ICONV = "convert it, e.g. iconv -f {} -t UTF-8 FILE > FILE.utf8"
_BY_CONTENT = tuple(
    (re.compile(magic, re.DOTALL), what, advice)
    for magic, what, advice in (
        (rb"PK\x03\x04|PK\x05\x06", "a zip archive", _UNPACK),
        (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
        (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
        (rb".{257}ustar(\x00|  \x00)", "a tar archive", _UNPACK),
        (rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", "lz4", _REPACK),
        (rb"\xff\x06\x00\x00sNaPpY", "snappy", _REPACK),
        (rb"\x5d\x00\x00[\x00-\x80]\x00(\xff{8}|.{5}\x00{3})", "lzma, the format before xz", _REPACK),
        (rb"LZIP[\x00\x01]", "lzip", _REPACK),
        (rb"\x89LZO\x00", "lzop", _REPACK),
        (rb"\x1f\x9d", "packed by compress", _REPACK),
        (rb"[\x1e\x22-\x27]\xb5\x2f\xfd", "zstd of before version 0.8", "pack it again with a newer zstd"),
        (rb"PARE..\0\0", "encrypted parquet", "write it without encryption"),
        (rb"ARROW1\x00|\xff{4}", "an Arrow file", _PARQUET),
        (rb"FEA1", "a Feather file, version 1", _PARQUET),
        (rb"ORC[\x00-\x1f]", "an ORC file", _PARQUET),
        (rb"Obj\x01", "an Avro file", _PARQUET),
        (rb"\x89HDF", "an HDF5 file", _LINES),
        (rb"SQLite format 3\x00", "an SQLite database", _LINES),
        (rb"\x93NUMPY", "a numpy array", _LINES),
        (rb"\x80[\x02-\x05]", "a pickle", _LINES),
        (rb"MMIDIDX\x00", "an index of tokenized documents", "name the text that they were made from"),
        (rb"GGUF[\x00-\x1f]", "a model (GGUF)", "name a file with text"),
        (rb"%PDF-", "a PDF", "extract its text"),
        (rb"\{\\rtf", "a rich text document", "extract its text"),
        (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", "extract its text"),
        (rb"WARC/\d", "a WARC archive", "extract its text"),
        (rb"\x7fELF", "a program", "name a file with text"),
        (rb"version https://git-lfs", "a pointer of Git LFS, not the file", "git lfs pull brings it"),
        (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _ICONV.format("UTF-32")),
        (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _ICONV.format("UTF-16")),
        (rb"[\[{]\0\0\0[^\0]", "UTF-32 text", _ICONV.format("UTF-32LE")),
        (rb"\0\0\0[\[{]\0", "UTF-32 text", _ICONV.format("UTF-32BE")),
        (rb"[\[{]\0[^\0]", "UTF-16 text", _ICONV.format("UTF-16LE")),
        (rb"\0[\[{]\0", "UTF-16 text", _ICONV.format("UTF-16BE")),
    )
)
_PACKED = r"(\.(gz|zst|bz2|xz))?"
_BY_NAME = tuple(
    (re.compile(rf".*\.({suffixes}){_PACKED}", re.IGNORECASE | re.DOTALL), what, advice)
    for suffixes, what, advice in (
        ("csv", "a table as text", "write it as parquet, e.g. pandas.read_csv(FILE).to_parquet(FILE.parquet)"),
        ("tsv|tab", "a table as text", "write it as parquet, e.g. pandas.read_table(FILE).to_parquet(FILE.parquet)"),
        ("tar|tgz|tbz2?|txz", "a tar archive", _UNPACK),
        ("lz4|sz|snappy|lzo|lz|lzma|br|Z", "packed in a way that is not read", _REPACK),
        ("arrow|feather|ipc|orc|avro", "a table, to go by its name", _PARQUET),
        ("tfrecords?|mds|msgpack|bin|idx|pkl|pt|npy", "binary, to go by its name", _LINES),
        ("html?|xhtml|xml", "a marked-up page", "extract its text"),
        ("md|markdown|rst|tex|text|log", "plain text under another name", "plain text is read from files that are called *.txt"),
    )
)
_PAGE = re.compile(rb"\s*<(!doctype\s+html|html|\?xml)[\s>]", re.IGNORECASE)
_UNPACKERS: dict[Compression, str] = {"": "", "gzip": "gzip -dc FILE | ", "zstd": "zstd -dc FILE | "}
_UNPACKERS |= {"bzip2": "bzip2 -dc FILE | ", "xz": "xz -dc FILE | "}
# JSON that is not an object a line, and what makes such lines of it
_LAYOUTS = tuple(
    (re.compile(pattern), what, command)
    for pattern, what, command in (
        (rb"\s*\[\s*(\{|\n|\Z)", "one JSON array", "jq -c '.[]'"),
        (rb"\s*\{\s*(\n|\r)", "JSON over several lines", "jq -c ."),
        (rb"\s*\x1e\s*[\[{]\s*\n", "a JSON text sequence over several lines", "jq -c --seq ."),
    )
)


def refuse_foreign(file: Place, head: bytes) -> None:
    """Raises CorpusError for a file of another format, packed or not, by its first bytes."""
    found = next(((what, advice) for magic, what, advice in _BY_CONTENT if magic.match(head)), None) or _wide(head)
    if found:
        raise CorpusError(f"{file} is {found[0]}, not JSON lines, parquet or plain text: {found[1]}")


def refuse_no_lines(file: Place, head: bytes, compression: Compression) -> None:
    """Raises CorpusError for a file that is no JSON lines, by its first bytes as they are unpacked, and its name."""
    while head.startswith(BOM):
        head = head.removeprefix(BOM)
    for pattern, what, command in _LAYOUTS:
        if pattern.match(head):
            given = f"{_UNPACKERS[compression]}{command}{'' if compression else ' FILE'} > FILE.jsonl"
            raise CorpusError(f"{file} is {what}, not JSON with a document a line: convert it, e.g. {given}")
    if head.lstrip(b" \t\r\n\x1e")[:1] in (b"{", b""):
        return
    if _PAGE.match(head):
        raise CorpusError(f"{file} is a web page or XML, not JSON lines: did a download go wrong? Else extract its text")
    for name, what, advice in _BY_NAME:
        if name.fullmatch(file.name):
            raise CorpusError(f"{file} is {what}, not JSON lines or parquet: {advice}")


def _wide(head: bytes) -> tuple[str, str] | None:
    """UTF-16 or UTF-32 without a mark: most of its text has a zero in each unit, and UTF-8 has none."""
    zeros = [head[i::4].count(0) / max(1, len(head[i::4])) for i in range(4)]
    for name, low in (("UTF-32LE", (0,)), ("UTF-32BE", (3,)), ("UTF-16LE", (0, 2)), ("UTF-16BE", (1, 3))):
        if len(head) >= 16 and all((zeros[i] < 0.1) if i in low else (zeros[i] > 0.5) for i in range(4)):
            return f"{name[:6]} text", _ICONV.format(name)
    return None
