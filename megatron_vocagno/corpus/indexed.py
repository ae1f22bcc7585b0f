"""Megatron's pair of files: `NAME.bin` contains the numbers, `NAME.idx` the position of each document. Little-endian.

NAME.bin   the documents' numbers, one after another, of one dtype
NAME.idx   9 bytes   "MMIDIDX\\0\\0"
           8 bytes   uint64, version: 1
           1 byte    uint8, dtype: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
           8 bytes   uint64 n, sequences
           8 bytes   uint64 d, entries of the document index
           n × 4     int32, length of each sequence, in numbers
           n × 8     int64, byte of NAME.bin at which each sequence starts
           d × 8     int64, document index: the sequence at which each document starts, and n

Here each document is one sequence, so d = n + 1 and the document index is 0 … n. The bytes equal those that
megatron-core's own builder writes. The reader refuses any other magic, version, dtype or size.
"""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import mmap
import os
import resource
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_vocagno.errors import CorpusError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = 34  # bytes before the lengths
LONGEST = 2**31 - 1
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
DTYPES = {code: np.dtype(name) for name, code in CODES.items()}
THREADS = 16
# A memory map keeps its file open. A dataset of a thousand shards has more files than many machines allow to be open.
OPEN_FILES = min(max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2), 32_768)
_readers = itertools.count()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that megatron-core uses for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class PairWriter:
    """Writes `prefix.bin` document by document. `close` writes `prefix.idx`, and both files are on the disk when it returns.

    >>> with PairWriter(Path("pair"), np.uint16) as pair:
    ...     pair.add(np.array([7, 8, 9]))
    ...     pair.add(np.array([5]))
    >>> reader = PairReader(Path("pair"))
    >>> len(reader), reader.lengths.tolist(), reader.read(0, 1).tolist()
    (2, [3, 1], [8, 9])
    """

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
        """Append a document, [n], which may be empty. Raises CorpusError for a number that does not fit the dtype."""
        stored = document.astype(self.dtype)
        if not np.array_equal(stored, document):
            raise CorpusError(f"{self.prefix}: {document.max()} or {document.min()} does not fit {self.dtype}")
        self._bin.write(stored.tobytes())
        self._lengths.append(len(stored))

    def extend(self, numbers: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Append documents. numbers: all documents, concatenated, of the dtype; lengths: int64 [D]"""
        self._bin.write(np.ascontiguousarray(numbers.astype(self.dtype, casting="safe", copy=False)).data)
        self._lengths.extend(lengths.tolist())

    def grow(self, numbers: NDArray[Any]) -> None:
        """Append numbers of the dtype to the last document."""
        self._bin.write(np.ascontiguousarray(numbers.astype(self.dtype, casting="safe", copy=False)).data)
        self._lengths[-1] += len(numbers)

    def pop(self) -> None:
        """Remove the last document."""
        self._bin.seek(-self._lengths.pop() * self.dtype.itemsize, os.SEEK_END)
        self._bin.truncate()

    def close(self) -> None:
        """Write the index. Raises CorpusError for a document that is too long for an index."""
        _flush(self._bin)
        write_index(self.prefix, self.dtype, np.array(self._lengths, np.int64))


def write_index(prefix: Path, dtype: np.dtype[Any], lengths: NDArray[np.int64]) -> None:
    """Write `prefix.idx`. It is on the disk when this returns.

    lengths  int64 [D], numbers of each document

    Raises CorpusError for a document of more than 2^31 - 1 numbers.
    """
    if np.any(lengths > LONGEST):
        raise CorpusError(f"{prefix}: a document of {lengths.max():,} numbers; an index holds {LONGEST:,} at most")
    with Path(f"{prefix}.idx").open("wb") as idx:
        idx.write(MAGIC + struct.pack("<QBQQ", VERSION, CODES[dtype.name], len(lengths), len(lengths) + 1))
        idx.write(lengths.astype("<i4").tobytes())
        idx.write(_pointers(lengths, dtype).astype("<i8").tobytes())
        idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
        _flush(idx)


class PairReader:
    """A pair, or the same pair of many shards, as one sequence of documents.

    Opening reads only the lengths: four of the twenty bytes that an index has per document. A .bin is mapped into memory when it
    is first read. A CorpusError contains the path and both numbers.

    lengths          int32 [D], numbers of each document
    first_documents  index of the first document of each shard, and D
    """

    def __init__(self, *prefixes: Path) -> None:
        """Open one or more pairs. Raises CorpusError for a damaged pair, or if the dtypes of the pairs differ."""
        self.prefixes = prefixes
        self._bins = [f"{prefix}.bin" for prefix in prefixes]
        # a network file system takes a millisecond per request, and there may be thousands of requests
        with ThreadPoolExecutor(THREADS) as pool:
            indices = list(pool.map(read_lengths, prefixes))
        self.dtype = indices[0][0]
        for prefix, (dtype, _) in zip(prefixes, indices, strict=True):
            if dtype != self.dtype:
                raise CorpusError(f"{prefix}: {dtype}, {prefixes[0]}: {self.dtype}: pairs of one name have one dtype")
        self.lengths: NDArray[np.int32] = np.concatenate([lengths for _, lengths in indices])
        self.first_documents = list(itertools.accumulate((len(lengths) for _, lengths in indices), initial=0))
        starts = [np.cumsum(lengths, dtype=np.int64) - lengths for _, lengths in indices]
        self._sizes = [int(lengths.sum()) for _, lengths in indices]
        # uint32 takes half the memory, and suffices for all shards of a usual size
        self._starts = np.concatenate(starts, dtype=np.uint32 if max(self._sizes) < 2**32 else np.int64, casting="unsafe")
        self._number = next(_readers)

    def with_same_lengths(self, dtype: DTypeLike, *prefixes: Path) -> PairReader:
        """A reader of other pairs whose documents have the same lengths as these. Their indices are not read.

        dtype     the type of the tokens in the other pairs
        prefixes  one per pair of this reader
        """
        other = copy.copy(self)
        other.prefixes, other.dtype, other._number = prefixes, np.dtype(dtype), next(_readers)
        other._bins = [f"{prefix}.bin" for prefix in prefixes]
        return other

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """The numbers [start, stop) of a document, as a view of the file.

        Raises IndexError for a range outside the document, CorpusError as in map_numbers.
        """
        if not 0 <= document < len(self.lengths):
            raise IndexError(f"{self.prefixes[0]}: no document {document}; there are {len(self):,}")
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"{self.prefixes[0]}: document {document} has {length:,} numbers; [{start}, {stop}) is not within")
        origin = int(self._starts[document])
        return self.flat(bisect.bisect_right(self.first_documents, document) - 1)[origin + start : origin + stop]

    def flat(self, k: int = 0) -> NDArray[Any]:
        """All numbers of the k-th .bin, mapped."""
        return _mapped(self._bins[k], self.dtype, self._sizes[k], self._number)


def read_lengths(prefix: Path) -> tuple[np.dtype[Any], NDArray[np.int32]]:
    """The dtype of an index, and its lengths, int32 [n]. Raises CorpusError."""
    path = Path(f"{prefix}.idx")
    try:
        with path.open("rb", buffering=0) as file:
            dtype, n = _check_header(path, file.read(HEADER), os.fstat(file.fileno()).st_size)
            lengths = np.frombuffer(file.read(4 * n), "<i4")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}): a pair is a .bin and a .idx") from None
    if n and int(lengths.min()) < 0:
        raise CorpusError(f"{path}: a document of {lengths.min()} numbers: the file is damaged")
    return dtype, lengths


def check_pointers(prefix: Path) -> None:
    """Compare the pointers and the document index with those that readers compute from the lengths.

    Raises CorpusError if they differ.
    """
    path = Path(f"{prefix}.idx")
    dtype, lengths = read_lengths(prefix)
    n = len(lengths)
    starts, documents = (np.fromfile(path, "<i8", count, offset=HEADER + at) for count, at in ((n, 4 * n), (n + 1, 12 * n)))
    if not np.array_equal(starts, _pointers(lengths.astype(np.int64), dtype)):
        raise CorpusError(f"{path}: its pointers do not follow from its lengths: the file is damaged")
    if not np.array_equal(documents, np.arange(n + 1)):
        raise CorpusError(f"{path}: a document of several sequences; here each document is one")


def _check_header(path: Path, header: bytes, size: int) -> tuple[np.dtype[Any], int]:
    """The dtype and the number of documents. Raises CorpusError if the file is not an index of version 1 or has a wrong size."""
    if header[:9] != MAGIC[: len(header)] or size < HEADER:
        raise CorpusError(
            f"{path}: starts with {header[:9]!r} ({size:,} bytes), an index with {MAGIC!r} and {HEADER} bytes or more"
        )
    version, code, n, entries = struct.unpack("<QBQQ", header[9:])
    if version != VERSION:
        raise CorpusError(f"{path}: version {version}, this reads version {VERSION}")
    if code not in DTYPES:
        raise CorpusError(f"{path}: dtype code {code}, known are {sorted(DTYPES)}")
    if entries != n + 1:
        raise CorpusError(f"{path}: {n:,} sequences in {entries - 1:,} documents; here each document is one sequence")
    expected = HEADER + 12 * n + 8 * entries
    if size != expected:
        raise CorpusError(f"{path}: {size:,} bytes, {n:,} documents need {expected:,}: cut off while copying or writing?")
    return DTYPES[code], n


def map_numbers(path: str, dtype: np.dtype[Any], count: int, advice: int) -> NDArray[Any]:
    """[count], a read-only view of a .bin. advice: a constant of madvise for the order of reading

    Raises CorpusError if the file is missing or does not contain `count` numbers.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the path is a string to be hashed quickly
            size = os.fstat(file.fileno()).st_size
            # an empty file cannot be mapped
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}): a pair is a .bin and a .idx") from None
    if size != count * dtype.itemsize:
        raise CorpusError(
            f"{path}: {size:,} bytes, its index describes {count * dtype.itemsize:,}: cut off while copying or writing?"
        )
    if content is None:
        return np.zeros(0, dtype)
    content.madvise(advice)
    return np.frombuffer(content, dtype)


@functools.lru_cache(maxsize=OPEN_FILES)
def _mapped(path: str, dtype: np.dtype[Any], count: int, reader: int) -> NDArray[Any]:
    """A cached map. reader: the number of the reader, because a file may be written again at the same path"""
    # rows read a few kilobytes at random places: reading ahead would read thirty times as much
    return map_numbers(path, dtype, count, mmap.MADV_RANDOM)


def _pointers(lengths: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """int64 [n], the byte at which each document starts. Sums of four bytes would overflow at 2 GiB."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    return ends - lengths * dtype.itemsize


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
