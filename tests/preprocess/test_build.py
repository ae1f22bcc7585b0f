"""Whole builds: job arrays, what is reused and what is refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.places import place
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.errors import ChangedError, CorpusError
from megatron_vocagno.preprocess import shards
from megatron_vocagno.preprocess.build import build, finish
from megatron_vocagno.preprocess.plan import Slice
from megatron_vocagno.preprocess.shards import BuildConfig
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents, make, write_jsonl
from tests.corpus.formats import CONTAINERS, lines, parquet, write
from tests.preprocess.test_build_dataset import arguments, finished, start

SHORT = real.multilingual_texts() + [text for text in real.awkward_texts() if len(text) < 300]
SHARD = 100_000


@pytest.fixture
def copy(built, corpus, tmp_path) -> tuple[Path, Path]:
    """A copy of the corpus, and of its dataset in five shards."""
    shutil.copytree(built.path, tmp_path / "out")
    shutil.copy2(corpus, tmp_path)
    return tmp_path / corpus.name, tmp_path / "out"


def reuse(inputs: list[Path], out: Path, settings: BuildConfig, **options: Any) -> list[bool]:
    """Builds, and tells of each shard whether it was reused."""
    seen: list[Any] = []
    build(inputs, out, settings, on_shard=seen.append, **options)
    assert AlignedDataset.open(out)
    return [result.reused for result in sorted(seen, key=lambda result: result.job.index)]


# ---- job arrays


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_slices_in_any_order_and_finalize_give_the_bytes_of_one_build(n, built, corpus, settings, tmp_path):
    tasks = random.Random(n).sample(range(1, n + 1), n)
    for i in tasks:
        build([corpus], tmp_path / "out", settings, shard_bytes=SHARD, part=Slice(i, n))
        assert not (tmp_path / "out/dataset.json").exists()
    finish(tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(built.path)


def test_tasks_of_different_arrays_add_up(built, corpus, settings, tmp_path):
    made: list[Any] = []
    for part in (Slice(1, 2), Slice(2, 3), Slice(1, 3), Slice(3, 3)):
        build([corpus], tmp_path / "out", settings, shard_bytes=SHARD, part=part, on_shard=made.append)
    finish(tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(built.path)
    assert sorted(r.job.index for r in made if not r.reused) == [0, 1, 2, 3, 4] and sum(r.reused for r in made) == 3


@pytest.mark.slow
def test_two_tasks_at_once_give_the_bytes_of_one_build(built, corpus, settings, tmp_path):
    call = partial(arguments, settings, corpus, out=tmp_path / "out", shard_mb=SHARD / 2**20, workers=1)
    for code, out, err in map(finished, [start(call(shards=f"{i}/2")) for i in (1, 2)]):
        assert (code, err) == (0, "") and "of 2 is done" in out
    finish(tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(built.path)


def test_finalize_names_what_is_missing(corpus, settings, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match="has no plan"):
        finish(out, settings)
    build([corpus], out, settings, shard_bytes=SHARD, part=Slice(1, 3))
    with pytest.raises(CorpusError, match=r"3 of 5 shards .*: 0001, 0002, 0004"):
        finish(out, settings)
    build([corpus], out, settings, shard_bytes=SHARD, part=Slice(2, 3))
    build([corpus], out, settings, shard_bytes=SHARD, part=Slice(3, 3))
    (out / "shards/0003/teacher.bin").write_bytes(b"short")
    with pytest.raises(CorpusError, match=r"1 of 5 shards are missing: 0003\."):
        finish(out, settings)
    assert not (out / "dataset.json").exists()


def test_finalize_with_another_tokenizer_is_refused(corpus, settings, tmp_path):
    build([corpus], tmp_path / "out", settings, shard_bytes=SHARD, part=Slice(1, 1))
    other = replace(settings, teacher=settings.student)
    fingerprints = [open_tokenizer(path, "huggingface").fingerprint for path in (settings.teacher, settings.student)]
    with pytest.raises(ChangedError, match=f"--teacher {fingerprints[0]}.* then, {fingerprints[1]}.* now"):
        finish(tmp_path / "out", other)
    assert not (tmp_path / "out/dataset.json").exists()


def test_an_input_that_changes_between_tasks_is_refused(copy, settings, tmp_path):
    file, _ = copy
    build([file], tmp_path / "new", settings, shard_bytes=SHARD, part=Slice(1, 2))
    in_place(file, 0)
    with pytest.raises(ChangedError, match=r"input has changed since another task"):
        build([file], tmp_path / "new", settings, shard_bytes=SHARD, part=Slice(2, 2))
    write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ChangedError):
        build([file, tmp_path / "empty.jsonl"], tmp_path / "new", settings, shard_bytes=SHARD, part=Slice(2, 2))
    with pytest.raises(CorpusError, match="0001, 0003"):
        finish(tmp_path / "new", settings)


def test_force_is_for_whole_builds(copy, settings):
    file, out = copy
    with pytest.raises(CorpusError, match="--force with --shards"):
        build([file], out, settings, shard_bytes=SHARD // 2, part=Slice(1, 2), force=True)


# ---- refused


def in_place(file: Path, k: int) -> None:
    """Other words in the k-th fifth of the file; the same size and the same line ends."""
    data = file.read_bytes()
    a, b = len(data) * k // 5, len(data) * (k + 1) // 5
    changed = re.sub(rb" (the|and|was|not) ", lambda m: b" %s " % m[1].upper(), data[a:b])
    assert changed != data[a:b]
    file.write_bytes(data[:a] + changed + data[b:])


CHANGES: dict[str, Callable[[Path], object]] = {
    "changed in place": lambda file: in_place(file, 2),
    "shorter": lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:-1])),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b'{"text": "more"}\n'),
    "in another order": lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(True)[::-1])),
    "empty": lambda file: file.write_bytes(b""),
}
OTHER: dict[str, Callable[[BuildConfig], dict[str, Any]]] = {
    "tokenizer": lambda s: {"settings": replace(s, teacher=s.student)},
    "end of text": lambda s: {"settings": replace(s, teacher_eos="<|im_end|>")},
    "key": lambda s: {"settings": replace(s, text_key="body")},
    "id": lambda s: {"settings": replace(s, id_key="text")},
    "nfc": lambda s: {"settings": replace(s, nfc=False)},
    "cuts": lambda s: {"shard_bytes": SHARD // 2},
    "number of documents": lambda s: {"max_documents": 60},
}


HASHES = r"[0-9a-f]{64}.*[0-9a-f]{64}"
SIZES = r"of [\d,]+ bytes then, corpus\.jsonl of [\d,]+ bytes now"
SAID = {
    "changed in place": HASHES,
    "shorter": SIZES,
    "longer": SIZES,
    "empty": SIZES,
    "in another order": "split differently: did their lines",
}
SAID |= {"tokenizer": f"--teacher {HASHES}", "end of text": r"--teacher-eos </s> then, <\|im_end\|> now"}
SAID |= {"key": "--text-key text then, body now", "id": "--id-key none then, text now", "nfc": "--no-nfc absent then, given now"}
SAID |= {
    "cuts": "split differently",
    "number of documents": "split differently",
}


@pytest.mark.parametrize("what", [*CHANGES, *OTHER])
def test_what_was_made_otherwise_is_refused_every_time_until_it_is_forced(what, copy, settings, tmp_path):
    """A refused run must not vouch for the shards that lie there."""
    file, out = copy
    before, original = contents(out), file.read_bytes()
    options: dict[str, Any] = {"settings": settings, "shard_bytes": SHARD}
    if what in CHANGES:
        CHANGES[what](file)
    else:
        options |= OTHER[what](settings)
    for _ in range(3):
        with pytest.raises(ChangedError, match="--force") as error:
            build([file], out, **options)
        assert re.search(SAID[what], str(error.value))
    assert contents(out) == before
    changed = file.read_bytes()
    file.write_bytes(original)
    assert all(reuse([file], out, settings, shard_bytes=SHARD)) and contents(out) == before
    if what not in ("empty", "key"):  # these leave no document
        file.write_bytes(changed)
        for folder in (out, tmp_path / "fresh"):
            build([file], folder, **options, force=True)
        assert contents(out) == contents(tmp_path / "fresh") != before


def test_shards_that_nobody_planned_are_refused(copy, settings):
    """The plan may be deleted; then each shard speaks for itself."""
    file, out = copy
    shutil.rmtree(out / ".build")
    with pytest.raises(ChangedError, match=r"shards/0003 is not part of this plan of 3 shards"):
        build([file], out, settings, shard_bytes=2 * SHARD)
    with pytest.raises(ChangedError, match=r"shards/000\d was made from other parts of the input"):
        build([file], out, settings, shard_bytes=SHARD * 4 // 5)
    other = replace(settings, nfc=False)
    with pytest.raises(ChangedError, match=f"0000 was made from other settings.*{settings.sha256}.*{other.sha256}"):
        build([file], out, other, shard_bytes=SHARD)
    in_place(file, 4)
    with pytest.raises(ChangedError, match=r"shards/000[34] was made from other input"):
        build([file], out, settings, shard_bytes=SHARD)


# ---- bad records


@pytest.fixture
def with_bad_records(tmp_path) -> Path:
    """Seven lines of one size, two per shard (`shard_bytes` 42). The fifth, in 0002, is bad."""
    good = [json.dumps({"text": f"a line {i}"}) for i in range(6)]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(line + "\n" for line in (*good[:4], "this line is no JSON", *good[4:])))
    return file


POLICIES = ("error", "skip", "quarantine")


@pytest.mark.parametrize("then", POLICIES)
@pytest.mark.parametrize("now", ["skip", "quarantine"])
def test_another_way_with_bad_records_keeps_the_shards_without_any(then, now, with_bad_records, settings, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    if then == "error":
        with pytest.raises(CorpusError, match="--on-bad-line skip to drop such records"):
            build([with_bad_records], out, settings, shard_bytes=42)
    else:
        build([with_bad_records], out, replace(settings, on_bad_line=then), shard_bytes=42)
    finished_shards = contents(out)
    assert sum(name.endswith("shard.json") for name in finished_shards) == (3 if then == "error" else 4)
    again = partial(reuse, [with_bad_records], out, replace(settings, on_bad_line=now), shard_bytes=42)
    if then not in ("error", now):
        said = f"shards/0002 has 1 bad record and was made with --on-bad-line {then}, {now} now"
        for _ in range(2):
            with pytest.raises(ChangedError, match=f"{said}.*--force"):
                again()
        assert contents(out) == finished_shards
    assert again(force=then not in ("error", now)) == [True, True, then == now, True]
    build([with_bad_records], fresh, replace(settings, on_bad_line=now), shard_bytes=42)
    assert contents(out) == contents(fresh)
    assert [name for name in contents(out) if "quarantine" in name] == ["shards/0002/quarantine.jsonl"] * (now == "quarantine")


def test_without_bad_records_a_dataset_has_the_same_bytes_for_each_way_with_them(copy, settings):
    file, out = copy
    before = contents(out)
    for policy in POLICIES[1:]:
        assert all(reuse([file], out, replace(settings, on_bad_line=policy), shard_bytes=SHARD))
        assert all(reuse([file], out, replace(settings, on_bad_line=policy), shard_bytes=SHARD, force=True))
        for part in (1, 2):
            options = {"shard_bytes": SHARD, "part": Slice(part, 2)}
            build([file], out.with_name(policy), replace(settings, on_bad_line=POLICIES[part]), **options)
        finish(out.with_name(policy), replace(settings, on_bad_line=policy))
        assert contents(out) == contents(out.with_name(policy)) == before


def test_a_shard_without_bad_records_of_an_older_release_is_kept(copy, settings):
    """It recorded the hash of its own --on-bad-line even then."""
    file, out = copy
    skip = replace(settings, on_bad_line="skip")
    for shard in (out / "shards").glob("*/shard.json"):
        shard.write_text(shard.read_text().replace(settings.sha256, skip.sha256))
    for each in (skip, settings):
        assert all(reuse([file], out, each, shard_bytes=SHARD))


def test_bad_records_that_were_left_out_are_an_error_again(with_bad_records, settings, tmp_path):
    build([with_bad_records], tmp_path / "out", replace(settings, on_bad_line="skip"), shard_bytes=42)
    with pytest.raises(ChangedError, match="0002 has 1 bad record and was made with --on-bad-line skip, error now"):
        build([with_bad_records], tmp_path / "out", settings, shard_bytes=42)


# ---- nothing was kept

CORRECTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "another file": lambda file: {"inputs": [file]},
    "fewer shards": lambda file: {"inputs": [file], "shard_bytes": 10**6},
    "of the same size": lambda file: {"inputs": [file.replace(file.with_name("empty.jsonl"))]},
    "settings": lambda file: {"inputs": [file.with_name("empty.jsonl")], "text_key": "body"},
}


@pytest.mark.parametrize("what", CORRECTIONS)
def test_a_build_that_kept_no_document_may_be_corrected_in_the_same_folder(what, settings, tmp_path):
    out, lines = tmp_path / "out", [{"text": "", "body": f"line {i}"} for i in range(6)]
    (tmp_path / "empty.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"body": "", "text": line["body"]}) + "\n" for line in lines))
    for _ in range(2):
        with pytest.raises(CorpusError, match="no document is left"):
            build([tmp_path / "empty.jsonl"], out, settings, shard_bytes=70)
    assert len(list((out / "shards").iterdir())) > 1
    corrected = {"shard_bytes": 70} | CORRECTIONS[what](tmp_path / "good.jsonl")
    new = replace(settings, text_key=corrected.pop("text_key", "text"))
    assert not any(reuse(out=out, settings=new, **corrected))
    assert contents(out) == contents(make(out=tmp_path / "fresh", settings=new, **corrected).path)


def test_one_kept_document_is_enough_to_refuse_other_input(settings, tmp_path):
    build([write_jsonl(tmp_path / "a.jsonl", ["", "", "", "kept"])], tmp_path / "out", settings, shard_bytes=20)
    with pytest.raises(ChangedError, match="other input"):
        build([write_jsonl(tmp_path / "b.jsonl", ["more text"])], tmp_path / "out", settings, shard_bytes=20)


# ---- reused


@pytest.fixture
def files_read(monkeypatch) -> list[str]:
    """Names of the input files that are read."""
    names: list[str] = []
    original = shards.read

    def noting(piece, *rest):
        names.append(place(piece.url).name)
        return original(piece, *rest)

    monkeypatch.setattr(shards, "read", noting)
    return names


def test_an_input_that_was_not_touched_is_not_read_again(settings, tmp_path, files_read):
    file = write_jsonl(tmp_path / "a.jsonl", SHORT)
    again = partial(reuse, [file], tmp_path / "out", settings, shard_bytes=1000)
    assert not any(again()) and len(files_read) > 3
    n_shards, before = len(files_read), contents(tmp_path / "out")
    files_read.clear()
    assert all(again()) and not files_read
    os.utime(file)  # touched, but the same: read again, and then trusted
    assert all(again()) and len(files_read) == n_shards
    files_read.clear()
    assert all(again()) and not files_read
    # trusted by size and time, for better or worse
    stat, data = file.stat(), file.read_bytes()
    file.write_bytes(data.replace(b"the", b"THE"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert all(again()) and not files_read
    # not where the plan is gone
    shutil.rmtree(tmp_path / "out/.build")
    with pytest.raises(ChangedError, match="other input"):
        again()
    file.write_bytes(data)
    files_read.clear()
    assert all(again()) and len(files_read) == n_shards and contents(tmp_path / "out") == before


def test_a_moved_input_is_the_same_one(copy, settings, files_read, tmp_path):
    file, out = copy
    before = contents(out)
    (tmp_path / "elsewhere").mkdir()
    assert all(reuse([file.rename(tmp_path / "elsewhere/renamed")], out, settings, shard_bytes=SHARD))
    assert len(files_read) == 5 and contents(out) == before


@pytest.mark.parametrize("k", [0, 3, 4])
def test_force_makes_anew_what_changed_and_no_more(k, copy, settings, tmp_path):
    file, out = copy
    data = file.read_bytes()
    (piece,) = json.loads((out / f"shards/{k:04}/shard.json").read_bytes())["pieces"]
    at = data.index(b" the ", piece[1])
    file.write_bytes(data[:at] + b" THE " + data[at + 5 :])
    assert reuse([file], out, settings, shard_bytes=SHARD, force=True) == [i != k for i in range(5)]
    fresh = make([file], tmp_path / "fresh", settings, shard_bytes=SHARD)
    assert contents(out) == contents(fresh.path)


def test_with_more_files_the_old_shards_are_reused(copy, texts, settings, tmp_path):
    file, out = copy
    more = write_jsonl(tmp_path / "more.jsonl", texts[:40])
    with pytest.raises(ChangedError, match=r"5 shards then, \d now"):
        build([file, more], out, settings, shard_bytes=SHARD)
    reused = reuse([file, more], out, settings, shard_bytes=SHARD, force=True)
    assert reused[:4] == [True] * 4 and not any(reused[5:]) and len(reused) > 5
    assert contents(out) == contents(make([file, more], tmp_path / "fresh", settings, shard_bytes=SHARD).path)
    # and fewer: shards of the longer plan go
    assert reuse([file], out, settings, shard_bytes=SHARD, force=True)[:4] == [True] * 4
    assert len(list((out / "shards").iterdir())) == 5


# ---- how much is bad, and how much is taken


def test_the_bad_fraction_is_exact_at_its_edge(settings, tmp_path):
    rows = [{"text": "good" if i >= 29 else None} for i in range(99)] + [{"text": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skip = replace(settings, on_bad_line="skip")
    run = partial(reuse, [tmp_path / "a.jsonl"], tmp_path / "out", skip, shard_bytes=500)
    for fraction in (0, 0.2899):
        with pytest.raises(CorpusError, match=r"29 of 100 records are bad \(29.00%\); --max-bad-fraction allows"):
            run(max_bad_fraction=fraction)
        assert not (tmp_path / "out/dataset.json").exists()
    assert all(run(max_bad_fraction=0.29))
    good = write_jsonl(tmp_path / "good.jsonl", ["good", ""])
    assert reuse([good], tmp_path / "good", skip, max_bad_fraction=0) == [False]


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet"])
def test_the_first_so_many_records_are_taken(kind, settings, tmp_path):
    """A bad record and an empty one are records."""
    texts: list[str | None] = [*SHORT, *SHORT]
    texts[5], texts[9], n = None, "", len(texts)
    data = b"".join(json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(texts))
    if kind == "parquet":
        data = parquet({"text": texts, "id": list(range(n))}, row_group_size=11)
    file = write(tmp_path / f"a.{kind}", CONTAINERS["gzip", ".gz"](data) if kind == "gz" else data)
    both = replace(settings, on_bad_line="skip", id_key="id")
    for shard_bytes in (10**9, 1500):
        for k in (1, 6, 7, 23, n - 1, n, n + 1):
            out = tmp_path / f"{shard_bytes}-{k}"
            ds = make([file, file], out, both, shard_bytes=shard_bytes, max_documents=k)
            expected = [str(i % n) for i in range(k) if i % n not in (5, 9)]
            assert [ds.id(i) for i in range(len(ds))] == expected
            assert ds.totals.documents + ds.totals.bad_lines + ds.totals.empty_documents == k
    assert k > n and (kind == "gz" or len(ds.manifest.shards) > 3)


def test_ids_come_back_with_their_documents(settings, tmp_path, student):
    ids = ["a", 7, "ü/1 中", "", -3, 2**63, "x" * 5000]
    texts = ["one", "two", "", "three", "four", "five", "six"]
    rows = [{"text": text, "key": id_} for id_, text in zip(ids, texts, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": texts, "key": list(map(str, ids))}
    write(tmp_path / "a.parquet", parquet(columns, row_group_size=2))
    keyed = replace(settings, id_key="key")
    for name, shard_bytes in (("a.jsonl", 10**9), ("a.jsonl", 60), ("a.parquet", 100)):
        ds = make([tmp_path / name], tmp_path / f"{name}-{shard_bytes}", keyed, shard_bytes=shard_bytes)
        assert [ds[i].id for i in range(len(ds))] == [str(id_) for id_, text in zip(ids, texts, strict=True) if text]
        assert ds.student(2).tolist()[:-1] == student.encode_batch(["three"])[0].ids.tolist()
        ds.verify()
    plain = make([tmp_path / "a.jsonl"], tmp_path / "plain", settings)
    assert plain[0].id == "" and not list(plain.path.rglob("ids.*"))


def test_every_container_gives_the_same_files(settings, tmp_path):
    keyed = replace(settings, id_key="id")
    names = {name: tmp_path / f"{i}.jsonl{name[1]}" for i, name in enumerate(CONTAINERS)}
    files = {name: write(file, CONTAINERS[name](lines(SHORT))) for name, file in names.items()}
    columns = {"text": SHORT, "id": list(range(len(SHORT)))}
    files["parquet", ""] = write(tmp_path / "a.parquet", parquet(columns, row_group_size=7))
    expected = tokens(make([files.pop(("plain", ""))], tmp_path / "plain", keyed, shard_bytes=10**9).path)
    assert len(expected) == 10 and len(files) > 12
    for i, (name, file) in enumerate(files.items()):
        assert tokens(make([file], tmp_path / f"out{i}", keyed, shard_bytes=10**9).path) == expected, name
    # one document a file
    for i, text in enumerate(SHORT):
        write(tmp_path / f"texts/{i:03}.txt", text.encode())
    texts = make(sorted((tmp_path / "texts").iterdir()), tmp_path / "texts-out", settings, shard_bytes=10**9)
    assert tokens(texts.path) == {name: data for name, data in expected.items() if "ids." not in name}


def tokens(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith((".bin", ".idx"))}


# ---- what fails leaves nothing


def test_a_plan_that_fails_leaves_no_folder(settings, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    for file in (tmp_path / "a.zip", tmp_path / "missing.jsonl"):
        with pytest.raises(CorpusError):
            build([file], tmp_path / "out", settings)
        assert not (tmp_path / "out").exists()
