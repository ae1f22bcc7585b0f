"""Which key or column is the text, and which the id: several, nested, in files of two kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset, merge
from megatron_vocagno.errors import CorpusError, DatasetError
from megatron_vocagno.preprocess.inputs import cut
from megatron_vocagno.preprocess.plan import plan
from tests.corpus.conftest import make
from tests.corpus.formats import parquet, read_all, write


def texts(file: Path, text_key: str | Sequence[str], id_key: str | Sequence[str] | None = None) -> list[tuple[str | None, str]]:
    """Text, or None; id, or the reason."""
    documents = read_all(cut(file, 10**9), text_key, id_key)[0]
    return [(document.text, document.id or document.reason) for document in documents]


def rows(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ---- JSON lines: per record


def test_a_line_takes_the_first_key_that_it_has_and_that_is_not_null(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        rows(
            {"text": "a", "body": "b", "id": 1},
            {"body": "b", "url": "u"},
            {"body": "b", "text": None, "id": None, "url": "v"},
            {"text": "", "body": "b", "id": "x"},
            {"other": "c"},
            {"text": None, "body": None},
            {"text": "a"},
            {"text": 5, "body": "b"},
        ),
    )
    assert texts(file, ("text", "body"), ("id", "url")) == [
        ("a", "1"),
        ("b", "u"),
        ("b", "v"),
        ("", "x"),
        (None, "no key 'text' or 'body' (it has 'other'); --text-key names another"),
        (None, "'text' is null, not a string"),
        (None, "no key 'id' or 'url' (it has 'text'); --id-key names another"),
        (None, "'text' is a number, not a string"),
    ]
    assert [text for text, _ in texts(file, ("body", "text"))][:4] == ["b", "b", "b", "b"]


def test_a_key_within_another_is_named_with_a_dot(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        rows(
            {"data": {"text": "a", "meta": {"id": 2**70}}},
            {"data.text": "flat", "data": {"text": "nested"}, "data.meta.id": "i"},
            {"data": "no object"},
            {"data": {"text": {"text": "too deep"}}},
            {"data": [{"text": "in a list"}]},
        )
        + b'{"data": {"text": "a \\ud800", "x": NaN}}\n',
    )
    assert texts(file, "data.text", "data.meta.id") == [
        ("a", str(2**70)),
        ("flat", "i"),
        (None, "no key 'data.text' (it has 'data'); --text-key names another"),
        (None, "'data.text' is an object, not a string"),
        (None, "no key 'data.text' (it has 'data'); --text-key names another"),
        (None, "a lone surrogate at character 2 of 'data.text'"),
    ]


# ---- parquet: per file


def test_a_parquet_file_takes_the_first_key_that_is_a_column(tmp_path):
    both = write(tmp_path / "a.parquet", parquet({"body": ["b", "c"], "text": ["a", None], "n": [1, 2]}))
    one = write(tmp_path / "b.parquet", parquet({"body": ["b"], "url": ["u"], "TEXT": ["another"]}))
    assert texts(both, ("text", "body"), ("id", "n")) == [("a", "1"), (None, "'text' or 'body' is null")]
    assert texts(one, ("text", "body"), ("n", "url")) == [("b", "u")]
    with pytest.raises(CorpusError, match=r"'text' .*'x\.y' .*'body', 'url', 'TEXT'.* --text-key"):
        read_all(cut(one, 10**9), ("text", "x.y"))


def test_a_field_of_a_struct_is_a_column(tmp_path):
    data = [{"text": "a", "meta": {"id": 7}, "text2": "x"}, None, {"text": None, "meta": None, "text2": "x"}]
    file = write(tmp_path / "a.parquet", parquet({"text": ["top"] * 3, "data": data}, row_group_size=2))
    assert texts(file, "data.text") == [("a", ""), (None, "'data.text' is null"), (None, "'data.text' is null")]
    assert texts(file, "data.text", "data.meta.id")[0] == ("a", "7")
    assert texts(file, "text", "data.text")[0] == ("top", "a")
    literal = write(tmp_path / "b.parquet", parquet({"data": [{"text": "nested"}], "data.text": ["flat"]}))
    assert texts(literal, "data.text") == [("flat", "")]
    with pytest.raises(CorpusError, match=r"column 'data' is struct<.*these are: 'text', 'data\.text', 'data\.text2'\)"):
        texts(file, "data")


# ---- before anything is tokenized


def test_a_column_that_is_missing_is_found_by_the_plan(tmp_path, settings):
    good = write(tmp_path / "a.jsonl", rows(*({"text": f"line {i}"} for i in range(99))))
    file = write(tmp_path / "b.parquet", parquet({"body": ["b"], "n": [1]}))
    for changed, missing in (
        ({}, r"b\.parquet: no column 'text' \(it has 'body', 'n'\); --text-key names another"),
        ({"text_key": "n"}, r"b\.parquet: column 'n' is int64, not strings \(these are: 'body'\)"),
        ({"text_key": ("text", "body"), "id_key": "id"}, r"b\.parquet: no column 'id' .* --id-key"),
    ):
        with pytest.raises(CorpusError, match=missing):
            plan([good, file], replace(settings, **changed), 100)
    assert len(plan([good, file], replace(settings, text_key=("text", "body")), 10**9).shards) == 1


def test_a_parquet_file_without_rows_needs_no_column(tmp_path, settings):
    """Spark and others write such parts, some with another schema."""
    schemas = [pa.schema([]), pa.schema([("other", pa.int64())]), pa.schema([("text", pa.string())])]
    files = []
    for i, schema in enumerate(schemas):
        files.append(tmp_path / f"{i}.parquet")
        with pq.ParquetWriter(files[-1], schema) as writer:
            writer.write_table(schema.empty_table())  # a row group of no rows
    assert read_all([piece for file in files for piece in cut(file, 100, "text", "id")])[0] == []


# ---- a dataset


@pytest.fixture
def two_kinds(tmp_path) -> list[Path]:
    return [
        write(tmp_path / "a.jsonl", rows({"text": "one", "id": 1}, {"text": "two", "id": 2})),
        write(tmp_path / "b.parquet", parquet({"body": ["three", "four"], "doc_id": ["x", "y"]})),
        write(tmp_path / "c.txt", b"five"),
    ]


def ids_of(dataset: AlignedDataset) -> list[str]:
    return [dataset.id(i) for i in range(len(dataset))]


def test_files_of_two_kinds_make_one_dataset(two_kinds, tmp_path, settings):
    keyed = replace(settings, text_key=("text", "body"), id_key=("id", "doc_id"))
    dataset = make(two_kinds, tmp_path / "out", keyed)
    assert ids_of(dataset) == ["1", "2", "x", "y", "c.txt"] and dataset.manifest.id_key == "id or doc_id"


def test_one_key_in_a_list_is_the_key(settings):
    assert replace(settings, text_key=("text",), id_key=("id",)).sha256 == replace(settings, id_key="id").sha256
    assert replace(settings, text_key=("text",), id_key=()).sha256 == settings.sha256
    orders = [replace(settings, text_key=keys).sha256 for keys in (("a", "b"), ("b", "a"), "a", "a b", ("a", "b", "c"))]
    assert len(set(orders)) == 5


def test_datasets_whose_ids_have_other_names_are_merged(two_kinds, tmp_path, settings):
    made = [
        make([file], tmp_path / f"out{i}", replace(settings, text_key=text, id_key=id_))
        for i, (file, text, id_) in enumerate(zip(two_kinds, ("text", "body", "text"), ("id", "doc_id", "id"), strict=True))
    ]
    merged = merge([dataset.path for dataset in made], tmp_path / "merged")
    assert ids_of(merged) == ["1", "2", "x", "y", "c.txt"] and merged.manifest.id_key == "id or doc_id"
    assert merge([made[0].path, made[2].path], tmp_path / "same").manifest.id_key == "id"
    without = make(two_kinds[:1], tmp_path / "without", settings)
    with pytest.raises(DatasetError, match=r"without has no ids, .*out0 has \('id'\): build both with --id-key, or both without"):
        merge([made[0].path, without.path], tmp_path / "refused")
