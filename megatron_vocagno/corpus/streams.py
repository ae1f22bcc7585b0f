"""The bytes of an input file: a stretch of it, decompressed, local or not.

    open_bytes    a stretch of a file -> a buffered reader of its (decompressed) bytes
    open_raw      the file itself: seek, and read exactly what is asked for

Memory is a buffer, whatever the size of the file. What comes before a damage is delivered, but for the block of the
compressed data that it lies in; then reading raises BrokenInput.
"""

from __future__ import annotations

import bz2
import io
import lzma
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Protocol, TypeAlias, cast

from isal import igzip_lib

from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.places import Place

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Compression: TypeAlias = Literal["", "gzip", "zstd", "bzip2", "xz"]

LOCAL_BUFFER = 1 << 20
REMOTE_BUFFER = 8 << 20  # a request each
COMPRESSED_CHUNK = 4096  # what a decoder cannot deliver when it meets a damage is at most what it made of one chunk
XZ_MEMORY = 256 << 20  # a dictionary is as large as the file says; xz -9 needs 65 MiB

_MAGIC: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    # a frame, or a skippable one, with which pzstd begins
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}


class InputError(CorpusError):
    """An input that is missing, in another format, or holds a bad record."""


class BrokenInput(Exception):
    """The reason why a file gives no more: it is cut off or damaged."""


class _Decompressor(Protocol):
    """Of one member, frame or stream: the protocol of bz2.BZ2Decompressor."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


_DECOMPRESSORS: dict[Compression, Callable[[], _Decompressor]] = {
    "gzip": cast(Callable[[], _Decompressor], partial(igzip_lib.IgzipDecompressor, flag=igzip_lib.DECOMP_GZIP)),
    "zstd": zstd.ZstdDecompressor,
    "bzip2": bz2.BZ2Decompressor,
    "xz": partial(lzma.LZMADecompressor, memlimit=XZ_MEMORY),
}
_DAMAGE: tuple[type[Exception], ...] = (
    cast(type[Exception], igzip_lib.error),
    zstd.ZstdError,
    lzma.LZMAError,
    OSError,
    EOFError,
    ValueError,
)


def compression_of(head: bytes) -> Compression:
    """By the first bytes of a file; "" for none that is known."""
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), "")


def open_bytes(where: Place, compression: Compression, start: int, stop: int) -> BinaryIO:
    """The bytes [start, stop) of a file, decompressed. Reading raises BrokenInput, or OSError where the file cannot be read."""
    size = LOCAL_BUFFER if isinstance(where, Path) else REMOTE_BUFFER
    section: BinaryIO = io.BufferedReader(_Section(where, start, stop), size)
    return io.BufferedReader(_Decompressed(section, compression), LOCAL_BUFFER) if compression else section


def open_raw(where: Place) -> BinaryIO:
    """Without a buffer: on an object store each read is one request for these bytes alone."""
    return where.open("rb", buffering=0) if isinstance(where, Path) else where.open("rb", cache_type="none")


class _Section(io.RawIOBase):
    """The bytes [start, stop) of a file."""

    def __init__(self, where: Place, start: int, stop: int) -> None:
        self.file = cast(io.RawIOBase, open_raw(where))
        self.file.seek(start)
        self.left, self.stop = stop - start, stop

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        n = self.file.readinto(memoryview(buffer)[: self.left]) or 0
        if not n and self.left:
            raise BrokenInput(f"the file ends at byte {self.stop - self.left:,}, it had {self.stop:,} when the work was planned")
        self.left -= n
        return n

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """All members of a compressed file, one after another: gzip, pigz, bgzip, pbzip2, pzstd, and files put together by cat."""

    def __init__(self, source: BinaryIO, compression: Compression) -> None:
        self.source, self.name, self.new = source, compression, _DECOMPRESSORS[compression]
        self.member = self.new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        while True:
            data = b""
            if self.member.eof:
                if not (data := self._after_member()):
                    return 0
                self.member = self.new()
            elif self.member.needs_input and not (data := self.source.read(COMPRESSED_CHUNK)):
                raise BrokenInput(f"the {self.name} data ends in the middle: cut off?")
            try:
                decoded = self.member.decompress(data, len(view))
            except _DAMAGE as error:
                raise BrokenInput(f"damaged {self.name} data ({error})") from None
            if decoded:
                view[: len(decoded)] = decoded
                return len(decoded)

    def _after_member(self) -> bytes:
        """The beginning of the next one, b"" at the end. Zeros between them are padding."""
        data = self.member.unused_data.lstrip(b"\0")
        while not data and (chunk := self.source.read(COMPRESSED_CHUNK)):
            data = chunk.lstrip(b"\0")
        return data

    def close(self) -> None:
        if not self.closed:
            self.source.close()
        super().close()
