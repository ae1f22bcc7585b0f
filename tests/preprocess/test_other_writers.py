"""Files as others write them: what is whole is read, whatever wrote it, and what is not read is called what it is."""

from __future__ import annotations

import base64
import itertools
import json
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.documents import InputRecord
from megatron_vocagno.preprocess.inputs import cut
from tests.corpus.formats import CONTAINERS, lines, of, parquet, read_all, write

MARK = b"\xef\xbb\xbf"

# ---- byte order marks


@pytest.mark.parametrize(("name", "suffix"), [key for key in CONTAINERS if key[0] in ("plain", "gzip", "zstd", "gzip of mgzip")])
def test_marks_between_files_put_together_are_no_part_of_a_record(name, suffix, tmp_path):
    texts = [f"words {i} \ufeff within" for i in range(20)] + ["\ufeffin front"]
    one = MARK + lines(texts)
    whole = one + one + MARK + b"\n" + MARK + one + MARK + b"\r\n" + MARK
    for data in (whole, whole.replace(b"\n", b"\r\n")):
        pieces = cut(write(tmp_path / f"a.jsonl{suffix}", CONTAINERS[name, suffix](data)), 200)
        assert (len(pieces) > 10) == (not suffix)
        documents = read_all(pieces)[0]
        assert [d.text for d in documents] == texts * 3
        for document in documents:
            line, byte = map(int, str(document).rsplit(":", 2)[1:])
            at = data[byte:]
            while at.startswith(MARK):
                at = at.removeprefix(MARK)
            assert at.startswith(document.raw) and line == 1 + data[:byte].count(b"\n")


def test_marks_in_a_text_file_stand_for_nothing_at_the_beginnings_of_lines(tmp_path):
    for text, expected in (
        ("\ufeffone\n\ufefftwo\r\n\ufeff\ufeffthree\ufeff, four\n", "one\ntwo\r\nthree\ufeff, four\n"),
        ("\ufeff\nblank first", "\nblank first"),
        ("\ufeff", ""),
        ("none\u2028\ufeffhere", "none\u2028\ufeffhere"),
    ):
        assert [d.text for d in of(tmp_path / "a.txt", text.encode())] == [expected]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_refused_by_name(name, suffix, encoding, tmp_path):
    pack = CONTAINERS[next(key for key in CONTAINERS if key[1] == suffix)]
    bodies = [
        lines(["zwölf", "two"]).decode(),
        "[1]\n",
        "\n\n" + lines(["one " * 9]).decode(),
        "A text of some words, für alle.\n" * 3,
    ]
    for body in bodies if "-" not in encoding[4:] else bodies[::2]:
        with pytest.raises(
            CorpusError,
            match=rf"is {encoding[:6].upper()} text, .*iconv -f {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')} ",
        ):
            cut(write(tmp_path / (name + suffix), pack(body.encode(encoding))), 100)


# ---- JSON


@pytest.mark.parametrize("size", [100, 70_000, 2_000_000])
def test_the_reason_of_a_long_line_is_found_at_once(size, tmp_path):
    """Lines on which a pattern could go back and forth for hours."""
    for line in (
        b"{}" * size,
        b"{" + b"}{" * size,
        b"{}" + b" " * size,
        b"{" + b"}," * size,
        b'{"a":1} \r' * size,
        b"{" + bytes(size),
    ):
        for end in (b"", b"x", b"{", b" "):
            (document,) = of(tmp_path / "a", line + end)
            assert document.text is None


def test_layouts_of_json_come_with_the_command_that_helps(tmp_path):
    rows = [{"id": i, "text": f"words {i}"} for i in range(30)]
    array, seq = r"one JSON array.*jq -c '\.\[\]'", r"a JSON text sequence over several lines.*jq -c --seq \. "
    several = r"JSON over several lines.*jq -c \. "
    layouts = {
        json.dumps(rows): array,
        json.dumps(rows, indent=4): array,
        "\ufeff[\r\n" + ",\r\n".join(map(json.dumps, rows)) + "\r\n]": array,
        "[": array,
        "\n".join(json.dumps(row, indent=1) for row in rows): several,
        json.dumps({"data": rows}, indent="\t"): several,
        json.dumps(rows[0], indent=2).replace("\n", "\r"): several,
        "".join("\x1e" + json.dumps(row, indent=2) + "\n" for row in rows): seq,
    }
    for data, reason in layouts.items():
        for suffix, command in (("", " FILE > FILE.jsonl"), (".gz", "gzip -dc FILE | jq"), (".zst", "zstd -dc FILE | jq")):
            pack = CONTAINERS[next(key for key in CONTAINERS if key[1] == suffix)]
            with pytest.raises(CorpusError, match=reason) as error:
                cut(write(tmp_path / f"a.json{suffix}", pack(data.encode())), 100)
            assert command in str(error.value)


def test_other_formats_fail_as_records_and_not_as_text(tmp_path):
    """Formats that have no message of their own: no text comes of them, whatever the file is called."""
    heads = {
        "lz4": b"\x04\x22\x4d\x18\x64\x40\xa7",
        "snappy": b"\xff\x06\x00\x00sNaPpY",
        "zstd of before version 0.8": b"\x27\xb5\x2f\xfd",
        "numpy": b"\x93NUMPY\x01\x00",
        "HDF5": b"\x89HDF\r\n\x1a\n",
        "Office": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "GGUF": b"GGUF\x03\x00\x00\x00\xff\xfe",
        "CSV": b"text,id\none,1\n",
        "web page": b"<!DOCTYPE html>\n<html><title>404",
    }
    for name, head in heads.items():
        assert {d.text for d in of(tmp_path / "a.jsonl", head)} == {None}, name
        if name not in ("CSV", "web page"):  # these are text
            assert {d.text for d in of(tmp_path / "a.txt", head + b"\xff")} == {None}, name


# ---- parquet

TEXTS = ["one", "zwölf \u2028 x", "", "x" * 5000, None, "one", "last"]
IDS = [str(i) for i in range(len(TEXTS))]
ENCODINGS = ["PLAIN", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"]


def check(found: list[InputRecord], kept: range = range(len(TEXTS))) -> None:
    assert [(d.text, d.id if d.text is not None else d.reason) for d in found] == [
        (TEXTS[i], "'text' is null" if TEXTS[i] is None else IDS[i]) for i in kept
    ]


def test_parquet_of_any_encoding_is_read(tmp_path):
    codecs = ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]
    met = 0
    for codec, encoding, version in itertools.product(codecs, [*ENCODINGS, "dictionary"], ["1.0", "2.0"]):
        how = (
            {}
            if encoding == "dictionary"
            else {"use_dictionary": False, "column_encoding": dict.fromkeys(("text", "id"), encoding)}
        )
        data = parquet(
            {"text": TEXTS, "id": IDS},
            compression=codec,
            data_page_version=version,
            data_page_size=50,
            write_page_checksum=True,
            **how,
        )
        check(of(tmp_path / "a", data, id_key="id"))
        met += 1
    assert met == 48


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int16(), pa.uint64(), pa.dictionary(pa.int8(), pa.int64())], ids=str)
def test_integers_of_any_width_are_ids(kind, tmp_path):
    ids = pa.array(map(int, IDS), pa.int64())
    column = ids.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else ids.cast(kind)
    check(of(tmp_path / "a", parquet({"text": TEXTS, "id": column}), id_key="id"))
    huge = of(tmp_path / "b", parquet({"text": ["a"], "id": pa.array([2**64 - 1], pa.uint64())}), id_key="id")
    assert huge[0].id == str(2**64 - 1)


def test_columns_of_unusual_kinds_are_texts(tmp_path):
    check(of(tmp_path / "a", parquet({"text": pa.array(TEXTS).dictionary_encode(), "id": IDS}), id_key="id"))
    (found,) = of(tmp_path / "b", parquet({"text": pa.array(['{"a": 1}']).cast(pa.json_())}))
    assert found.text == '{"a": 1}'
    nothing = of(tmp_path / "c", parquet({"text": pa.nulls(3)}))
    assert [(d.text, d.reason) for d in nothing] == [(None, "'text' is null")] * 3


def test_row_groups_without_rows_are_no_records(tmp_path):
    table = pa.table({"text": TEXTS, "id": IDS})
    for sizes in ((0,), (0, 3, 0, 0, 4, 0), (7, 0), (0, 7)):
        with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
            at = 0
            for size in sizes:
                writer.write_table(table.slice(at, size))
                at += size
        for shard_bytes in (1, 10**9):
            check(read_all(cut(tmp_path / "a.parquet", shard_bytes), id_key="id")[0], range(sum(sizes)))


class OpenKeys(pe.KmsClient):
    """Keeps keys as they are."""

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64decode(key)


def encrypted(file: Path, plaintext_footer: bool) -> Path:
    factory = pe.CryptoFactory(lambda _: OpenKeys())
    how = pe.EncryptionConfiguration(footer_key="f", column_keys={"k": ["text"]}, plaintext_footer=plaintext_footer)
    table = pa.table({"text": ["one"], "id": ["1"]})
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), how)
    with pq.ParquetWriter(file, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return file


def test_encrypted_parquet_is_called_so(tmp_path):
    with pytest.raises(CorpusError, match=r"is called \.parquet, but its first bytes are b'PARE"):
        cut(encrypted(tmp_path / "a.parquet", False), 100)
    (found,) = read_all(cut(encrypted(tmp_path / "b.parquet", True), 100))[0]
    assert found.reason.startswith("broken input: encrypted parquet data (") and "write it without encryption" in found.reason


def test_parquet_that_pyarrow_cannot_read_is_not_called_damaged(tmp_path):
    """LZO, which nobody here can write: snappy's pages under its number."""
    (snappy, gzip) = (parquet({"text": ["one"]}, compression=codec, use_dictionary=False) for codec in ("snappy", "gzip"))
    footers = [data[-8 - int.from_bytes(data[-8:-4], "little") :] for data in (snappy, gzip)]
    at = next(i for i, pair in enumerate(zip(*footers, strict=False)) if pair == (2, 4))
    data = bytearray(snappy)
    data[len(snappy) - len(footers[0]) + at] = 6
    (found,) = read_all(cut(write(tmp_path / "a.parquet", bytes(data)), 100))[0]
    assert (
        found.reason.startswith(f"broken input: parquet data that pyarrow {pa.__version__} cannot read (")
        and "LZO" in found.reason
    )


def test_columns_that_are_no_ids_are_refused_by_name(tmp_path):
    for column, kind in (
        (pa.array([b"0" * 16], pa.binary(16)).cast(pa.uuid()), r"extension<arrow\.uuid>"),
        (pa.array([1], pa.decimal128(38, 0)), "decimal128"),
        (pa.array([1.0]), "double"),
        (pa.array([True]), "bool"),
        (pa.array([[1]]), "list"),
    ):
        file = write(tmp_path / "a.parquet", parquet({"text": ["a"], "id": column}))
        with pytest.raises(CorpusError, match=f"column 'id' is {kind}.*, not strings or integers"):
            cut(file, 100, "text", "id")


# ---- more than 4 GiB


@pytest.mark.long
def test_gzip_counts_bytes_modulo_two_to_the_32(tmp_path):
    packer = zlib.compressobj(1, wbits=31)
    with (tmp_path / "a.jsonl.gz").open("wb") as file:
        for _ in range(4300):
            file.write(packer.compress(b" " * ((1 << 20) - 1) + b"\n"))
        file.write(packer.compress(lines(["last"])) + packer.flush())
    (found,) = read_all(cut(tmp_path / "a.jsonl.gz", 10**9))[0]
    assert found.text == "last" and found.offset == 4300 << 20
