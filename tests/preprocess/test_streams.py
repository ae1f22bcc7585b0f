"""Compressed bytes: what the format's own library reads is read, and what is none is called what it is."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest
from backports import zstd

from megatron_vocagno.errors import BrokenInputError
from megatron_vocagno.preprocess import streams
from megatron_vocagno.preprocess.streams import compression_of, gzip_header_size, open_bytes
from tests.corpus.formats import BGZIP_END, CONTAINERS, gzip_member, lines, of, skippable, write, xz_with_dictionary, zstd_stream


def unpacked(file: Path, data: bytes) -> bytes:
    write(file, data)
    with open_bytes(file, compression_of(data), 0, len(data)) as stream:
        return stream.read()


# ---- gzip


def some_members(rng: random.Random) -> list[bytes]:
    """Members of random sizes, none too, with random optional fields."""

    def field(most: int, alphabet: bytes) -> bytes:
        return bytes(rng.choices(alphabet, k=rng.choice((0, 0, 1, 8, most))))

    return [
        gzip_member(
            bytes(rng.choices(b"abc \n", k=rng.choice((0, 1, 40, 700, 20_000)))),
            field(65_535 if rng.random() < 0.1 else 300, bytes(range(256))),
            field(500, bytes(range(1, 256))),
            field(9000, b"comment"),
            rng.random() < 0.5,
            rng.randrange(10),
        )
        for _ in range(rng.randrange(1, 12))
    ]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 4096])
def test_gzip_of_any_headers_is_read_wherever_a_read_ends(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "COMPRESSED_CHUNK", chunk)
    rng = random.Random(chunk)
    met, n = 0, 60 if chunk > 2 else 20
    for _ in range(n):
        data = b"".join(some_members(rng)) + bytes(rng.choice((0, 0, 1, 5000)))
        assert unpacked(tmp_path / "a", data) == gzip.decompress(data)
        met += len(data) > 3 * chunk
    assert met > n // 2


def test_a_gzip_header_is_whole_or_not(tmp_path):
    whole = gzip_member(b"text", b"extra", b"name", b"comment", True)
    size = len(whole) - len(gzip_member(b"text")) + 10
    for n in range(len(whole) + 1):
        assert gzip_header_size(whole[:n]) == (size if n >= size else None)
        if n < len(whole):
            with pytest.raises(BrokenInputError, match=r"the gzip data ends in the middle: cut off\?"):
                unpacked(tmp_path / "a", gzip_member(b"first") + whole[:n] if n else whole[:11])


def test_a_damaged_gzip_header_is_called_so(tmp_path):
    broken = {
        gzip_member(b"text", name=b"name", crc=True).replace(b"name", b"nome"): "a header's checksum does not fit",
        b"\x1f\x8b\x08\x20" + gzip_member(b"text")[4:]: "flags 0x20 in a header: RFC 1952 has no such",
        b"\x1f\x8b\x08\x08" + b"x" * (2 << 20): "a header of more than 1,048,576 bytes",
        gzip_member(b"text")[:-5] + b"\x01\x04\0\0\0": "damaged gzip data",
    }
    for data, reason in broken.items():
        with pytest.raises(BrokenInputError, match=reason):
            unpacked(tmp_path / "a", data)


# ---- zstd and xz


@pytest.mark.parametrize("log", [10, 27, 28, 31])
def test_zstd_of_any_window_is_read(log, tmp_path):
    data = lines(f"line {i}" for i in range(2000))
    assert unpacked(tmp_path / "a", zstd_stream(data, log)) == data
    assert unpacked(tmp_path / "a", zstd_stream(data[:99], log) + skippable(b"index") + zstd_stream(data[99:])) == data


def test_xz_of_any_dictionary_is_read(tmp_path):
    data = lines(f"line {i}" for i in range(2000))
    for size in (1 << 20, 1 << 26, 1 << 30, 3 << 29):
        packed = xz_with_dictionary(data, size)
        assert unpacked(tmp_path / "a", packed) == lzma.decompress(packed) == data


TOO_LITTLE = """
import resource, sys
from pathlib import Path
from megatron_vocagno.preprocess.streams import open_bytes
from megatron_vocagno.errors import CorpusError
file = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    open_bytes(file, sys.argv[2], 0, file.stat().st_size).read()
except CorpusError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["zstd", "xz"])
def test_too_little_memory_for_a_window_is_no_damage(name, tmp_path):
    data = zstd_stream(b"text", 31) if name == "zstd" else xz_with_dictionary(b"text", 3 << 29)
    file = write(tmp_path / "a", data)
    run = subprocess.run([sys.executable, "-c", TOO_LITTLE, file, name], capture_output=True, text=True)
    assert f"{file}: not enough memory to decompress it: {name} data" in run.stdout
    assert "or compress it again with a smaller window" in run.stdout


def test_zstd_with_a_dictionary_is_called_so(tmp_path):
    samples = [json.dumps({"text": f"sample {i * 7919} of some words"}).encode() for i in range(2000)]
    trained = zstd.train_dict(samples, 4000)
    packed = zstd.compress(samples[0], zstd_dict=trained)
    for data in (packed, skippable(b"") + zstd.compress(b"plain") + packed):
        with pytest.raises(BrokenInputError, match=rf"were packed with a dictionary \({trained.dict_id}\): unpack them with it"):
            unpacked(tmp_path / "a", data)


def test_what_a_library_does_not_support_is_not_called_damaged(tmp_path):
    """A window beyond the largest, a frame with the bit that zstd has reserved, a dictionary of 4 GiB."""
    stream = zstd_stream(b"text" * 999, 20)
    for data in (
        stream[:5] + b"\xf8" + stream[6:],
        stream[:4] + bytes([stream[4] | 8]) + stream[5:],
        xz_with_dictionary(b"text", (4 << 30) - 1),
    ):
        with pytest.raises(
            BrokenInputError, match=r"data that cannot be read here .*: if they are whole, unpack them with what packed them"
        ):
            unpacked(tmp_path / "a", data)


# ---- what follows


@pytest.mark.parametrize(("name", "suffix"), [(name, suffix) for name, suffix in CONTAINERS if suffix])
def test_what_follows_compressed_data_is_told_from_damage(name, suffix, tmp_path):
    data = CONTAINERS[name, suffix](lines(["one", "two"]))
    for garbage in (b"\n", b"trailing words", b'{"text": "three"}\n', b"PK\x03\x04", b"\x1f\x8c\x08" * 40, b"BZh9 is text"):
        *documents, last = of(tmp_path / f"a.jsonl{suffix}", data + garbage)
        assert [d.text for d in documents] == ["one", "two"]
        assert "data end, and what follows is something else" in last.reason and repr(garbage[:16]) in last.reason, garbage
        at = int(last.reason.split("at byte ")[1].split(" of")[0].replace(",", ""))
        assert (data + garbage)[at:] == garbage


def test_bgzip_ends_with_an_empty_block(tmp_path):
    assert gzip.decompress(BGZIP_END) == unpacked(tmp_path / "a", BGZIP_END) == b""
    assert unpacked(tmp_path / "a", gzip_member(b"text") + BGZIP_END * 3 + gzip_member(b"more") + BGZIP_END) == b"textmore"
