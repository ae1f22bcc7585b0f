"""Hundreds of damaged inputs: each is refused, or read as documents and bad records; never another error, a crash or a hang.

What stands before the damage is delivered, and the same file gives the same twice. The cases are run in processes of
their own, so that a crash is noticed and named; a watchdog ends a process that hangs.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.documents import BROKEN
from megatron_vocagno.preprocess.inputs import cut
from megatron_vocagno.preprocess.streams import COMPRESSED_CHUNK
from tests import tokenizers_for_tests as real
from tests.corpus.formats import CONTAINERS, DECODERS, decodable, lines, parquet, read_all

CASES = {"lines": 200, "text": 40, "magic": 120, "parquet": 240, **dict.fromkeys(DECODERS, 80)}
LIMIT = 20  # seconds a case; they take some milliseconds
MEMORY = 600 << 10  # KiB a process

Rows = list[bytes]  # texts that must be delivered, in this order


@cache
def texts() -> list[str]:
    return [text for text in real.texts() if len(text) < 2000][:60]


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes cut off, cut out, put in, repeated, or zeroed."""
    at, n = rng.randrange(len(data)), rng.choice((1, 2, 30, 500))
    match rng.randrange(8):
        case 0 | 1 | 2:
            flipped = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 9))):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 3:
            return data[:at]
        case 4:
            return data[:at] + data[at + n :]
        case 5:
            return data[:at] + rng.randbytes(n) + data[at:]
        case 6:
            return data[:at] + data[max(0, at - n) :]
        case _:
            return data[:at] + bytes(n) + data[at + n :]


def first_difference(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- one case of each kind: (file name, its bytes, what must be delivered of it, in order)

AWKWARD = [
    *(
        b'{"text": %s}' % value
        for value in (b"5", b"null", b"true", b"[]", b"{}", b"1e999", b"NaN", b'"\xff"', b'"\xed\xa0\x80"')
    ),
    *(
        b'{"text": "%s"}' % value
        for value in (b"\\ud800", b"\\udc00\\ud800", b"\\u0000", b"\0", b"\\u12", b"\\x", b"\t", b"\xc3", b"")
    ),
    *(b"[" * 10**k for k in range(6)),
    *(b'{"text": "x", "meta": ' + b'{"a":' * n + b"1" + b"}" * n + b"}" for n in (900, 1023, 1024, 5000, 50_000)),
    *(b"", b" ", b"\r", b"\0", b"\xef\xbb\xbf", b"{}", b"[]", b"null", b'"', b"{", b"}", b"\xff\xfe", b"-", b"9" * 5000),
]


def damaged_lines(rng: random.Random) -> tuple[str, bytes, Rows]:
    whole = lines(texts())
    match rng.randrange(4):
        case 0:
            data = b"\n".join(rng.choice(AWKWARD) if rng.random() < 0.3 else row for row in whole.split(b"\n"))
        case 1:
            data = rng.choice((b"\n", b"\r\n", b"")).join(rng.sample(AWKWARD, rng.randrange(len(AWKWARD))))
        case _:
            data = damage(rng, whole)
    untouched = set(whole.split(b"\n")) - {b""}
    return "a.jsonl", data, [row for row in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if row in untouched]


def damaged_text(rng: random.Random) -> tuple[str, bytes, Rows]:
    return "a.txt", damage(rng, "\n".join(texts()[: rng.randrange(1, 20)]).encode()), []


def random_after_magic(rng: random.Random) -> tuple[str, bytes, Rows]:
    """Random bytes that begin, and perhaps end, as a format does."""
    magics = [
        b"\x1f\x8b\x08",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        b"\x28\xb5\x2f\xfd",
        b"\x50\x2a\x4d\x18",
        b"BZh91AY&SY",
    ]
    magics += [
        b"BZh9\x17rE8P\x90",
        b"\xfd7zXZ\x00",
        b"\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4\x46",
        b"PAR1",
        b'{"text": "',
        b"\xef\xbb\xbf",
    ]
    noise = rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))
    ends = [b"", b"\n", b"PAR1", (len(noise) // 2).to_bytes(4, "little") + b"PAR1", b"\xff\xff\xff\x7fPAR1", bytes(100)]
    return rng.choice(("a", "a.txt", "a.jsonl")), rng.choice(magics) + noise + rng.choice(ends), []


@cache
def compressed(suffix: str) -> list[bytes]:
    whole = lines(texts()) * 2
    return [pack(whole) for (_, s), pack in CONTAINERS.items() if s == suffix]


def damaged_stream(suffix: str, rng: random.Random) -> tuple[str, bytes, Rows]:
    whole = rng.choice(compressed(suffix))
    data = damage(rng, whole)
    at = first_difference(whole, data)
    if at < len(data):
        at = at // COMPRESSED_CHUNK * COMPRESSED_CHUNK
    return "a.jsonl" + suffix, data, decodable(data[:at], suffix).split(b"\n")[:-1]


@cache
def tables() -> list[bytes]:
    columns = {"id": list(range(len(texts()))), "text": texts(), "meta": [{"a": [i]} for i in range(len(texts()))]}
    return [
        parquet(columns, row_group_size=15, compression=compression, use_dictionary=dictionary, **options)
        for compression in ("none", "snappy", "zstd", "gzip", "lz4", "brotli")
        for dictionary in (True, False)
        for options in ({"write_page_checksum": True}, {"data_page_version": "2.0"}, {"write_page_index": True})
    ]


def damaged_parquet(rng: random.Random) -> tuple[str, bytes, Rows]:
    whole = rng.choice(tables())
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    match rng.randrange(3):
        case 0:
            # an error in the footer is rare otherwise, and the worst there is
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 5))):
                data[rng.randrange(footer, len(data))] = rng.randrange(256)
            return "a.parquet", bytes(data), []
        case 1:
            data = whole[:footer] if rng.random() < 0.1 else damage(rng, whole[:footer])
            data += whole[footer:]
        case _:
            data = damage(rng, whole)
    metadata = pq.read_metadata(pa.BufferReader(whole))
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    ends = [max(start_of(c) + c.total_compressed_size for c in (g.column(j) for j in range(g.num_columns))) for g in groups]
    at = first_difference(whole, data)
    n = sum(end <= at for end in ends) if data.endswith(whole[footer:]) else 0
    return "a.parquet", data, [text.encode() for text in texts()[: 15 * n]]


def start_of(column: pq.ColumnChunkMetaData) -> int:
    return column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset


def case(kind: str, seed: int) -> tuple[str, bytes, Rows]:
    makers: dict[str, Callable[[random.Random], tuple[str, bytes, Rows]]] = {
        "lines": damaged_lines, "text": damaged_text, "magic": random_after_magic, "parquet": damaged_parquet
    }  # fmt: skip
    rng = random.Random(f"{kind} {seed}")
    return damaged_stream(kind, rng) if kind in DECODERS else makers[kind](rng)


# ---- all of them


def run(kind: str, seeds: range, folder: Path) -> tuple[Counter[str], int, float, int]:
    """Outcomes; records before the damage that were delivered; the slowest case in seconds; KiB at the most."""
    outcomes: Counter[str] = Counter()
    delivered, slowest = 0, 0.0
    for seed in seeds:
        (folder / f"{kind} {seeds.start}").write_text(str(seed))
        name, data, rows = case(kind, seed)
        file = folder / f"{kind} {seeds.start} {name}"
        file.write_bytes(data)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        start = time.perf_counter()
        outcome = read_twice(file, random.Random(seed).choice((10, 10_000, 10**9)), rows)
        slowest = max(slowest, time.perf_counter() - start)
        faulthandler.cancel_dump_traceback_later()
        outcomes[outcome] += 1
        delivered += len(rows) if outcome != "refused" else 0
    return outcomes, delivered, slowest, peak()


def peak() -> int:
    """KiB that this process has had at the most."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def read_twice(file: Path, shard_bytes: int, rows: Rows) -> str:
    try:
        documents, digest = read_all(cut(file, shard_bytes), id_key="id")
    except CorpusError as error:
        assert str(file) in str(error)
        return "refused"
    assert read_all(cut(file, shard_bytes), id_key="id") == (documents, digest)
    found = iter(documents)
    for row in rows:
        assert any(d.raw == row and d.text is not None for d in found), row[:80]
    for document in documents:
        assert (document.text is None) == bool(document.reason)
        assert str(document).startswith(str(file)) and (document.text or "").encode() is not None
    if any(document.reason.startswith(BROKEN) for document in documents):
        return "broken"
    return "bad records" if any(document.reason for document in documents) else "documents" if documents else "nothing"


@pytest.mark.slow
def test_damaged_inputs_are_refused_or_read(tmp_path, capsys):
    jobs = [(kind, range(first, min(first + 100, n))) for kind, n in CASES.items() for first in range(0, n, 100)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, kind, seeds, tmp_path) for kind, seeds in jobs]
        outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in CASES}
        delivered: Counter[str] = Counter()
        for (kind, seeds), future in zip(jobs, futures, strict=True):
            try:
                met, rows, slowest, memory = future.result()
            except BrokenProcessPool:
                at = {file.name: file.read_text() for file in tmp_path.iterdir() if file.suffix == "" and file.stat().st_size < 9}
                raise AssertionError(f"a process crashed or hung at one of these cases: {at}") from None
            except Exception as error:
                raise AssertionError(f"{kind}, case {(tmp_path / f'{kind} {seeds.start}').read_text()}") from error
            assert slowest < LIMIT / 4 and memory < MEMORY, (kind, seeds, slowest, memory)
            outcomes[kind] += met
            delivered[kind] += rows
    with capsys.disabled():
        for kind, met in outcomes.items():
            print(f"\n{kind:8} {dict(met)}, {delivered[kind]:,} records before or beside the damage", end="")
    total = sum(outcomes.values(), Counter())
    assert total.total() == sum(CASES.values()) > 900
    assert total["refused"] > 40 and total["broken"] > 250 and total["bad records"] > 120 and total["documents"] > 40
    assert all(met["broken"] > 40 for kind, met in outcomes.items() if kind in DECODERS or kind == "parquet")
    assert all(delivered[kind] > 400 for kind in ("lines", "parquet", *DECODERS))
