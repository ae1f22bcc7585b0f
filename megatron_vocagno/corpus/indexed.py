"""Megatron's pair of files: `NAME.bin` holds the numbers, `NAME.idx` says where each document lies. Little-endian.

NAME.bin   the documents' numbers, one after another, of one dtype
NAME.idx   9 bytes   "MMIDIDX\\0\\0"
           8 bytes   uint64, version: 1
           1 byte    uint8, dtype: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
           8 bytes   uint64 n, sequences
           8 bytes   uint64 d, entries of the document index
           n × 4     int32, length of each sequence, in numbers
           n × 8     int64, byte of NAME.bin at which it starts
           d × 8     int64, document index: the sequence at which each document starts, and n

Here each document is one sequence, so d = n + 1 and the document index is 0 … n. The bytes equal those that
megatron-core's own builder writes. The reader refuses any other magic, version, dtype or size.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_vocagno.corpus import CorpusError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = 34  # bytes before the lengths
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
DTYPES = {code: np.dtype(name) for name, code in CODES.items()}


class IndexedError(CorpusError):
    """A pair of files that is not what its header says."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that megatron-core gives to a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class PairWriter:
    """Writes `prefix.bin` document by document; `close` writes `prefix.idx`. Both are on the disk when it returns."""

    def __init__(self, prefix: Path, dtype: DTypeLike) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self._bin = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 - close() closes it
        self._lengths: list[int] = []

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        else:
            self._bin.close()

    def add(self, document: NDArray[Any]) -> None:
        """One document, 1-D; its numbers must fit the dtype."""
        stored = document.astype(self.dtype)
        if not np.array_equal(stored, document):
            raise IndexedError(f"{self.prefix}: {document.max()} or {document.min()} does not fit {self.dtype}")
        self._bin.write(stored.tobytes())
        self._lengths.append(len(stored))

    def close(self) -> None:
        _flush(self._bin)
        lengths = np.array(self._lengths, np.int64)
        with Path(f"{self.prefix}.idx").open("wb") as idx:
            idx.write(MAGIC + struct.pack("<QBQQ", VERSION, CODES[self.dtype.name], len(lengths), len(lengths) + 1))
            idx.write(lengths.astype("<i4").tobytes())
            idx.write(_pointers(lengths, self.dtype).astype("<i8").tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _flush(idx)


class PairReader:
    """`prefix.bin` and `prefix.idx`, memory-mapped. Raises IndexedError with the path and both numbers."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        idx_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise IndexedError(f"{path} is missing: a pair is a .bin and a .idx")
        self.dtype, n = _read_header(idx_path)
        idx = np.memmap(idx_path, np.uint8, mode="r")
        # int32 at a byte that is no multiple of four: numpy reads it all the same
        self.lengths: NDArray[np.int64] = np.frombuffer(idx, "<i4", n, HEADER).astype(np.int64)
        self._starts: NDArray[np.int64] = np.frombuffer(idx, "<i8", n, HEADER + 4 * n)
        if not np.array_equal(np.frombuffer(idx, "<i8", n + 1, HEADER + 12 * n), np.arange(n + 1)):
            raise IndexedError(f"{idx_path}: a document of several sequences; here each document is one")
        if np.any(self.lengths < 0) or not np.array_equal(self._starts, _pointers(self.lengths, self.dtype)):
            raise IndexedError(f"{idx_path}: its pointers do not follow from its lengths: the file is damaged")
        expected, actual = int(self.lengths.sum()) * self.dtype.itemsize, bin_path.stat().st_size
        if expected != actual:
            raise IndexedError(
                f"{bin_path}: {actual:,} bytes, its index describes {expected:,}: cut off while copying or writing?"
            )
        # an empty file cannot be mapped
        self.flat: NDArray[Any] = np.memmap(bin_path, self.dtype, mode="r") if actual else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """The numbers [start, stop) of a document: a view of the file."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{self.prefix}: document {document} has {length:,} numbers; [{start}, {stop}) is not within")
        origin = int(self._starts[document]) // self.dtype.itemsize
        return self.flat[origin + start : origin + stop]


def _read_header(path: Path) -> tuple[np.dtype[Any], int]:
    """dtype and number of documents; refuses what is no index of version 1, or one of another size than it must have."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER)
    if header[:9] != MAGIC[: len(header)] or size < HEADER:
        raise IndexedError(
            f"{path}: starts with {header[:9]!r} ({size:,} bytes), an index with {MAGIC!r} and {HEADER} bytes or more"
        )
    version, code, n, entries = struct.unpack("<QBQQ", header[9:])
    if version != VERSION:
        raise IndexedError(f"{path}: version {version}, this reads version {VERSION}")
    if code not in DTYPES:
        raise IndexedError(f"{path}: dtype code {code}, known are {sorted(DTYPES)}")
    if entries != n + 1:
        raise IndexedError(f"{path}: {n:,} sequences in {entries - 1:,} documents; here each document is one sequence")
    expected = HEADER + 12 * n + 8 * entries
    if size != expected:
        raise IndexedError(f"{path}: {size:,} bytes, {n:,} documents need {expected:,}: cut off while copying or writing?")
    return DTYPES[code], n


def _pointers(lengths: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """The byte at which each document starts; int64 throughout: four-byte sums overflow at 2 GiB."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    return ends - lengths * dtype.itemsize


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
