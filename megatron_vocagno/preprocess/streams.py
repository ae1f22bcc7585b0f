"""The decompressed bytes of a local or remote input file.

    open_bytes    a range of a file -> a buffered reader of its (decompressed) bytes
    open_raw      the file without a buffer: seek, and read exactly the requested bytes

Memory is one buffer for a file of any size. If the data is damaged, the bytes before the damaged compressed block are delivered,
and reading then raises BrokenInputError.
"""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol, TypeAlias, cast

from isal import igzip_lib

from megatron_vocagno import compat
from megatron_vocagno.corpus.places import Place
from megatron_vocagno.errors import BrokenInputError, CorpusError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

zstd = compat.zstd()

Compression: TypeAlias = Literal["", "gzip", "zstd", "bzip2", "xz"]

LOCAL_BUFFER = 1 << 20
REMOTE_BUFFER = 8 << 20  # bytes per request
COMPRESSED_CHUNK = 4096  # if a chunk is damaged, at most the data of this chunk is lost
# The file determines the size of the window or dictionary, and thereby the memory. `zstd --long=31` uses 2 GiB, which is the
# largest window that the zstd command reads; xz uses 1.5 GiB at most.
LARGEST_ZSTD_WINDOW = 31  # bits
XZ_MEMORY = 2 << 30
LONGEST_GZIP_HEADER = 1 << 20  # the length of a name is not limited by the format

# The first bytes of a member, frame or stream. bzip2's are plain text, so its first block, or its end, is compared too.
_BEGINNINGS: dict[Compression, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b\x08",),
    # a frame or a skippable frame: files of pzstd begin with a skippable frame, and files of the seekable format end with one
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),
    "bzip2": tuple(b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
    "xz": (b"\xfd7zXZ\x00",),
}
HEADER = 18  # bytes that identify a member: the longest header of a zstd frame


class _Decompressor(Protocol):
    """Decompresses one member, frame or stream. It has the interface of bz2.BZ2Decompressor."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


# the decompressor of gzip does not read the header
_DECOMPRESSORS: dict[Compression, Callable[[], _Decompressor]] = {
    "gzip": cast(Callable[[], _Decompressor], partial(igzip_lib.IgzipDecompressor, flag=igzip_lib.DECOMP_GZIP_NO_HDR_VER)),
    "zstd": partial(zstd.ZstdDecompressor, options={zstd.DecompressionParameter.window_log_max: LARGEST_ZSTD_WINDOW}),
    "bzip2": bz2.BZ2Decompressor,
    "xz": partial(lzma.LZMADecompressor, memlimit=XZ_MEMORY),
}
_FAILURES: tuple[type[Exception], ...] = (
    cast(type[Exception], igzip_lib.error),
    MemoryError,
    zstd.ZstdError,
    lzma.LZMAError,
    OSError,
    EOFError,
    ValueError,
)


def compression_of(head: bytes) -> Compression:
    """The compression of a file, by its first bytes; "" if it is not a known one."""
    return next((name for name, beginnings in _BEGINNINGS.items() if head.startswith(beginnings)), "")


def open_bytes(where: Place, compression: Compression, start: int, stop: int) -> BinaryIO:
    """The bytes [start, stop) of a file, decompressed.

    Reading raises BrokenInputError for damaged data, and OSError if the file cannot be read.
    """
    size = LOCAL_BUFFER if isinstance(where, Path) else REMOTE_BUFFER
    section: BinaryIO = io.BufferedReader(_Section(where, start, stop), size)
    return io.BufferedReader(_Decompressed(section, compression, where), LOCAL_BUFFER) if compression else section


def open_raw(where: Place) -> BinaryIO:
    """The file without a buffer. On an object store, each read is one request for exactly these bytes."""
    return where.open("rb", buffering=0) if isinstance(where, Path) else where.open("rb", cache_type="none")


class _Section(io.RawIOBase):
    """The bytes [start, stop) of a file."""

    file: io.RawIOBase | None = None

    def __init__(self, where: Place, start: int, stop: int) -> None:
        self.file = cast(io.RawIOBase, open_raw(where))
        self.file.seek(start)
        self.left, self.stop = stop - start, stop

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        assert self.file is not None
        n = self.file.readinto(memoryview(buffer)[: self.left]) or 0
        if not n and self.left:
            raise BrokenInputError(
                f"the file ends at byte {self.stop - self.left:,}, it had {self.stop:,} when the work was planned"
            )
        self.left -= n
        return n

    def close(self) -> None:
        # without a file if it could not be opened: the interpreter closes what it deletes
        if not self.closed and self.file is not None:
            self.file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """All members of a compressed file in sequence.

    Files of pigz, bgzip, pbzip2 and pzstd have several members, and files that cat has concatenated. Zeros between and after
    members are padding, as tapes and block devices write it.
    """

    def __init__(self, source: BinaryIO, compression: Compression, where: Place) -> None:
        self.source, self.name, self.where = source, compression, where
        self.member: _Decompressor | None = None
        self.data = b""  # bytes of the file that are read and not yet decoded
        self.at = 0  # number of bytes that are read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        while True:
            if self.member is None or self.member.eof:
                if not self._begin_member(self.member.unused_data if self.member else b""):
                    return 0
                self.member = _DECOMPRESSORS[self.name]()
            if self.member.needs_input and not self.data:
                self._read()
            data, self.data = self.data, b""
            if decoded := self._decode(self.member, data, len(view)):
                view[: len(decoded)] = decoded
                return len(decoded)

    def _decode(self, member: _Decompressor, data: bytes, most: int) -> bytes:
        try:
            return member.decompress(data, most)
        except _FAILURES as error:
            if isinstance(error, MemoryError) or "not enough memory" in str(error):
                raise CorpusError(
                    f"{self.where}: not enough memory to decompress it: {self.name} data may need a window of up to 2 GiB "
                    "(zstd --long, xz --lzma2=dict). Use fewer workers, or compress it again with a smaller window"
                ) from None
            if re.search("upport|too much memory|limit exceeded", str(error)):
                raise BrokenInputError(
                    f"{self.name} data that cannot be read here ({error}): if they are whole, unpack them with what packed them"
                ) from None
            raise BrokenInputError(f"damaged {self.name} data ({error})") from None

    def _begin_member(self, rest: bytes) -> bool:
        """Find the next member; False if there is none. `data` is then its beginning, without the header of gzip."""
        self.data = rest.lstrip(b"\0")
        while not self.data and (chunk := self._chunk()):
            self.data = chunk.lstrip(b"\0")
        while self.data and len(self.data) < HEADER and (chunk := self._chunk()):
            self.data += chunk
        if not self.data:
            return False
        beginnings = _BEGINNINGS[self.name]
        cut_off = any(each.startswith(self.data) for each in beginnings)
        if not self.data.startswith(beginnings) and not cut_off:
            raise BrokenInputError(
                f"at byte {self.at - len(self.data):,} of the file its {self.name} data end, and what follows is something "
                f"else: {self.data[:16]!r}"
            )
        if self.name == "gzip":
            self._skip_gzip_header()
        elif self.name == "zstd":
            self._refuse_dictionary()
        return True

    def _skip_gzip_header(self) -> None:
        """Skip the header of RFC 1952. isal misreads the headers of pgzip and mgzip if a read ends within one."""
        while (size := gzip_header_size(self.data)) is None:
            if len(self.data) > LONGEST_GZIP_HEADER:
                raise BrokenInputError(f"damaged gzip data (a header of more than {LONGEST_GZIP_HEADER:,} bytes)")
            self._read()
        self.data = self.data[size:]

    def _refuse_dictionary(self) -> None:
        try:
            dictionary = zstd.get_frame_info(self.data).dictionary_id
        except zstd.ZstdError:
            return  # skippable, cut off or damaged: the decoder raises the error
        if dictionary:
            raise BrokenInputError(
                f"zstd data that were packed with a dictionary ({dictionary}): unpack them with it (zstd -d -D)"
            )

    def _read(self) -> None:
        """Read more data of a member. Raises BrokenInputError at the end of the file."""
        if not (chunk := self._chunk()):
            raise BrokenInputError(f"the {self.name} data ends in the middle: cut off?")
        self.data += chunk

    def _chunk(self) -> bytes:
        chunk = self.source.read(COMPRESSED_CHUNK)
        self.at += len(chunk)
        return chunk

    def close(self) -> None:
        if not self.closed:
            self.source.close()
        super().close()


def gzip_header_size(data: bytes) -> int | None:
    """Size in bytes of the gzip header at the beginning of `data`; None if it is incomplete.

    Raises BrokenInputError for an invalid header.
    """
    extra, name, comment, crc, reserved = 4, 8, 16, 2, 0xE0
    if len(data) < 12:  # a complete member is longer
        return None
    flags, size = data[3], 10
    if flags & reserved:
        raise BrokenInputError(f"damaged gzip data (flags 0x{flags:02x} in a header: RFC 1952 has no such)")
    if flags & extra:
        size += 2 + int.from_bytes(data[10:12], "little")
    for text in (name, comment):
        if flags & text:
            if (end := data.find(b"\0", size)) < 0:
                return None
            size = end + 1
    if flags & crc:
        size += 2
        if size <= len(data) and int.from_bytes(data[size - 2 : size], "little") != zlib.crc32(data[: size - 2]) & 0xFFFF:
            raise BrokenInputError("damaged gzip data (a header's checksum does not fit)")
    return size if size <= len(data) else None
