"""Megatron pairs: the same bytes as megatron-core's, and what the reader refuses."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from megatron_vocagno.corpus.indexed import HEADER, PairReader, PairWriter, check_pointers, token_dtype, write_index
from megatron_vocagno.errors import CorpusError

DTYPES = [np.uint8, np.uint16, np.int32, np.int64, np.float32]


def documents(dtype):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 200, int(n)).astype(dtype) for n in (5, 1, 0, 700, 3)]


def write(prefix, docs, dtype):
    with PairWriter(prefix, dtype) as pair:
        for doc in docs:
            pair.add(doc)
    return prefix


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(dtype, tmp_path):
    docs = documents(dtype)
    pair = PairReader(write(tmp_path / "x.y", docs, dtype))
    assert len(pair) == len(docs) and pair.dtype == dtype and pair.lengths.tolist() == [len(d) for d in docs]
    for i, doc in enumerate(docs):
        assert np.array_equal(pair.read(i), doc)
    assert np.array_equal(pair.read(3, 100, 130), docs[3][100:130])
    with pytest.raises(IndexError, match=r"document 3 has 700 numbers; \[690, 701\)"):
        pair.read(3, 690, 701)


def test_several_pairs_are_read_as_one(tmp_path):
    parts = [documents(np.int32), [], [np.arange(7)], documents(np.int32)[:2]]
    pair = PairReader(*(write(tmp_path / f"part{k}", docs, np.int32) for k, docs in enumerate(parts)))
    assert pair.first_documents == [0, 5, 5, 6, 8] and len(pair) == 8
    for i, doc in enumerate(doc for docs in parts for doc in docs):
        assert np.array_equal(pair.read(i), doc) and pair.lengths[i] == len(doc)
    assert np.array_equal(pair.flat(2), np.arange(7))
    for outside in (-1, 8):
        with pytest.raises(IndexError, match=f"no document {outside}; there are 8"):
            pair.read(outside)
    with pytest.raises(CorpusError, match=r"part9: uint16, .*part0: int32"):
        PairReader(tmp_path / "part0", write(tmp_path / "part9", documents(np.uint16), np.uint16))


def test_a_pair_beside_another_needs_no_index(tmp_path):
    first = PairReader(*(write(tmp_path / f"a{k}", documents(np.int32), np.int32) for k in range(2)))
    beside = first.with_same_lengths(np.uint8, *(write(tmp_path / f"b{k}", documents(np.uint8), np.uint8) for k in range(2)))
    for idx in tmp_path.glob("b*.idx"):
        idx.unlink()
    for i, doc in enumerate([*documents(np.uint8), *documents(np.uint8)]):
        assert np.array_equal(beside.read(i), doc) and beside.read(i).dtype == np.uint8 and first.read(i).dtype == np.int32


def test_opening_reads_no_numbers_and_no_pointers(tmp_path):
    """Only what the header and the lengths say, so that opening does not depend on the size of a corpus."""
    prefix = write(tmp_path / "x", documents(np.int32), np.int32)
    idx = prefix.with_suffix(".idx")
    whole = idx.read_bytes()
    idx.write_bytes(whole[: HEADER + 20].ljust(len(whole), b"\xff"))
    prefix.with_suffix(".bin").unlink()
    assert PairReader(prefix).lengths.tolist() == [5, 1, 0, 700, 3]


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    first = PairReader(write(tmp_path / "x", [np.arange(9)], np.int32))
    assert first.read(0).tolist() == list(range(9))
    for suffix in ("bin", "idx"):
        (tmp_path / f"x.{suffix}").unlink()
    second = PairReader(write(tmp_path / "x", [np.arange(9)[::-1]], np.int32))
    assert second.read(0).tolist() == list(range(9))[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_equal_those_of_megatron_core(dtype, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    docs = documents(dtype)
    write(tmp_path / "ours", docs, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for doc in docs:
        builder.add_document(doc, [len(doc)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    opened = IndexedDataset(str(tmp_path / "ours"))
    for i, doc in enumerate(docs):
        assert np.array_equal(opened[i], doc)


def test_a_pair_without_documents_is_read(tmp_path):
    assert len(PairReader(write(tmp_path / "x", [], np.int32))) == 0


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"65536 .* uint16"), PairWriter(tmp_path / "x", np.uint16) as pair:
        pair.add(np.array([0, 65_536], np.int32))
    assert not (tmp_path / "x.idx").exists()


def test_pointers_do_not_overflow_beyond_four_gib(tmp_path):
    """A sparse .bin: five documents of 2**30 numbers of two bytes."""
    n, length = 5, 2**30
    write_index(tmp_path / "x", np.dtype(np.uint16), np.full(n, length))
    starts = np.fromfile(tmp_path / "x.idx", "<i8", n, offset=HEADER + 4 * n)
    assert starts.tolist() == [i * length * 2 for i in range(n)]
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(n * length * 2)
        file.seek(4 * length * 2 + 10)
        file.write(struct.pack("<H", 77))
    pair = PairReader(tmp_path / "x")
    assert pair.read(4, 4, 7).tolist() == [0, 77, 0]
    with pytest.raises(CorpusError, match=" 2,147,483,648 "):
        write_index(tmp_path / "y", np.dtype(np.uint16), np.array([5, 2**31]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b"MMIDIDY" + b[7:], "starts with b'MMIDIDY"),
        (lambda b: b[:20], "20 bytes"),
        (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "version 2, this reads version 1"),
        (lambda b: b[:17] + b"\x09" + b[18:], "dtype code 9"),
        (lambda b: b[:-1], r"141 bytes, 5 documents need 142"),
        (lambda b: b + b"\0", r"143 bytes, 5 documents need 142"),
        (lambda b: b[:26] + struct.pack("<Q", 5) + b[34:-8], "5 sequences in 4 documents"),
        (lambda b: b[:HEADER] + struct.pack("<i", -6) + b[HEADER + 4 :], "a document of -6 numbers"),
    ],
)
def test_damaged_index_is_refused(damage, message, tmp_path):
    idx = write(tmp_path / "x", documents(np.int32), np.int32).with_suffix(".idx")
    idx.write_bytes(damage(idx.read_bytes()))
    with pytest.raises(CorpusError, match=message) as error:
        PairReader(tmp_path / "x")
    assert str(idx) in str(error.value)


@pytest.mark.parametrize(
    ("at", "message"),
    [(HEADER, "its pointers do not follow"), (HEADER + 20, "its pointers do not follow"), (HEADER + 60, "several sequences")],
)
def test_what_an_index_says_twice_must_agree(at, message, tmp_path):
    prefix = write(tmp_path / "x", documents(np.int32), np.int32)
    check_pointers(prefix)
    data = bytearray(prefix.with_suffix(".idx").read_bytes())
    data[at] ^= 1
    prefix.with_suffix(".idx").write_bytes(data)
    with pytest.raises(CorpusError, match=message):
        check_pointers(prefix)


def test_cut_off_or_missing_files_are_refused(tmp_path):
    prefix = write(tmp_path / "x", documents(np.int32), np.int32)
    file = prefix.with_suffix(".bin")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CorpusError, match=r"x\.bin: 2,832 bytes, its index describes 2,836"):
        PairReader(prefix).read(0)
    file.unlink()
    with pytest.raises(CorpusError, match=r"x\.bin cannot be read \(No such file"):
        PairReader(prefix).read(0)
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(CorpusError, match=r"x\.idx cannot be read \(No such file"):
        PairReader(prefix)


def test_dtype_of_a_vocabulary_is_megatron_cores():
    assert [token_dtype(n) for n in (32_000, 65_499, 65_500, 151_936)] == [np.uint16, np.uint16, np.int32, np.int32]
