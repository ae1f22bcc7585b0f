"""The same documents in every container that the corpus is read from, and ways to read them all."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from backports import zstd

from megatron_vocagno.preprocess.documents import InputRecord, read
from megatron_vocagno.preprocess.inputs import InputSplit, cut


def lines(texts: Iterable[str]) -> bytes:
    """JSON lines with the keys text and id."""
    return b"".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, text in enumerate(texts))


def parts(data: bytes, n: int) -> list[bytes]:
    """`data` in n parts, cut wherever that is."""
    return [data[len(data) * i // n : len(data) * (i + 1) // n] for i in range(n)]


def members(compress: Callable[[bytes], bytes], n: int, data: bytes) -> bytes:
    """n members, frames or streams, as bgzip, pbzip2 and pzstd write them, or cat puts them together."""
    return b"".join(map(compress, parts(data, n)))


def flushed(data: bytes) -> bytes:
    """One member with the flushes of pigz."""
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH) for part in parts(data, 20)) + packer.flush()


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def gzip_member(
    data: bytes, extra: bytes = b"", name: bytes = b"", comment: bytes = b"", crc: bool = False, level: int = 6
) -> bytes:
    """With the optional fields of its header that are not empty, as mgzip, pgzip, bgzip and others write them."""
    packer = zlib.compressobj(level, wbits=-15)
    flags = 4 * bool(extra) | 8 * bool(name) | 16 * bool(comment) | 2 * crc
    header = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff"
    header += len(extra).to_bytes(2, "little") + extra if extra else b""
    header += b"".join(text + b"\0" for text in (name, comment) if text)
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little") if crc else b""
    sums = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return header + packer.compress(data) + packer.flush() + sums


# the empty block with which bgzip ends a file
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def zstd_stream(data: bytes, window_log: int = 0) -> bytes:
    """Without a content size, as from a pipe; with a window of 2^window_log bytes, as `zstd --long`."""
    parameter = zstd.CompressionParameter
    options = {parameter.window_log: window_log, parameter.enable_long_distance_matching: 1} if window_log else {}
    packer = zstd.ZstdCompressor(options=options)
    return packer.compress(data) + packer.flush()


def xz_with_dictionary(data: bytes, size: int) -> bytes:
    """As `xz --lzma2=dict=…`; packed with a small one, for what packs it takes eleven times its size."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    packed = lzma.compress(data, check=lzma.CHECK_NONE, filters=filters)
    # the block header's only filter: its id, the size of its properties, and the size as 2 or 3 shifted left
    bits = next(bits for bits in range(41) if (2 | bits & 1) << bits // 2 + 11 >= size)
    at = packed.index(b"\x21\x01", 12)
    header_size = 4 * (packed[12] + 1)
    header = packed[12 : at + 2] + bytes([bits]) + packed[at + 3 : 12 + header_size - 4]
    return packed[:12] + header + zlib.crc32(header).to_bytes(4, "little") + packed[12 + header_size :]


summed = partial(zstd.compress, options={zstd.CompressionParameter.checksum_flag: 1})
# name of the container and the suffix of its files -> how it is made
CONTAINERS: dict[tuple[str, str], Callable[[bytes], bytes]] = {
    ("plain", ""): bytes,
    ("gzip", ".gz"): gzip.compress,
    ("gzip of many members", ".gz"): partial(members, gzip.compress, 30),
    ("gzip, flushed", ".gz"): flushed,
    ("gzip, an empty member last", ".gz"): lambda data: gzip.compress(data) + gzip.compress(b""),
    ("gzip of mgzip", ".gz"): partial(members, partial(gzip_member, extra=b"IG\x04\0\0\x08\0\0", name=b"c.jsonl"), 300),
    ("gzip of bgzip", ".gz"): lambda data: members(partial(gzip_member, extra=b"BC\x02\0\x01\x01"), 30, data) + BGZIP_END,
    ("gzip, padded", ".gz"): lambda data: gzip.compress(data) + bytes(10_000) + gzip.compress(b"") + bytes(512),
    ("zstd", ".zst"): summed,
    ("zstd of many frames", ".zst"): partial(members, summed, 30),
    ("zstd with skippable frames", ".zst"): lambda data: skippable(b"1234") + summed(data) + skippable(b"an index"),
    ("zstd of unknown size", ".zst"): zstd_stream,
    ("zstd, long", ".zst"): partial(zstd_stream, window_log=31),
    ("zstd, empty frames", ".zst"): lambda data: summed(b"") + summed(data) + zstd_stream(b""),
    ("zstd, level 19", ".zst"): partial(zstd.compress, level=19),
    ("bzip2", ".bz2"): bz2.compress,
    ("bzip2 of many streams", ".bz2"): partial(members, bz2.compress, 30),
    ("xz", ".xz"): lzma.compress,
    ("xz of many streams", ".xz"): partial(members, lzma.compress, 30),
    ("xz, large dictionary", ".xz"): partial(xz_with_dictionary, size=3 << 29),
    ("xz, padded", ".xz"): lambda data: lzma.compress(data) + bytes(8),
}


DECODERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": partial(zstd.ZstdDecompressor, options={zstd.DecompressionParameter.window_log_max: 31}),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


def decodable(data: bytes, suffix: str) -> bytes:
    """What the beginning of a sound file gives, by another road: whole members at once, and zlib for gzip."""
    out = b""
    while data:
        decoder = DECODERS[suffix]()
        out += decoder.decompress(data)
        data = decoder.unused_data.lstrip(b"\0")
    return out


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def read_all(pieces: Iterable[InputSplit], text_key: str = "text", id_key: str | None = None) -> tuple[list[InputRecord], str]:
    """All documents, and the sha256 of what decides them."""
    digest = hashlib.sha256()
    documents = [document for piece in pieces for document in read(piece, text_key, id_key, digest.update)]
    return documents, digest.hexdigest()


def of(file: Path, data: bytes, id_key: str | None = None) -> list[InputRecord]:
    """The documents of a file with this content."""
    return read_all(cut(write(file, data), 10**9), id_key=id_key)[0]


def write(file: Path, data: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file
