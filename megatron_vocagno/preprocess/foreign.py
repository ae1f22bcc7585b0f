"""Recognize files that are not input by their first bytes, and refuse them with advice.

The formats are those that people often pass by mistake, and those that would otherwise be read as text without an error: a
`.txt` file of ASCII characters and zero bytes is valid UTF-8. All other formats fail later as invalid JSON or invalid UTF-8.

Files that begin as JSON lines, parquet or text do are not refused: plain text does not begin with the bytes below.
"""

from __future__ import annotations

import re

from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.streams import Compression

HEAD = 512  # bytes that are enough to recognize a format
BOM = b"\xef\xbb\xbf"

_ICONV = "convert it, e.g. iconv -f {} -t UTF-8 FILE > FILE.utf8"
_FORMATS = tuple(
    (re.compile(magic, re.DOTALL), what, advice)
    for magic, what, advice in (
        (rb"PK\x03\x04|PK\x05\x06", "a zip archive", "unpack it"),
        (rb".{257}ustar(\x00|  \x00)", "a tar archive", "unpack it"),
        (rb"ARROW1\x00|\xff{4}", "an Arrow file", "write it as parquet"),
        (rb"\x80[\x02-\x05]", "a pickle", "write its texts as JSON lines"),
        (rb"%PDF-|\{\\rtf|WARC/\d", "a PDF, RTF or WARC file", "extract its text"),
        (rb"version https://git-lfs", "a pointer of Git LFS, not the file", "run git lfs pull"),
        (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _ICONV.format("UTF-32")),
        (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _ICONV.format("UTF-16")),
        (rb"[\[{]\0\0\0[^\0]", "UTF-32 text", _ICONV.format("UTF-32LE")),
        (rb"\0\0\0[\[{]\0", "UTF-32 text", _ICONV.format("UTF-32BE")),
        (rb"[\[{]\0[^\0]", "UTF-16 text", _ICONV.format("UTF-16LE")),
        (rb"\0[\[{]\0", "UTF-16 text", _ICONV.format("UTF-16BE")),
    )
)
_UNPACKERS: dict[Compression, str] = {"": "", "gzip": "gzip -dc FILE | ", "zstd": "zstd -dc FILE | "}
_UNPACKERS |= {"bzip2": "bzip2 -dc FILE | ", "xz": "xz -dc FILE | "}
# JSON that does not have one object per line, and the command that converts it
_LAYOUTS = tuple(
    (re.compile(pattern), what, command)
    for pattern, what, command in (
        (rb"\s*\[\s*(\{|\n|\Z)", "one JSON array", "jq -c '.[]'"),
        (rb"\s*\{\s*(\n|\r)", "JSON over several lines", "jq -c ."),
        (rb"\s*\x1e\s*[\[{]\s*\n", "a JSON text sequence over several lines", "jq -c --seq ."),
    )
)


def refuse_foreign(file: Place, head: bytes) -> None:
    """Raises CorpusError for a file of another format.

    head: the first bytes of the file, or the first bytes of its decompressed content
    """
    found = next(((what, advice) for magic, what, advice in _FORMATS if magic.match(head)), None) or _wide(head)
    if found:
        raise CorpusError(f"{file} is {found[0]}, not JSON lines, parquet or plain text: {found[1]}")


def refuse_layout(file: Place, head: bytes, compression: Compression) -> None:
    """Raises CorpusError for JSON that does not have one object per line. head: the first decompressed bytes."""
    while head.startswith(BOM):
        head = head.removeprefix(BOM)
    for pattern, what, command in _LAYOUTS:
        if pattern.match(head):
            example = f"{_UNPACKERS[compression]}{command}{'' if compression else ' FILE'} > FILE.jsonl"
            raise CorpusError(f"{file} is {what}, not JSON with one document per line: convert it, e.g. {example}")


def _wide(head: bytes) -> tuple[str, str] | None:
    """Recognize UTF-16 and UTF-32 if there is no byte order mark: most units of text have zero bytes, and UTF-8 has none."""
    zeros = [head[i::4].count(0) / max(1, len(head[i::4])) for i in range(4)]
    for name, low in (("UTF-32LE", (0,)), ("UTF-32BE", (3,)), ("UTF-16LE", (0, 2)), ("UTF-16BE", (1, 3))):
        if len(head) >= 16 and all((zeros[i] < 0.1) if i in low else (zeros[i] > 0.5) for i in range(4)):
            return f"{name[:6]} text", _ICONV.format(name)
    return None
