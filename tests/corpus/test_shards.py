"""Shards: the plan, bad input, idempotence, the same bytes for any number of workers, killed workers."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vocagno.corpus import CorpusError, shards, workers
from megatron_vocagno.corpus.dataset import AlignedDataset, DatasetError
from megatron_vocagno.corpus.documents import BATCH_BYTES, InputError, Line, Piece, batches
from megatron_vocagno.corpus.shards import ChangedError, Settings, build, make_shard, plan
from megatron_vocagno.corpus.workers import WorkerError, run_local
from tests.corpus.conftest import contents, write_jsonl


def line(text) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


# ---- the plan


def test_pieces_are_whole_lines_and_all_of_them(tmp_path):
    cuts = 0
    for n, shard_bytes in ((0, 10), (1, 10), (200, 50), (200, 333), (200, 10**9)):
        data = b"".join(line("x" * (i * 37 % 90)) for i in range(n))
        for ending in (b"", b"no line end"):
            file = tmp_path / "a.jsonl"
            file.write_bytes(data + ending)
            jobs = plan([file], tmp_path / "out", Settings("s", "t"), shard_bytes)
            pieces = [p for job in jobs for p in job.pieces]
            assert b"".join(b"".join(p.lines()) for p in pieces) == data + ending
            assert all(raw.endswith(b"\n") for p in pieces[:-1] for raw in p.lines())
            read = [raw for p in pieces for raw in p.lines()]
            assert read == (data + ending).splitlines(keepends=True)
            first_lines = [sum(q.start <= p.start and q is not p for q in pieces) for p in pieces]
            assert len(set(first_lines)) == len(pieces)
            cuts += len(pieces)
    assert cuts > 50


def test_line_numbers_hold_in_every_piece(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(line(str(i)) for i in range(300)))
    met = 0
    for job in plan([file], tmp_path, Settings("s", "t"), 200):
        for piece in job.pieces:
            for k, raw in enumerate(piece.lines()):
                assert json.loads(raw)["text"] == str(piece.first_line + k - 1)
                met += piece.start > 0
    assert met > 200


def test_small_files_share_a_shard_in_their_order(tmp_path):
    files = [write_jsonl(tmp_path / f"{i:02}.jsonl", ["x" * 10]) for i in range(20)]
    jobs = plan(files, tmp_path, Settings("s", "t"), 100)
    assert [p.path for job in jobs for p in job.pieces] == files
    assert all(job.n_bytes <= 100 for job in jobs) and len(jobs) == 5


def test_batches_hold_everything_and_stay_small():
    piece = Piece(Path("x"), 0, 0)
    sizes = [10, BATCH_BYTES // 2, BATCH_BYTES // 2, 3 * BATCH_BYTES, 5, 7]
    items = [(Line(piece, i, b"x" * n), "t") for i, n in enumerate(sizes)]
    made = list(batches(items))
    assert [item for batch in made for item in batch] == items
    assert [len(batch) for batch in made] == [2, 1, 1, 2]


@pytest.mark.parametrize(("head", "name"), [(b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PAR1", "parquet")])
def test_other_formats_are_refused_by_content(head, name, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(head + b"...")
    with pytest.raises(InputError, match=name):
        plan([tmp_path / "a.jsonl"], tmp_path, Settings("s", "t"))


# ---- bad lines

BAD = {
    b'{"text": "cut off\n': "invalid JSON",
    b"[1, 2]\n": "a JSON list, not an object",
    b'{"body": "x"}\n': "no key 'text' (it has 'body')",
    b'{"text": 5}\n': "'text' is a int, not a string",
    b'{"text": null}\n': "'text' is a NoneType",
    b'{"text": "\xff\xfe"}\n': "invalid UTF-8 at byte 10",
    b'{"text": "a \\ud800 b"}\n': "a lone surrogate at character 2",
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
    with pytest.raises(InputError, match=rf"{mixed}:6: invalid JSON.*\n.*--on-bad-line"):
        build([mixed], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("raw", BAD)
def test_the_reason_of_each_bad_line_is_named(raw, settings, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line("good") + raw)
    with pytest.raises(InputError) as error:
        build([tmp_path / "a.jsonl"], tmp_path / "out", settings)
    assert f"a.jsonl:2: {BAD[raw][:20]}" in str(error.value) and BAD[raw] in str(error.value)


@pytest.mark.parametrize("mode", ["skip", "quarantine"])
def test_bad_lines_are_counted_and_left_out(mode, mixed, settings, tmp_path, mistral):
    ds = build([mixed], tmp_path / "out", replace(settings, on_bad_line=mode), shard_bytes=120)
    assert (ds.totals.documents, ds.totals.bad_lines, ds.totals.empty_documents) == (4, len(BAD), 2)
    expected = [t.ids.tolist() for t in mistral.encode_batch(["with a BOM", "one", "two", "last"])]
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


def test_a_document_whose_tokens_do_not_cover_it_is_quarantined(settings, smollm2_folder, tmp_path):
    """A teacher that normalises to NFC by itself reads other bytes than the student when the corpus does not."""
    folder = tmp_path / "nfc"
    folder.mkdir()
    raw = json.loads((smollm2_folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"normalizer": {"type": "NFC"}}))
    texts = ["plain", unicodedata.normalize("NFD", "각각 가각 é"), "é"]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    own = replace(settings, teacher=str(folder), teacher_eos="<|im_end|>")
    ds = build([file], tmp_path / "raw", replace(own, nfc=False))
    assert (ds.totals.documents, ds.totals.mismatched_documents) == (2, 1)
    (row,) = [json.loads(r) for r in (tmp_path / "raw/shards/0000/quarantine.jsonl").read_bytes().splitlines()]
    assert row["line"] == 2 and "the teacher's tokens hold" in row["reason"]
    # normalised once, before both, it is a document like any other
    assert build([file], tmp_path / "nfc-first", own).totals.documents == 3


def test_texts_are_nfc_unless_told_otherwise(settings, tmp_path, mistral):
    decomposed = unicodedata.normalize("NFD", "café")
    file = write_jsonl(tmp_path / "a.jsonl", [decomposed])
    for nfc, text in ((True, "café"), (False, decomposed)):
        ds = build([file], tmp_path / str(nfc), replace(settings, nfc=nfc))
        assert ds.student(0)[:-1].tolist() == mistral.encode_batch([text])[0].ids.tolist()
        assert ds.totals.text_bytes == len(text.encode()) and ds.manifest.nfc == nfc


def test_a_shard_without_documents_is_legal_a_dataset_is_not(settings, tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts) for i, texts in enumerate((["one"], ["", ""], ["two", ""]))]
    ds = build(files, tmp_path / "out", settings, shard_bytes=20)
    assert len(ds.manifest.shards) > 2 and len(ds) == 2 and ds.totals.empty_documents == 3
    assert any(not shard.files for shard in ds.manifest.shards)
    ds.verify()
    with pytest.raises(DatasetError, match="no document is left: 2 were empty"):
        build([files[1]], tmp_path / "none", settings)
    assert not (tmp_path / "none" / "dataset.json").exists()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DatasetError, match="no document is left"):
        build([tmp_path / "empty.jsonl"], tmp_path / "none2", settings)
    assert not (tmp_path / "none2" / "dataset.json").exists()


# ---- again


def test_a_second_run_reuses_and_a_third_repairs(settings, texts, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", texts[:12])
    seen = []
    ds = build([file], tmp_path / "out", settings, shard_bytes=8_000, on_shard=seen.append)
    before = contents(tmp_path / "out")
    assert len(seen) > 2 and not any(r.reused for r in seen)
    seen.clear()
    # the same bytes under another name
    again = build([file.rename(tmp_path / "b.jsonl")], tmp_path / "out", settings, shard_bytes=8_000, on_shard=seen.append)
    assert all(r.reused for r in seen) and again.fingerprint == ds.fingerprint and contents(tmp_path / "out") == before
    seen.clear()
    (tmp_path / "out/shards/0001/spans.bin").write_bytes(b"")
    file = (tmp_path / "b.jsonl").rename(tmp_path / "a.jsonl")
    build([file], tmp_path / "out", settings, shard_bytes=8_000, on_shard=seen.append)
    assert [r.reused for r in seen] == [i != 1 for i in range(len(seen))] and contents(tmp_path / "out") == before


@pytest.mark.parametrize("what", ["tokenizer", "key", "nfc", "input", "plan"])
def test_other_settings_or_input_are_refused_unless_forced(what, settings, texts, tmp_path):
    rows = [json.dumps({"text": t, "body": t + "!"}) + "\n" for t in texts[:6]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(rows))
    assert len(build([file], tmp_path / "out", settings, shard_bytes=20_000).manifest.shards) > 1
    before = contents(tmp_path / "out")
    changed = {
        "tokenizer": replace(settings, teacher=settings.student),
        "key": replace(settings, text_key="body"),
        "nfc": replace(settings, nfc=False),
    }.get(what, settings)
    if what == "input":
        file.write_text("".join(rows[::-1]))
    shard_bytes = 10**9 if what == "plan" else 20_000
    with pytest.raises(ChangedError, match="--force") as error:
        build([file], tmp_path / "out", changed, shard_bytes=shard_bytes)
    if what in ("tokenizer", "key", "nfc"):
        assert changed.sha256 in str(error.value) and settings.sha256 in str(error.value)
    assert contents(tmp_path / "out") == before
    ds = build([file], tmp_path / "out", changed, shard_bytes=shard_bytes, force=True)
    build([file], tmp_path / "fresh", changed, shard_bytes=shard_bytes)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    ds.verify()


def test_a_foreign_folder_is_not_written_to(settings, texts, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    file = write_jsonl(tmp_path / "a.jsonl", texts[:1])
    with pytest.raises(ChangedError, match="is not empty and holds no dataset"):
        build([file], tmp_path, settings)
    with pytest.raises(ChangedError, match="is a file"):
        build([file], file, settings)


def test_nothing_half_written_is_left_when_writing_fails(settings, texts, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", texts[:6])

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "hash_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        build([file], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    # alone too, as an engine calls it
    with pytest.raises(OSError, match="No space"):
        make_shard(plan([file], tmp_path / "out", settings)[0])
    assert not list((tmp_path / "out" / "shards").iterdir())


def test_a_shard_made_twice_at_once_is_made_once(settings, texts, tmp_path, monkeypatch):
    """Another worker publishes the same shard while this one writes."""
    file = write_jsonl(tmp_path / "a.jsonl", texts[:2])
    (job,) = plan([file], tmp_path / "out", settings)
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
    build([corpus], tmp_path / "two", settings, workers=2, shard_bytes=100_000)
    assert contents(tmp_path / "two") == contents(built.path)


@pytest.mark.slow
def test_an_error_in_a_worker_arrives_whole(mixed, settings, tmp_path):
    with pytest.raises(InputError, match=rf"{mixed}:6: invalid JSON"):
        build([mixed, mixed], tmp_path / "out", settings, workers=2, shard_bytes=mixed.stat().st_size)
    assert not (tmp_path / "out").exists()


def die_once(job: tuple[Path, int]) -> int:
    """Killed at the first attempt at job 2, as by the kernel when memory runs out."""
    folder, i = job
    if i == 2 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), 9)
    return i * i


def fail(job: int) -> int:
    raise ZeroDivisionError(f"job {job}")


def die_always(job: int) -> int:
    os.kill(os.getpid(), 9)
    return job


@pytest.mark.slow
def test_a_killed_worker_is_replaced(tmp_path):
    assert sorted(run_local(die_once, [(tmp_path, i) for i in range(5)], 2)) == [0, 1, 4, 9, 16]
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_workers_that_always_die_end_the_build(tmp_path):
    with pytest.raises(WorkerError, match=r"3 workers were killed while they made shard \d of 2"):
        list(run_local(die_always, [1, 2], 2))
    assert issubclass(WorkerError, CorpusError)


@pytest.mark.slow
def test_an_error_brings_its_traceback_along_and_leaves_no_worker():
    with pytest.raises(ZeroDivisionError, match=r"job \d") as error:
        list(run_local(fail, [1, 2, 3], 2))
    assert any("in fail" in note for note in error.value.__notes__)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_killed_while_another_starts_costs_nothing(tmp_path, monkeypatch):
    """The moment at which a pool of concurrent.futures hangs."""
    hired = []
    original = workers._hire

    def hire(task):
        if len(hired) == 1:
            os.kill(hired[0][1].pid, 9)
        hired.append(original(task))
        return hired[-1]

    (tmp_path / "died").touch()
    monkeypatch.setattr(workers, "_hire", hire)
    assert sorted(run_local(die_once, [(tmp_path, i) for i in range(3)], 2)) == [0, 1, 4]
    assert len(hired) > 2


def test_the_dataset_can_be_opened_elsewhere(built, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(built.path)
    assert len(AlignedDataset.open(moved)) == len(built)
