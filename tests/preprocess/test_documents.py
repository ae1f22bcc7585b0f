"""Pieces -> documents: the same from every container, bad records by their reasons."""

from __future__ import annotations

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import documents
from megatron_vocagno.preprocess.documents import InputRecord, LongText, pieces_of, read
from megatron_vocagno.preprocess.inputs import InputSplit, cut
from tests import tokenizers_for_tests as real
from tests.corpus.formats import CONTAINERS, lines, of, parquet, read_all, write

# ---- the same from every container


@pytest.fixture(scope="module")
def mixed() -> bytes:
    """Real texts, blank and bad lines, CRLF, a BOM, and no line end at the end."""
    good = lines(real.texts()).split(b"\n")
    between = [b"", b"  ", b"bad", b'{"text": "\xff"}', b"\xef\xbb\xbf{}"]
    rows = [row for pair in itertools.zip_longest(good, between * 9, fillvalue=b"\r") for row in pair]
    return b"\xef\xbb\xbf" + b"\n".join(rows) + b'\n{"text": "last"}'


@pytest.mark.parametrize(("name", "suffix"), CONTAINERS)
def test_every_container_gives_the_same_documents_and_the_same_digest(name, suffix, mixed, tmp_path):
    expected, digest = read_all(cut(write(tmp_path / "plain.jsonl", mixed), 10**9))
    found, other = read_all(cut(write(tmp_path / f"a.jsonl{suffix}", CONTAINERS[name, suffix](mixed)), 10**9))
    assert [d[1:] for d in found] == [d[1:] for d in expected] and other == digest
    assert [str(d).split(":")[1:] for d in found] == [str(d).split(":")[1:] for d in expected]
    assert [d.text for d in found if d.text is not None] == [*real.texts(), "last"]
    assert sum(d.text is None for d in found) > 20


@pytest.mark.parametrize("shard_bytes", [1, 1_000, 30_000, 10**9])
def test_documents_and_digest_do_not_depend_on_the_cuts(shard_bytes, mixed, tmp_path):
    file = write(tmp_path / "a.jsonl", mixed)
    whole, pieces = cut(file, 10**9), cut(file, shard_bytes)
    (expected, digest), (found, other) = read_all(whole), read_all(pieces)
    assert digest == other and [(str(d), d.raw, d.text) for d in found] == [(str(d), d.raw, d.text) for d in expected]
    assert (len(pieces) > 1) == (shard_bytes < 10**9)


def test_parquet_gives_the_same_however_it_is_written(tmp_path):
    texts = [*real.texts(), "", "\ufeffa mark in a text stays"]
    ids = [str(7 * i) for i in range(len(texts))]
    digests, met = set(), 0
    for compression in ("none", "snappy", "gzip", "zstd", "brotli", "lz4"):
        for options in (
            {},
            {"use_dictionary": False},
            {"data_page_version": "2.0"},
            {"write_page_checksum": True},
            {"row_group_size": 9},
        ):
            data = parquet({"more": [[1]] * len(ids), "text": texts, "id": ids}, compression=compression, **options)
            found, digest = read_all(cut(write(tmp_path / "a", data), 50_000), id_key="id")
            assert [(d.text, d.id, d.raw) for d in found] == list(zip(texts, ids, map(str.encode, texts), strict=True))
            assert [str(d) for d in found] == [f"{tmp_path}/a:row {i + 1}" for i in range(len(ids))]
            digests.add(digest)
            met += 1
    assert len(digests) == 1 and met == 30


def test_a_large_row_group_is_read_as_a_small_one_is(tmp_path, monkeypatch):
    from megatron_vocagno.preprocess import parquet as parquet_module

    texts = [text * 20 for text in real.texts()]
    file = write(tmp_path / "a", parquet({"text": texts}, compression="none", use_dictionary=False))
    at_once = read_all(cut(file, 10**9))
    monkeypatch.setattr(parquet_module, "LARGE_ROW_GROUP", 0)
    assert read_all(cut(file, 10**9)) == at_once and [d.text for d in at_once[0]] == texts


STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]


@pytest.mark.parametrize(
    "kind", [*STRINGS, pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary())], ids=str
)
def test_all_string_columns_are_texts_and_ids(kind, tmp_path):
    texts = ["one", "zwölf", "", None, "one"]
    column = pa.array(texts).cast(kind)
    try:
        written = parquet({"text": column, "id": column})
    except pa.ArrowNotImplementedError:
        pytest.skip(f"this version of pyarrow does not write {kind}")
    found = of(tmp_path / "a", written, id_key="id")
    assert [(d.text, d.id) for d in found if d.text is not None] == [(text, text) for text in texts if text is not None]
    assert found[3].reason == "'text' is null"


def test_a_text_file_is_one_document(tmp_path):
    text = real.texts()[0] + "\r\nlast line, ünd no end\0"
    for (name, suffix), pack in CONTAINERS.items():
        for mark in ("", "\ufeff"):
            (found,) = of(tmp_path / name / f"some.txt{suffix}", pack((mark + text).encode()), id_key="id")
            assert (found.text, found.id, found.raw) == (text, f"some.txt{suffix}", (mark + text).encode())
    (found,) = of(tmp_path / "bad.txt", b"\xef\xbb\xbfabc\xff")
    assert found.text is None and found.reason == "invalid UTF-8 at byte 6"


def test_another_document_or_another_order_is_another_digest(tmp_path):
    def digest(*files: tuple[str, bytes], id_key: str | None = None) -> str:
        pieces = [piece for i, (name, data) in enumerate(files) for piece in cut(write(tmp_path / str(i) / name, data), 10**9)]
        return read_all(pieces, id_key=id_key)[1]

    a, b = b'{"text": "a"}', b'{"text": "b"}'
    whole = CONTAINERS["gzip", ".gz"](a + b"\n")
    different = [
        digest(("x", a), ("x", b)),
        digest(("x", b), ("x", a)),
        digest(("x", a + b)),
        digest(("x.txt", a), ("x.txt", b)),
        digest(("x.txt", a + b)),
        *(digest(("x.txt", a + between + b"\0text\n" + b)) for between in (b"", bytes(8))),
        digest(("x.txt", a), ("x", b)),
        digest(("x.txt", a[:-1]), ("x.txt", a[-1:] + b)),
        digest(("a.txt", a), ("b.txt", b), id_key="id"),
        digest(("b.txt", a), ("a.txt", b), id_key="id"),
        digest(("x", whole)),
        digest(("x", whole[:-8])),
        *(
            digest(("x", parquet({"text": column, "id": ["1", "2"]})))
            for column in (["a", "b"], ["b", "a"], ["ab", ""], ["", "ab"], ["ab", None])
        ),
        *(digest(("x", parquet({"text": ["a", "b"], "id": ids})), id_key="id") for ids in (["1", "2"], ["2", "1"], ["12", ""])),
    ]
    assert len(set(different)) == len(different) == 21
    # and what is the same
    assert digest(("x", a), ("x", b)) == digest(("x", a + b"\n" + b)) == digest(("x", a + b"\n"), ("y", b + b"\n"))
    assert digest(("x", parquet({"text": ["a"], "id": [5]})), id_key="id") == digest(
        ("x", parquet({"text": ["a"], "id": ["5"]})), id_key="id"
    )


def test_a_limit_ends_documents_and_digest(tmp_path):
    file = write(tmp_path / "a", lines(map(str, range(9))))
    (piece,) = cut(file, 10**9)
    limited = InputSplit(**{**{name: getattr(piece, name) for name in piece.__dataclass_fields__}, "limit": 4})
    expected = read_all(cut(write(tmp_path / "b", lines(map(str, range(4)))), 10**9))
    found = read_all([limited])
    assert [d.text for d in found[0]] == list("0123") and found[1] == expected[1]


# ---- records

DEEP = 100_000
# lines of this and of other writers: what is no record -> what its reason says
BAD = {
    b'{"text": "cut off': "invalid JSON",
    b"{": "invalid JSON",
    b"{'text': 'a'}": "invalid JSON",
    b'{"text": "a"': "cut off, or one object over several lines? Then jq -c . FILE",
    b'{"text": "a",': "cut off, or one object over several lines",
    b"Some words.": "plain text? That is read from files that are called *.txt",
    b'{"text": "a"}{"text": "b"}': "several objects on one line? jq -c . FILE > FILE.jsonl parts them",
    b'{"text": "a"}\xef\xbb\xbf{"text": "b"}': "several objects on one line",
    b'{"text": "a"} {"text": "b"} {"text": "c"}': "several objects on one line",
    b'{"text": "a"}\r{"text": "b"}\r': "end in CR alone: tr '\\r' '\\n' < FILE > FILE.jsonl",
    b'{"text": "a"},': "a comma behind the object",
    b"\0" * 1000: "nothing but zero bytes: space that was set aside and never written?",
    b'{"text": "a"}' + bytes(100): "zero bytes behind the object",
    b'{"text": "a\0b"}': "Invalid control character",
    '{"text": "a"}'.encode("utf-16"): "UTF-16 text begins here",
    b"[1, 2]": "a list, not a JSON object",
    b"null": "null, not a JSON object",
    b'"text"': "a string, not a JSON object",
    b'{"body": "x"}': "no key 'text' (it has 'body'); --text-key names another",
    b"{}": "no key 'text' (it has none)",
    b'{"meta": {"text": "x"}}': "no key 'text' (it has 'meta')",
    b'{"text": 5}': "'text' is a number, not a string",
    b'{"text": null}': "'text' is null",
    b'{"text": ["x"]}': "'text' is a list",
    b'{"text": "\xff\xfe"}': "invalid UTF-8 at byte 10",
    b'{"text": "x", "id": "\xed\xa0\x80"}': "invalid UTF-8 at byte 21",
    b'{"text": "a \\ud800 b"}': "a lone surrogate at character 2 of 'text'",
    b'{"text": "\\ude00\\ud83d"}': "a lone surrogate at character 0 of 'text'",
    b'{"text": "x", "id": ' + b"[" * DEEP + b"]" * DEEP + b"}": "nested too deeply",
    b"[" * DEEP: "nested too deeply",
    b'{"text": ' * DEEP: "nested too deeply",
}
# and what is one -> its text
GOOD = {
    b'{"text": ""}': "",
    b' \t{"text" : "x"} \r': "x",
    b'{"text": "a", "text": "the last one"}': "the last one",
    b'{"text": "\\ud83d\\ude00 \\n\\r\\u2028"}': "😀 \n\r\u2028",
    b'{"text": "\\u0000\\u001e\\r\\n\\ufeff"}': "\0\x1e\r\n\ufeff",
    b'{"text": "\xc2\x85 \xe2\x80\xa8 \xe2\x80\xa9 \x7f"}': "\x85 \u2028 \u2029 \x7f",
    b'{"text": "two", "score": NaN, "n": [Infinity, -Infinity]}': "two",
    b'{"text": "three", "title": "\\ud800", "list": ["\\udfff"]}': "three",
    b'{"text": "x", "n": 1e999, "z": -0.0}': "x",
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "x",
    b'{"text": "x", "n": [18446744073709551616, -9223372036854775809]}': "x",
    b'{"text": "x", "n": ' + b"[" * 900 + b"]" * 900 + b"}": "x",
    b'{"a": {"text": 5}, "text": "x"}': "x",
    b'\x1e{"text": "RFC 7464"}': "RFC 7464",
    b'\x1e{"text": "RFC 7464", "x": NaN}': "RFC 7464",
    b'{"text": "' + b"long " * 500_000 + b'"}': "long " * 500_000,
}


def test_good_and_bad_lines_lie_beside_each_other(tmp_path):
    rows = [row for pair in itertools.zip_longest(BAD, GOOD, fillvalue=b'{"text": "between"}') for row in pair]
    for end in (b"\n", b"\r\n"):
        found = of(tmp_path / "a", end.join(rows))
        assert [d.raw for d in found] == [row.rstrip(b"\r") for row in rows]
        for document, row in zip(found, rows, strict=True):
            if row in BAD:
                assert document.text is None and BAD[row] in document.reason, (row[:50], document.reason)
            else:
                assert (document.text, document.reason) == (GOOD.get(row, "between"), "")


def test_no_text_has_a_lone_surrogate(tmp_path):
    """Strict parsing is trusted for that: every pair of halves and neighbors, escaped, with and without NaN beside it."""
    halves = ["\\ud800", "\\udbff", "\\udc00", "\\udfff", "\\ud83d", "\\ude00", "x", "\\\\ud800"]
    rows = [f'{{"text": "{a}{b}{c}"{end}}}' for a, b, c in itertools.product(halves, repeat=3) for end in ("", ', "n": NaN')]
    found = of(tmp_path / "a", "\n".join(rows).encode())
    texts = [d.text.encode() for d in found if d.text is not None]
    alone = [d for d in found if d.text is None]
    assert len(texts) > 80 and len(alone) > 900 and all("a lone surrogate at" in d.reason for d in alone)
    for document, row in zip(found, rows, strict=True):
        assert (document.text is None) == any("\ud800" <= c <= "\udfff" for c in json.loads(row)["text"])


def test_ids_are_strings_or_integers(tmp_path):
    good = {
        '"a"': "a",
        "5": "5",
        "-0": "0",
        str(2**63): str(2**63),
        '""': "",
        '"\\u00e9"': "é",
        str(2**64): str(2**64),
        "-" + "9" * 40: "-" + "9" * 40,
    }
    bad = {
        "null": "is null, not",
        "true": "is true or false, not",
        "1.5": "is a number, not",
        "[1]": "is a list, not",
        "{}": "is an object, not",
        "1e3": "is a number, not",
        '"\\ud800"': "surrogate",
    }
    rows = [f'{{"text": "x", "id": {value}}}' for value in (*good, *bad)] + ['{"text": "x"}']
    found = of(tmp_path / "a", "\n".join(rows).encode(), id_key="id")
    assert [d.id for d in found[: len(good)]] == list(good.values())
    for document, reason in zip(found[len(good) :], (*bad.values(), "no key 'id' (it has 'text'); --id-key"), strict=True):
        assert document.text is None and reason in document.reason and "'id'" in document.reason
    assert all(d.id == "" for d in of(tmp_path / "a", "\n".join(rows).encode()))


def test_bad_rows_of_parquet_are_bad_alone(tmp_path):
    stored = [b"one", b"\xff\xfe", None, b"", b"\xed\xa0\x80", "zwölf".encode()]
    for kind in STRINGS:
        column = pa.array(stored, pa.binary_view()).cast(pa.large_binary() if "view" not in str(kind) else pa.binary_view())
        for id_column in (pa.array([1, 2, 3, 4, 5, None]), pa.array([1, 2, 3, 4, 5, None], pa.uint64())):
            data = parquet(
                {"text": pa.Array.from_buffers(pa.large_string(), 6, column.cast(pa.large_binary()).buffers()), "id": id_column}
            )
            found = of(tmp_path / "a", data, id_key="id")
            assert [d.text for d in found] == ["one", None, None, "", None, None]
            assert [d.reason for d in found if d.text is None] == [
                "invalid UTF-8 at byte 0 of 'text'",
                "'text' is null",
                "invalid UTF-8 at byte 0 of 'text'",
                "'id' is null",
            ]
            assert [d.id for d in found] == ["1", "", "", "4", "", ""]


def test_columns_that_hold_no_text_are_refused_by_name(tmp_path):
    n = pa.array([1, 2])
    columns = {"body": ["a", "b"], "list": [["a"], ["b"]], "struct": [{"text": "a"}] * 2, "n": n, "real": [0.5, 1.5]}
    (piece,) = cut(write(tmp_path / "a.parquet", parquet(columns)), 10**9)
    refused = {
        ("text", None): r"no column 'text' \(it has 'body', 'list', 'struct', 'n', 'real'\); --text-key",
        ("list", None): r"column 'list' is list<.*, not strings \(these are: 'body', 'struct\.text'\); --text-key",
        ("struct", None): "column 'struct' is struct",
        ("struct.other", None): "no column 'struct.other'",
        ("body.text", None): "no column 'body.text'",
        ("n", None): "column 'n' is int64",
        ("body", "id"): "no column 'id' .* --id-key",
        ("body", "real"): "column 'real' is double, not strings or integers",
        ("body", "list"): "column 'list' is list",
    }
    for (text_key, id_key), reason in refused.items():
        with pytest.raises(CorpusError, match=reason) as error:
            list(read(piece, text_key, id_key, len))
        assert str(tmp_path) in str(error.value)
    assert [d.id for d in read(piece, "body", "n", len)] == ["1", "2"]
    assert [d.id for d in read(piece, "body", "body", len)] == ["a", "b"]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(CorpusError, match="2 columns are called 'text'"):
        read_all(cut(tmp_path / "twice.parquet", 10**9))


# ---- long texts are decoded in pieces


LONG = 'a\\ "quoted" \\\\" é天🙂\n\t\x00\x7f\u2028▁ﬁ\ufeff ' * 9
ENDS = ["", "\\", '"', "🙂", "\\\\"]


def long_lines() -> list[bytes]:
    """Lines with one long string: valid ones, and those that differ from a valid one in a detail."""
    found = []
    for ascii_only, end in itertools.product((True, False), ENDS):
        text = json.dumps(LONG + end, ensure_ascii=ascii_only)
        rows = (
            '{"text": %s}',
            ' { "id" : "i" , "text":%s , "n": [1, "x"]}\t',
            '{"text": "short", "html": %s}',
            '{"html": {"a": [%s]}, "text": "\\\\", "id": 7}',
            '{"text": "first", "text": %s}',
            '{"text": %s, "text": "last"}',
            '{"text": null, "id": %s}',
            '{"id": %s, "text": "x"}',
            '{%s: 1, "text": "x"}',
            "{%s: 1}",
            '{"text": [%s]}',
            '{"text": %s, "id": "\\u0000"}',
            '{"text": "\\u0000", "html": %s}',
            '{"text": %s, "more": NaN}',
            '{"text": %s, "id": 1e400}',
            '{"text": %s, "id": 123456789012345678901234567890}',
            '\x1e{"text": %s}',
            '{"text": %s',
            '{"text": %s"',
            '{"text": %s}}',
            '["text", %s]',
            "%s",
        )
        found += [(row % text).encode() for row in rows]
        for bad in (b"\xff", b"\xed\xa0\x80", b"\x01", b"\\x", b"\\ud800", b"\\ude00", b"\\ud83d\\u0041", b"\\u12"):
            at = text.index("quoted")
            found.append(b'{"text": ' + text[:at].encode() + bad + text[at:].encode() + b"}")
    return found


def joined(records: list[InputRecord]) -> list[tuple[object, ...]]:
    texts = ["".join(pieces_of(r.text)) if isinstance(r.text, LongText) else r.text for r in records]
    return [(r.number, r.offset, r.raw, text, r.reason, r.id) for r, text in zip(records, texts, strict=True)]


@pytest.mark.parametrize("id_key", [None, "id", "text"])
def test_a_text_that_is_decoded_in_pieces_is_the_text(id_key, tmp_path, monkeypatch):
    rows = long_lines()
    files = {
        "a.jsonl": b"\n".join(rows),
        "a.parquet": parquet(
            {"text": [LONG.encode() + end.encode() for end in ENDS] + [LONG.encode() + b"\xff"], "id": ["i"] * 6}
        ),
        "good.txt": ("\ufeff" + LONG + "\r\n\ufeff\ufeffmore").encode(),
        "bad.txt": b"\xef\xbb\xbf" + LONG.encode() + b"\xff",
    }
    whole = {}
    for name, data in files.items():
        (piece,) = cut(write(tmp_path / name, data), 10**9)
        options = ("text", None if name.endswith("txt") else id_key, lambda _: None)
        whole[piece] = options, joined(list(read(piece, *options)))
    monkeypatch.setattr(documents, "LONG_BYTES", 200)
    monkeypatch.setattr(documents, "PART_CHARACTERS", 100)
    met = dict.fromkeys(files, 0)
    for size in (*range(14, 40), 1000):
        monkeypatch.setattr(documents, "PIECE_BYTES", size)
        for piece, (options, expected) in whole.items():
            found = list(read(piece, *options))
            assert joined(found) == expected
            met[piece.url.rsplit("/")[-1]] += sum(isinstance(r.text, LongText) for r in found)
    assert met["bad.txt"] == 0 and met["good.txt"] == 27 and met["a.parquet"] == 27 * 5
    assert met["a.jsonl"] >= (0 if id_key == "text" else 27 * 10 * 2)
