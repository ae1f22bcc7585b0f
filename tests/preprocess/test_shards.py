"""Shards: the plan, bad input, idempotence, the same bytes for any number of workers, killed workers."""

from __future__ import annotations

import base64
import json
import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.spans import align
from megatron_vocagno.errors import ChangedError, CorpusError, DatasetError
from megatron_vocagno.preprocess import long_texts, shard_writer, shards
from megatron_vocagno.preprocess.plan import plan
from megatron_vocagno.preprocess.shards import make_shard
from megatron_vocagno.preprocess.workers import run_local
from tests.corpus.conftest import contents, make, write_jsonl
from tests.tokenizers_for_tests import mistral_tokenizer_path


def line(text) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


# ---- bad lines

BAD = {
    b'{"text": "cut off\n': "invalid JSON",
    b'{"body": "x"}\n': "no key 'text' (it has 'body')",
    b'{"text": "\xff\xfe"}\n': "invalid UTF-8 at byte 10",
}


@pytest.fixture
def mixed(tmp_path):
    """Good lines, each bad line once, empty documents, blank lines, CRLF, a BOM, NaN in another key."""
    good = [b"\xef\xbb\xbf" + line("with a BOM"), line("one"), b'{"text": "two", "score": NaN}\r\n', b"\n", b"  \n"]
    lines = [*good, *BAD, line(""), line(""), line("last").rstrip(b"\n")]
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"".join(lines))
    return file


def test_bad_lines_stop_the_build_at_file_and_line(mixed, settings, tmp_path):
    with pytest.raises(CorpusError, match=rf"{mixed}:6:\d+: invalid JSON.*\n.*--on-bad-line"):
        make([mixed], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["skip", "quarantine"])
def test_bad_lines_are_counted_and_left_out(mode, mixed, settings, tmp_path, student):
    ds = make([mixed], tmp_path / "out", replace(settings, on_bad_line=mode), shard_bytes=120)
    assert (ds.totals.documents, ds.totals.bad_lines, ds.totals.empty_documents) == (4, len(BAD), 2)
    expected = [t.ids.tolist() for t in student.encode_batch(["with a BOM", "one", "two", "last"])]
    assert [ds.student(i)[:-1].tolist() for i in range(4)] == expected
    files = sorted((tmp_path / "out").rglob("quarantine.jsonl"))
    rows = [json.loads(row) for file in files for row in file.read_bytes().splitlines()]
    if mode == "skip":
        assert not rows
        return
    assert [base64.b64decode(row["raw_base64"]) + b"\n" for row in rows] == list(BAD)
    assert [(row["file"], row["line"]) for row in rows] == [("mixed.jsonl", 6 + k) for k in range(len(BAD))]
    assert all(reason in row["reason"] for row, reason in zip(rows, BAD.values(), strict=True))
    ds.verify()


def test_files_of_one_name_are_told_apart(settings, tmp_path):
    files = []
    for year in ("2023", "2024"):
        (tmp_path / "in" / year).mkdir(parents=True)
        files.append(tmp_path / "in" / year / "part.jsonl")
        files[-1].write_bytes(line("good") + b"[]\n")
    make(files, tmp_path / "out", replace(settings, on_bad_line="quarantine"))
    rows = [json.loads(row) for row in (tmp_path / "out/shards/0000/quarantine.jsonl").read_bytes().splitlines()]
    assert [row["file"] for row in rows] == ["2023/part.jsonl", "2024/part.jsonl"]


@pytest.mark.parametrize(("slices", "endless"), [(1 << 17, ""), (700, ""), (700, "a" * 1500)])
def test_a_long_document_with_an_underscore_of_sentencepiece_is_placed_by_offsets(
    slices, endless, settings, texts, tmp_path, monkeypatch
):
    """U+2581 is a space to the student's tokenizer, and three bytes in the text. In slices; and if a slice has other tokens."""
    mixed = replace(settings, student=str(mistral_tokenizer_path()))
    monkeypatch.setattr(long_texts, "OFFSET_CHARACTERS", slices)
    monkeypatch.setattr(long_texts, "PART_CHARACTERS", 4000)
    monkeypatch.setattr(shard_writer, "PART_CHARACTERS", 4000)
    monkeypatch.setattr(shard_writer, "BATCH_BYTES", 4000)
    prose = "\n".join(texts[:4])[:20_000]
    document = prose[:9000] + f" ▁x▁ {endless} " + prose[9000:]
    ds = make([write_jsonl(tmp_path / "a.jsonl", [prose, document, "last"])], tmp_path / "out", mixed)
    assert (ds.totals.documents, ds.totals.offset_documents, ds.totals.mismatched_documents) == (3, 1, 0)
    assert ds.totals.covered_tokens == ds.totals.mapped_tokens
    student, teacher = mixed.tokenizers
    [s], [t] = student.encode_batch([document]), teacher.encode_batch([document])
    assert s.ends_from == "offsets" and ds.student(1)[:-1].tolist() == s.ids.tolist()
    spans = align(s, t)
    assert np.array_equal(ds.spans(1).first[:-1], spans.first) and np.array_equal(ds.spans(1).last[:-1], spans.last)
    ds.verify()


def test_a_document_whose_tokens_do_not_cover_it_is_quarantined(settings, tmp_path):
    """A teacher that normalizes to NFC by itself reads other bytes than the student when the corpus does not."""
    folder = tmp_path / "nfc"
    folder.mkdir()
    raw = json.loads((Path(settings.teacher) / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": {"type": "NFC"}}))
    texts = ["plain", unicodedata.normalize("NFD", "각각 가각 é"), "é"]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    own = replace(settings, teacher=str(folder), teacher_eos="</s>")
    ds = make([file], tmp_path / "raw", replace(own, nfc=False))
    assert (ds.totals.documents, ds.totals.mismatched_documents) == (2, 1)
    (row,) = [json.loads(r) for r in (tmp_path / "raw/shards/0000/quarantine.jsonl").read_bytes().splitlines()]
    assert row["line"] == 2 and "the teacher's tokens hold" in row["reason"]
    # normalized once, before both, it is a document like any other
    assert make([file], tmp_path / "nfc-first", own).totals.documents == 3


def test_texts_are_nfc_unless_told_otherwise(settings, tmp_path, student):
    decomposed = unicodedata.normalize("NFD", "café")
    file = write_jsonl(tmp_path / "a.jsonl", [decomposed])
    for nfc, text in ((True, "café"), (False, decomposed)):
        ds = make([file], tmp_path / str(nfc), replace(settings, nfc=nfc))
        assert ds.student(0)[:-1].tolist() == student.encode_batch([text])[0].ids.tolist()
        assert ds.totals.text_bytes == len(text.encode()) and ds.manifest.nfc == nfc


def test_a_shard_without_documents_is_legal_a_dataset_is_not(settings, tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts) for i, texts in enumerate((["one"], ["", ""], ["two", ""]))]
    ds = make(files, tmp_path / "out", settings, shard_bytes=20)
    assert len(ds.manifest.shards) > 2 and len(ds) == 2 and ds.totals.empty_documents == 3
    assert any(set(shard.files) == {"shard.json"} for shard in ds.manifest.shards)
    ds.verify()
    with pytest.raises(DatasetError, match="no document is left: 2 were empty"):
        make([files[1]], tmp_path / "none", settings)
    assert not (tmp_path / "none" / "dataset.json").exists()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DatasetError, match="no document was read: the input files are empty"):
        make([tmp_path / "empty.jsonl"], tmp_path / "none2", settings)
    assert not (tmp_path / "none2" / "dataset.json").exists()


# ---- again


def test_a_second_run_reuses_and_a_third_repairs(settings, texts, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", texts[:12])
    seen = []
    ds = make([file], tmp_path / "out", settings, shard_bytes=8_000, on_shard=seen.append)
    before = contents(tmp_path / "out")
    assert len(seen) > 2 and not any(r.reused for r in seen)
    seen.clear()
    # the same bytes under another name
    again = make([file.rename(tmp_path / "b.jsonl")], tmp_path / "out", settings, shard_bytes=8_000, on_shard=seen.append)
    assert all(r.reused for r in seen) and again.fingerprint == ds.fingerprint and contents(tmp_path / "out") == before
    seen.clear()
    (tmp_path / "out/shards/0001/spans.bin").write_bytes(b"")
    file = (tmp_path / "b.jsonl").rename(tmp_path / "a.jsonl")
    make([file], tmp_path / "out", settings, shard_bytes=8_000, on_shard=seen.append)
    assert [r.reused for r in seen] == [i != 1 for i in range(len(seen))] and contents(tmp_path / "out") == before


def test_a_foreign_folder_is_not_written_to(settings, texts, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    file = write_jsonl(tmp_path / "a.jsonl", texts[:1])
    with pytest.raises(ChangedError, match="is not empty and contains no dataset"):
        make([file], tmp_path, settings)
    with pytest.raises(ChangedError, match="is a file"):
        make([file], file, settings)


def test_nothing_half_written_is_left_when_writing_fails(settings, texts, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts[:6])

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "hash_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        make([file], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    # alone too, as an engine calls it
    with pytest.raises(OSError, match="No space"):
        make_shard(plan([file], settings).jobs(str(tmp_path / "out"), settings)[0])
    assert not list((tmp_path / "out" / "shards").iterdir())


def test_a_shard_made_twice_at_once_is_made_once(settings, texts, tmp_path, monkeypatch):
    """Another worker publishes the same shard while this one writes."""
    file = write_jsonl(tmp_path / "a.jsonl", texts[:2])
    (job,) = plan([file], settings).jobs(str(tmp_path / "out"), settings)
    original = shards._publish

    def beaten(temporary, folder):
        monkeypatch.setattr(shards, "_publish", original)
        make_shard(job)
        original(temporary, folder)

    monkeypatch.setattr(shards, "_publish", beaten)
    assert not make_shard(job).reused
    assert make_shard(job).reused
    assert [f.name for f in (tmp_path / "out" / "shards").iterdir()] == ["0000"]


# ---- workers


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_workers(built, corpus, settings, tmp_path):
    make([corpus], tmp_path / "two", settings, engine=partial(run_local, workers=2), shard_bytes=100_000)
    assert contents(tmp_path / "two") == contents(built.path)


@pytest.mark.slow
def test_an_error_in_a_worker_arrives_whole(mixed, settings, tmp_path):
    two = partial(run_local, workers=2)
    with pytest.raises(CorpusError, match=rf"{mixed}:6:\d+: invalid JSON") as error:
        make([mixed, mixed], tmp_path / "out", settings, engine=two, shard_bytes=mixed.stat().st_size)
    assert "2 of 2 shards" in str(error.value) and not (tmp_path / "out").exists()


def test_the_dataset_can_be_opened_elsewhere(built, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(built.path)
    assert len(AlignedDataset.open(moved)) == len(built)
