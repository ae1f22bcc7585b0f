"""Damaged files and long records: what comes before a damage is delivered, and memory stays flat."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import documents as documents_module
from megatron_vocagno.preprocess import inputs
from megatron_vocagno.preprocess.documents import BROKEN
from megatron_vocagno.preprocess.inputs import cut
from megatron_vocagno.preprocess.streams import COMPRESSED_CHUNK
from tests import tokenizers_for_tests as real
from tests.corpus.formats import CONTAINERS, DECODERS, decodable, lines, of, parquet, read_all, write

# ---- damage


@pytest.mark.parametrize("suffix", DECODERS)
def test_a_file_that_is_cut_off_gives_all_lines_before(suffix, tmp_path):
    data = lines(real.texts()[:30])
    packed = next(pack for (_, s), pack in CONTAINERS.items() if s == suffix)(data)
    delivered = set()
    for length in [*range(20, len(packed), len(packed) // 40), len(packed) - 1]:
        *found, last = of(tmp_path / f"a.jsonl{suffix}", packed[:length])
        assert last.text is None and last.reason.startswith(BROKEN) and "ends in the middle: cut off?" in last.reason
        assert [d.raw for d in found] == decodable(packed[:length], suffix).split(b"\n")[:-1]
        delivered.add(len(found))
    assert len(delivered) >= (5 if suffix in (".gz", ".xz") else 2)


@pytest.mark.parametrize("suffix", DECODERS)
def test_damage_costs_what_comes_after_it(suffix, tmp_path):
    """All but the chunk of compressed bytes that it lies in; the second of two members is damaged."""
    first, second = lines(real.texts()[:30]), lines(real.texts()[30:60])
    pack = next(pack for (_, s), pack in CONTAINERS.items() if s == suffix)
    start, packed = len(pack(first)), pack(first) + pack(second)
    met = 0
    for at in range(start, len(packed), (len(packed) - start) // 40):
        broken = bytearray(packed)
        broken[at] ^= 0x10
        *found, last = of(tmp_path / f"a.jsonl{suffix}", bytes(broken))
        assert last.text is None and last.reason.startswith(BROKEN)
        before = at // COMPRESSED_CHUNK * COMPRESSED_CHUNK
        expected = decodable(packed[:before], suffix).split(b"\n")[:-1]
        assert [d.raw for d in found[: len(expected)]] == expected
        met += len(expected)
    assert met > 500


def test_a_damaged_page_costs_its_row_group_and_the_rest_of_the_piece(tmp_path):
    texts = real.texts()
    whole = parquet({"text": texts}, row_group_size=30, write_page_checksum=True, use_dictionary=False, write_statistics=False)
    metadata = pq.read_metadata(pa.BufferReader(whole))
    for i in range(5):
        column = metadata.row_group(i).column(0)
        broken = bytearray(whole)
        broken[column.data_page_offset + column.total_compressed_size // 2] ^= 1
        *found, last = of(tmp_path / "a.parquet", bytes(broken))
        assert [d.text for d in found] == texts[: len(found)] and 30 * i <= len(found) < 30 * (i + 1)
        assert last.reason.startswith(f"{BROKEN}damaged parquet data") and str(last).endswith(f":row {len(found) + 1}")
        # the other pieces are whole
        pieces = cut(tmp_path / "a.parquet", 1)
        assert len(pieces) == 5
        rest = [[d.text for d in read_all([piece])[0]] for k, piece in enumerate(pieces) if k != i]
        assert rest == [texts[30 * k : 30 * k + 30] for k in range(5) if k != i]


def test_a_footer_that_lies_about_its_rows_is_damage(tmp_path):
    whole = parquet({"text": ["x"] * 20}, use_dictionary=False)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")

    def claims(places: list[int], zigzag: int = 42) -> bytes:
        """21 rows, where the footer has 20."""
        return bytes(zigzag if i in places else byte for i, byte in enumerate(whole))

    def counts(data: bytes) -> tuple[int, int]:
        try:
            metadata = pq.read_metadata(pa.BufferReader(data))
        except OSError:
            return 20, 20
        return metadata.num_rows, metadata.row_group(0).num_rows

    places = [i for i in range(footer, len(whole) - 8) if whole[i] == 40 and counts(claims([i])) != (20, 20)]
    assert sorted(counts(claims([i])) for i in places) == [(20, 21), (21, 20)] and counts(claims(places)) == (21, 21)
    assert counts(claims(places, 39)) == (-20, -20)
    for data in (*(claims([i]) for i in places), claims(places, 39)):
        with pytest.raises(CorpusError, match="the footer's counts contradict each other"):
            cut(write(tmp_path / "a.parquet", data), 10**9)
    *found, last = of(tmp_path / "a.parquet", claims(places))
    assert len(found) == 20 and "row group 0 ends at row 20, the footer says 21" in last.reason


def test_a_column_whose_name_is_no_text_is_damage(tmp_path):
    whole = parquet({"text": ["x"] * 20}, store_schema=False)
    at = whole.rindex(b"text", 0, whole.rindex(b"text"))
    with pytest.raises(CorpusError, match="damaged parquet data"):
        cut(write(tmp_path / "a.parquet", whole[:at] + b"t\xffxt" + whole[at + 4 :]), 10**9)


def test_a_file_that_shrank_since_it_was_cut_is_broken(tmp_path):
    data = lines(real.texts())
    file = write(tmp_path / "a.jsonl", data)
    *_, piece = cut(file, 200_000)
    file.write_bytes(data[: piece.start + 5000])
    *found, last = read_all([piece])[0]
    assert [d.raw for d in found] == data[piece.start : piece.start + 5000].split(b"\n")[:-1]
    assert last.reason == f"{BROKEN}the file ends at byte {piece.start + 5000:,}, it had {len(data):,} when the work was planned"


def test_a_file_that_cannot_be_read_is_no_damage(tmp_path):
    for name, data in (
        ("a.jsonl", b"{}\n"),
        ("a.parquet", parquet({"text": ["x"]})),
        ("a.gz", CONTAINERS["gzip", ".gz"](b"{}\n")),
    ):
        (piece,) = cut(write(tmp_path / name, data), 100)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError):
            read_all([piece])


# ---- long records


def test_a_record_that_is_too_long_is_one_bad_record(tmp_path, monkeypatch):
    for module in (inputs, documents_module):
        monkeypatch.setattr(module, "LONGEST_RECORD", 3000)
        monkeypatch.setattr(module, "READ_BYTES", 100)
    texts = ["short", "x" * 2980, "y" * 5000, "", " " * 4000, "z" * 99, "last"]
    data = b"\n".join(json.dumps({"text": text}).encode() if text else b" " * 4000 for text in texts)
    for packed in (data, CONTAINERS["zstd", ".zst"](data), data + b"\n"):
        found, digest = read_all(cut(write(tmp_path / "a", packed), 10**9))
        assert [d.text for d in found] == ["short", "x" * 2980, None, None, None, "z" * 99, "last"]
        assert [d.reason for d in found if d.reason] == [
            f"{n:,} bytes long; the longest record that is read has 3,000" for n in (5013, 4001, 4013)
        ]
        assert all(len(d.raw) <= 100 and data[d.offset :].startswith(d.raw) for d in found if d.reason)
        assert digest == read_all(cut(write(tmp_path / "b", data), 10**9))[1]
    for name, packed in (("a.txt", b"x" * 3001), ("a.parquet", parquet({"text": ["x" * 3001]}))):
        (found,) = of(tmp_path / name, packed)
        assert found.text is None and found.reason.startswith("3,001 bytes long")


PEAK = """
import re, sys
from pathlib import Path
from megatron_vocagno.preprocess.documents import pieces_of, read
from megatron_vocagno.preprocess.inputs import cut
kib = lambda what: int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
start = kib("VmRSS")
count = lambda text: sum(map(len, pieces_of(text)))
texts = [d.text and count(d.text) for piece in cut(Path(sys.argv[1]), 10**9) for d in read(piece, "text", None, len)]
print(len(texts), sum(t is not None for t in texts), kib("VmHWM") - start)
"""


def peak(file: Path) -> tuple[int, int, float]:
    """Of a process that reads it: documents, those with text, and MiB beyond what it had before."""
    run = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    n, good, kib = map(int, run.stdout.split())
    return n, good, kib / 1024


@pytest.mark.slow
def test_a_page_that_claims_to_be_large_takes_no_memory(tmp_path):
    whole = parquet({"text": [text[:90] for text in real.texts()]}, use_dictionary=False, compression="snappy")
    # the header of the first page, thrift: i32 type, i32 bytes, i32 bytes compressed
    assert whole[4:7] == b"\x15\x00\x15"
    start = whole.index(b"\x15", 7) + 1
    end = next(i for i in range(start, start + 5) if whole[i] < 128) + 1
    claimed, varint = 2 * 1_400_000_000, []
    while claimed:
        varint.append(claimed & 127 | (128 if claimed > 127 else 0))
        claimed >>= 7
    n, good, mib = peak(write(tmp_path / "a.parquet", whole[:start] + bytes(varint) + whole[end:]))
    assert (n, good) == (1, 0) and mib < 150


@pytest.mark.long
def test_memory_is_that_of_the_longest_record_not_of_the_file(tmp_path):
    texts = real.texts() * 60
    data = lines(texts)
    assert len(data) > 25 << 20
    packs = {
        "": bytes,
        ".gz": partial(gzip.compress, compresslevel=1),
        ".zst": zstd.compress,
        ".xz": partial(lzma.compress, preset=0),
    }
    for suffix, pack in packs.items():
        n, good, mib = peak(write(tmp_path / f"a{suffix}", pack(data)))
        assert n == good == len(texts) and mib < 15, suffix
    few = peak(write(tmp_path / "few.parquet", parquet({"text": texts[:1000]})))[2]  # what pyarrow itself takes
    for rows in (1000, 10**6):
        data = parquet({"text": texts * 8}, row_group_size=rows, use_dictionary=False)
        n, good, mib = peak(write(tmp_path / "a.parquet", data))
        assert n == good == 8 * len(texts) and mib < few + 60, rows
    line = json.dumps({"text": "x" * (50 << 20)}).encode()
    n, good, mib = peak(write(tmp_path / "long", b'{"text": "a"}\n' + line + b'\n{"text": "b"}'))
    assert n == good == 3 and mib < 3.5 * 50
    n, good, mib = peak(write(tmp_path / "longest", b'{"text": "a"}\n' + line * 9 + b'\n{"text": "b"}'))
    assert (n, good) == (3, 2) and mib < 150
