"""Arguments -> files -> pieces: nothing missing, nothing twice, in one order."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import inputs
from megatron_vocagno.preprocess.foreign import BOM
from megatron_vocagno.preprocess.inputs import CUT_BYTES, InputSplit, cut, find, take
from tests.corpus.formats import CONTAINERS, lines, parquet, read_all, write


@pytest.fixture
def tree(tmp_path):
    """Inputs, what is no input, and what a folder leaves out."""
    names = ["b.jsonl", "a.jsonl.gz", "sub/c.NDJSON.zst", "sub/deep/d.json.bz2", "e.txt", "e.txt.xz", "f.parquet", "z[1].jsonl"]
    others = [
        "README.md",
        "b.jsonl.tmp",
        ".hidden.jsonl",
        "_temporary/0/part.jsonl",
        ".git/x.json",
        "jsonl",
        "x.csv.gz",
        "p.parquet.gz",
    ]
    for name in names + others:
        write(tmp_path / name, b"{}\n")
    return tmp_path, sorted(names)


# ---- find


def test_a_folder_is_its_inputs_sorted_by_path(tree):
    folder, names = tree
    assert [str(file.relative_to(folder)) for file in find([str(folder)])] == names
    assert find([f"{folder}/sub/"]) == [folder / "sub/c.NDJSON.zst", folder / "sub/deep/d.json.bz2"]


def test_the_order_is_that_of_the_arguments_and_each_file_comes_once(tree, monkeypatch):
    folder, names = tree
    last, first = folder / "sub/deep/d.json.bz2", folder / "a.jsonl.gz"
    assert find([str(last), str(first)]) == [last, first]
    everything = find([str(last), str(folder), str(first)])
    assert everything[0] == last and len(everything) == len(set(everything)) == len(names)
    # however it is written
    monkeypatch.chdir(folder)
    assert find(["b.jsonl", f"{folder}/b.jsonl", "./b.jsonl", f"file://{folder}/b.jsonl", "b.*"]) == [
        Path("b.jsonl"),
        Path("b.jsonl.tmp"),
    ]


def test_globs_mean_what_a_shell_makes_of_them(tree):
    folder, _ = tree
    assert find([f"{folder}/*.jsonl"]) == [folder / "b.jsonl", folder / "z[1].jsonl"]
    assert find([f"{folder}/**/*.bz2"]) == [folder / "sub/deep/d.json.bz2"]
    # a folder among the matches is what it is as an argument
    assert find([f"{folder}/s*"]) == find([f"{folder}/sub"])
    # a file that is there is meant, whatever its name
    assert find([f"{folder}/z[1].jsonl"]) == [folder / "z[1].jsonl"]
    assert find([f"{folder}/.hidden.jsonl", f"{folder}/README.md"]) == [folder / ".hidden.jsonl", folder / "README.md"]


def test_files_of_a_folder_that_are_left_out_are_named(tree):
    folder, _ = tree
    notes: list[str] = []
    find([str(folder), f"{folder}/sub"], notes.append)
    names = "README.md, b.jsonl.tmp, jsonl, p.parquet.gz, x.csv.gz"
    assert notes == [f"{folder}: 5 files are skipped, because their names are not those of inputs: {names}"]
    notes.clear()
    find([f"{folder}/b.jsonl", f"{folder}/*.gz", f"{folder}/s*"], notes.append)
    assert not notes


def test_a_list_names_files_folders_and_globs(tree):
    folder, _ = tree
    list_ = write(
        folder / "list", f"\ufeff# the corpus\n{folder}/sub\r\n\n  {folder}/*.parquet  \n#{folder}/nix\n{folder}/b.jsonl".encode()
    )
    expected = find([f"{folder}/sub", f"{folder}/f.parquet", f"{folder}/b.jsonl"])
    assert find([f"@{list_}"]) == expected and len(expected) == 4
    assert find([f"{folder}/e.txt", f"@{list_}"]) == [folder / "e.txt", *expected]


def test_a_pattern_that_means_no_file_is_named(tree):
    folder, _ = tree
    write(folder / "empty/x.md", b"")
    write(folder / "list", b"# nothing\n")
    reasons = {
        f"{folder}/nope.jsonl": "no such file or folder",
        f"{folder}/*.nope": "no such file or folder",
        f"{folder}/empty": r"no \*\.jsonl, .* in this folder",
        f"@{folder}/list": "this list contains no file names",
        f"@{folder}/nolist": "cannot read .*nolist: FileNotFoundError",
        "nope://x/y": "cannot (open|read) nope://x/y",
    }
    for pattern, reason in reasons.items():
        with pytest.raises(CorpusError, match=reason) as error:
            find([f"{folder}/b.jsonl", pattern])
        assert pattern.removeprefix("@") in str(error.value)


# ---- cut: lines


def test_pieces_are_whole_lines_and_all_of_them(tmp_path):
    cuts = 0
    for n, shard_bytes in ((1, 10), (200, 1), (200, 50), (200, 333), (200, 10**9)):
        data = lines("x" * (i * 37 % 90) for i in range(n))
        for ending in (b"", b'{"text": "no line end"}'):
            file = write(tmp_path / "a.jsonl", data + ending)
            pieces = cut(file, shard_bytes)
            assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])] and pieces[-1].stop == len(data + ending)
            assert all(data[p.stop - 1 : p.stop] == b"\n" for p in pieces[:-1])
            assert all(p.stop - p.start < shard_bytes + 130 for p in pieces)
            assert [document.raw for document in read_all(pieces)[0]] == (data + ending).splitlines()
            cuts += len(pieces)
    assert cuts > 400


def test_a_cut_just_after_a_line_end_stays_there(tmp_path):
    file = write(tmp_path / "a.jsonl", b"0123456\n" * 12)
    assert [(p.start, p.stop) for p in cut(file, 16)] == [(a, a + 16) for a in range(0, 96, 16)]


def test_line_numbers_and_offsets_hold_in_every_piece(tmp_path):
    data = lines(str(i) * (i % 7) for i in range(100)) + b"\n  \n" + b"\xef\xbb\xbf{}\n" + lines(str(i) for i in range(100))
    file = write(tmp_path / "a.jsonl", data)
    met = 0
    for shard_bytes in (1, 100, 700, 10**6):
        pieces = cut(file, shard_bytes)
        for document in read_all(pieces)[0]:
            path, line, byte = str(document).rsplit(":", 2)
            assert path == str(file) and data[int(byte) :].removeprefix(BOM).startswith(document.raw + b"\n")
            assert int(line) == 1 + data[: int(byte)].count(b"\n")
            met += document.split.start > 0
    assert met > 500


def test_cutting_reads_a_little_around_each_cut(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", lines("x" * (i % 900) for i in range(20_000)) + b'{"text": "' + b"y" * 10**6 + b'"}\n')
    read = count_reads(monkeypatch)
    pieces = cut(file, 10**6)
    assert len(pieces) >= 9 and sum(read) <= (len(pieces) + 10**6 // CUT_BYTES) * CUT_BYTES + 10**6 < pieces[-1].stop / 2


def count_reads(monkeypatch) -> list[int]:
    """Bytes of each read from now on, by what the files deliver."""
    read: list[int] = []
    original = inputs.open_raw

    class Counting:
        def __init__(self, where):
            self.file = original(where)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, at):
            self.file.seek(at)

        def read(self, n):
            data = self.file.read(n)
            read.append(len(data))
            return data

    monkeypatch.setattr(inputs, "open_raw", Counting)
    return read


# ---- cut: other formats


@pytest.mark.parametrize(("name", "suffix"), CONTAINERS)
def test_the_format_is_seen_from_the_first_bytes(name, suffix, tmp_path):
    data = CONTAINERS[name, suffix](lines(["one", "two"]))
    for file_name, kind in (("a.jsonl", "lines"), ("a", "lines"), ("a.txt", "text"), ("A.TXT", "text"), ("txt", "lines")):
        for called in (file_name, file_name + suffix):
            (piece,) = cut(write(tmp_path / called, data), 10)[-1:]
            assert (piece.kind, piece.compression) == (kind, "" if not suffix else name.split()[0].rstrip(","))
            if suffix:
                assert (piece.start, piece.stop, piece.size) == (0, len(data), len(data)) and piece.weight == 4 * len(data)


def test_pieces_of_parquet_are_all_row_groups(tmp_path):
    texts = [str(i) * (i % 300) for i in range(1000)]
    file = write(tmp_path / "a", parquet({"text": texts}, row_group_size=70, use_dictionary=False))
    for shard_bytes in (1, 20_000, 10**9):
        pieces = cut(file, shard_bytes)
        assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])] and pieces[-1].stop == 15
        assert sum(p.size for p in pieces) == file.stat().st_size and all(p.kind == "parquet" for p in pieces)
        assert sum(map(len, texts)) <= sum(p.weight for p in pieces) <= 1.2 * sum(map(len, texts)) + 15_000
        assert all(p.weight <= shard_bytes or p.stop - p.start == 1 for p in pieces)
        assert [document.text for document in read_all(pieces)[0]] == texts
    assert len(cut(file, 1)) == 15 and len(cut(file, 10**9)) == 1


def test_files_without_a_byte_have_no_pieces(tmp_path):
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "a.zst", "a.bz2", "a.xz", "a.parquet"):
        assert cut(write(tmp_path / name, b""), 100) == []
    empty = write(tmp_path / "none.parquet", parquet({"text": pa.array([], pa.string())}))
    assert read_all(cut(empty, 100))[0] == []


def foreign() -> dict[str, tuple[bytes, str]]:
    """A real file of each format that is refused, and what its error says."""
    text = lines(["one"])
    made: dict[str, tuple[bytes, str]] = {}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("a.jsonl", text)
    made["zip"] = archive.getvalue(), "a zip archive.*unpack"
    for name, form in (("tar", tarfile.PAX_FORMAT), ("GNU tar", tarfile.GNU_FORMAT)):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=form) as tape:
            tape.addfile(tarfile.TarInfo("a.jsonl"))
        made[name] = archive.getvalue(), "a tar archive.*unpack"
    table = pa.table({"text": ["one"]})
    for name, new in (("Arrow file", pa.ipc.new_file), ("Arrow stream", pa.ipc.new_stream)):
        sink = pa.BufferOutputStream()
        with new(sink, table.schema) as writer:
            writer.write_table(table)
        made[name] = sink.getvalue().to_pybytes(), "an Arrow file.*parquet"
    made["pickle"] = pickle.dumps(["one"]), "a pickle"
    made["rich text"] = rb"{\rtf1\ansi one}", "a PDF, RTF or WARC file.*extract its text"
    made["Git LFS"] = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a pointer of Git LFS, not the file.*git lfs pull",
    )
    return made


@pytest.mark.parametrize("name", foreign())
def test_other_formats_are_refused_with_what_to_do(name, tmp_path):
    data, reason = foreign()[name]
    for packed in (
        data,
        *(pack(data) for (container, _), pack in CONTAINERS.items() if container in ("gzip", "zstd", "bzip2", "xz")),
    ):
        with pytest.raises(CorpusError, match=reason) as error:
            cut(write(tmp_path / "a.jsonl", packed), 100)
        assert "a.jsonl is" in str(error.value)


def test_a_container_in_a_container_is_refused(tmp_path):
    for inner, data in (("parquet", parquet({"text": ["x" * 9999]})), ("zstd", CONTAINERS["zstd", ".zst"](b"{}\n" * 999))):
        with pytest.raises(CorpusError, match=f"is {inner} inside gzip: unpack it"):
            cut(write(tmp_path / "a.gz", CONTAINERS["gzip", ".gz"](data)), 100)


def test_a_name_that_the_content_belies_is_refused(tmp_path):
    for suffix in (".gz", ".zst", ".bz2", ".xz", ".parquet"):
        for data in (b'{"text": "plain"}\n', b"\x1e\x8b\x08\x00", b"PAR2", gzip_or_zstd(suffix)):
            with pytest.raises(CorpusError, match=rf"is called \{suffix}, but its first bytes are"):
                cut(write(tmp_path / f"a.jsonl{suffix}", data), 100)


def gzip_or_zstd(suffix: str) -> bytes:
    return CONTAINERS[("zstd", ".zst") if suffix == ".gz" else ("gzip", ".gz")](b"{}\n")


def test_text_that_begins_like_a_format_is_text(tmp_path):
    for text in (
        "ORCHIDS",
        "PARENTS",
        "BZh9 is",
        "PK is",
        "Object",
        "ARROW1 flew",
        "7z",
        "Rar!",
        "xz",
        "[1] Introduction",
        "{ a set }",
        "\0",
    ):
        file = write(tmp_path / "a.txt", text.encode())
        assert [document.text for document in read_all(cut(file, 100))[0]] == [text]


def test_what_cannot_be_cut_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"nope\.jsonl: no such file"):
        cut(tmp_path / "nope.jsonl", 100)
    with pytest.raises(CorpusError, match="not a regular file"):
        cut(tmp_path, 100)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CorpusError, match="not a regular file"):
        cut(tmp_path / "fifo", 100)
    whole = parquet({"text": ["one"] * 99})
    for data in (whole[:-1], whole[: len(whole) // 2], b"PAR1", whole[:-6] + b"\xff\x7fPAR1"):
        with pytest.raises(CorpusError, match=r"a\.parquet: damaged parquet data .*: is it complete\?"):
            cut(write(tmp_path / "a.parquet", data), 100)


# ---- take


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> list[InputSplit]:
    """Pieces of every kind: plain lines in pieces, blank and bad ones, compressed, cut off, texts and parquet."""
    folder = tmp_path_factory.mktemp("mixture")
    data = lines(str(i) for i in range(12))
    write(folder / "a.jsonl", b"\n" + data + b" \nbad\n\n" + lines([""]) + b"\n")
    write(folder / "b.jsonl.gz", CONTAINERS["gzip", ".gz"](data))
    write(folder / "c.jsonl.xz", CONTAINERS["xz", ".xz"](data * 50)[:-40])
    write(folder / "d.txt", b"one document\n\nof four\nlines")
    write(folder / "e.parquet", parquet({"text": ["x", None, "y", "z", ""]}, row_group_size=2))
    write(folder / "f.txt", b"last")
    return [piece for file in find([str(folder)]) for piece in cut(file, 60)]


def test_the_first_documents_are_the_first_of_all(mixture):
    everything, _ = read_all(mixture)
    assert len(everything) > 30 and len({d.split.url for d in everything}) == 6
    assert {d.text is None for d in everything} == {True, False}
    for n in range(len(everything) + 3):
        taken = take(mixture, n)
        documents, digest = read_all(taken)
        assert [(str(d), d.text) for d in documents] == [(str(d), d.text) for d in everything[:n]]
        assert len(taken) <= len(mixture)
        if n >= len(everything):
            assert digest == read_all(mixture)[1]


def test_taking_reads_no_further_than_it_must(mixture):
    missing = InputSplit("/nope/nope.jsonl", "lines", "", 0, 10, 10, 10)
    n = len(read_all(mixture[:1])[0])
    assert take([mixture[0], missing], n)[0].limit == n
    with pytest.raises(FileNotFoundError):
        take([mixture[0], missing], n + 1)
    with pytest.raises(FileNotFoundError):
        take([missing], 1)
