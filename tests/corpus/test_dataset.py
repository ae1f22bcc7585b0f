"""A dataset says what the tokenizers say, in any slice; damage and other tokenizers are refused; merging copies no tokens."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from megatron_vocagno.corpus.create import create
from megatron_vocagno.corpus.dataset import AlignedDataset, merge
from megatron_vocagno.corpus.manifest import PAIRS, UNSEALED, read_manifest
from megatron_vocagno.corpus.spans import ANCHOR_EVERY, align
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.errors import CorpusError, DatasetError
from megatron_vocagno.preprocess.shards import BuildConfig
from tests.corpus.conftest import make, write_jsonl
from tests.datasets import invent_dataset


@pytest.fixture
def copy(built, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(built.path, tmp_path / "copy")


def test_documents_are_what_the_tokenizers_and_align_say(built, texts, mistral, smollm2):
    assert len(built) == len(texts) and len(built.manifest.shards) > 3
    unmapped = 0
    for i, (s, t) in enumerate(zip(mistral.encode_batch(texts), smollm2.encode_batch(texts), strict=True)):
        document, spans = built[i], align(s, t)
        assert document.student_ids.tolist() == [*s.ids.tolist(), mistral.eos_id]
        assert document.teacher_ids.tolist() == [*t.ids.tolist(), smollm2.eos_id]
        assert np.array_equal(document.spans.first[:-1], spans.first) and np.array_equal(document.spans.last[:-1], spans.last)
        assert document.spans.first[-1] == document.spans.last[-1] == len(t.ids)
        assert document.student_ids.dtype == document.spans.first.dtype == np.int32
        assert (built.student_lengths[i], built.teacher_lengths[i]) == (len(s.ids) + 1, len(t.ids) + 1)
        unmapped += int((~document.spans.mapped).sum())
    assert unmapped == built.totals.eos_tokens + built.totals.zero_width_tokens > len(texts)


def test_totals_are_those_of_the_documents(built, texts):
    t = built.totals
    assert (t.documents, t.text_bytes) == (len(texts), sum(len(text.encode()) for text in texts))
    assert (t.student_tokens, t.teacher_tokens) == (built.student_lengths.sum(), built.teacher_lengths.sum())
    assert t.covered_tokens == t.mapped_tokens == t.student_tokens - t.span_widths[0] > 100_000
    assert sum(t.span_widths) == t.student_tokens
    # every text token has its bytes in the stored tables, EOS none
    for side, table in ((built.student, built.student_byte_lengths), (built.teacher, built.teacher_byte_lengths)):
        without_u2581 = [i for i, text in enumerate(texts) if "▁" not in text]
        for i in without_u2581:
            assert int(table[side(i)].sum()) - len(texts[i].encode()) in (0, 1)
        assert len(without_u2581) > 100


def test_any_slice_is_the_slice_of_the_whole(built):
    rng = np.random.default_rng(0)
    long = np.flatnonzero(built.student_lengths > ANCHOR_EVERY + 100)
    assert len(long) >= 5
    beyond = 0
    for i in [*long.tolist(), *range(0, len(built), 7)]:
        whole = built[i]
        for _ in range(10):
            start, stop = sorted(rng.integers(0, built.student_lengths[i] + 1, 2).tolist())
            spans = built.spans(i, start, stop)
            assert np.array_equal(spans.first, whole.spans.first[start:stop])
            assert np.array_equal(spans.last, whole.spans.last[start:stop])
            assert np.array_equal(spans.common_boundary, whole.spans.common_boundary[start:stop])
            assert np.array_equal(built.student(i, start, stop), whole.student_ids[start:stop])
            beyond += stop - start > 0 and start > ANCHOR_EVERY
        half = int(built.teacher_lengths[i]) // 2
        assert np.array_equal(built.teacher(i, half), whole.teacher_ids[half:])
    assert beyond > 20


def test_common_boundaries_need_no_decoding(built, mistral, smollm2, tmp_path):
    """They are the boundaries of the decoded spans, past anchors and at spans too wide for a byte."""
    wide = invent_dataset(tmp_path / "wide", mistral, smollm2, [[9000, 50, 1, 300] * 5], wide=0.01)
    assert wide.totals.span_widths[8] > 100
    inside = 0
    for ds in (built, wide):
        for i in range(len(ds)):
            whole = ds[i].spans.common_boundary
            for start, stop in ((0, len(whole)), (len(whole) // 3, len(whole) // 2), (len(whole) - 1, len(whole))):
                found = ds.common_boundary(i, start, stop)
                assert found.dtype == np.bool_ and np.array_equal(found, whole[start:stop])
                inside += int((~found).sum())
    assert inside > 10_000


def test_documents_keep_their_ids(settings, texts, tmp_path):
    names = ["a", "ünïcode ✓", "", "x" * 300, "17"]
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": text, "name": name} for text, name in zip(texts, names, strict=False)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ds = make([corpus], tmp_path / "out", replace(settings, id_key="name"), shard_bytes=2_000)
    assert len(ds.manifest.shards) > 1 and ds.manifest.id_key == "name"
    assert [ds.id(i) for i in range(len(ds))] == [ds[i].id for i in range(len(ds))] == names
    ds.verify()


def test_a_dataset_without_ids_gives_none(built):
    assert built.manifest.id_key is None and built.id(0) == built[0].id == ""
    assert not list(built.path.rglob("ids.*"))


def test_positions_outside_are_refused(built):
    n = int(built.student_lengths[0])
    for start, stop in ((-1, 2), (3, 2), (0, n + 1)):
        with pytest.raises(IndexError, match="is not within"):
            built.spans(0, start, stop)
        with pytest.raises(IndexError, match="is not within"):
            built.student(0, start, stop)
    with pytest.raises(IndexError, match="no document"):
        built[len(built)]
    with pytest.raises(IndexError, match="no document -1"):
        built.student(-1)
    with pytest.raises(IndexError, match="no document"):
        built[-len(built) - 1]
    assert np.array_equal(built[-1].student_ids, built[len(built) - 1].student_ids)


@pytest.mark.slow
def test_megatron_core_opens_every_pair_and_writes_the_same_bytes(built, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    met = 0
    for shard in built.manifest.shards:
        for name in PAIRS:
            prefix = built.path / shard.path / name
            opened = IndexedDataset(str(prefix))
            builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=opened.index.dtype)
            for i in range(len(opened)):
                builder.add_document(opened[i], [len(opened[i])])
            builder.finalize(str(tmp_path / "x.idx"))
            for suffix in ("bin", "idx"):
                assert (tmp_path / f"x.{suffix}").read_bytes() == prefix.with_suffix(f".{suffix}").read_bytes()
            met += len(opened)
    assert met == 4 * len(built)


def test_it_verifies_and_names_its_tokenizers(built, mistral, smollm2):
    built.verify()
    for info, tokenizer in ((built.student_tokenizer, mistral), (built.teacher_tokenizer, smollm2)):
        assert (info.fingerprint, info.vocab_size, info.eos_id, info.eos_token) == (
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.eos_id,
            tokenizer.eos_token,
        )
        assert open_tokenizer(info.path).fingerprint == tokenizer.fingerprint


def test_a_control_token_beyond_the_embedding_needs_no_row(tmp_path, smollm2_folder):
    """Gemma 3's image placeholder, 262,144 of 262,144 rows; the padding token of the first Llama 2, whatever its flag says."""
    raw = json.loads((smollm2_folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "some words, <image> and <pad>"}\n')
    rows = []
    for content, special in (("<image>", True), ("<pad>", False), ("<br>", False)):
        folder = shutil.copytree(smollm2_folder, tmp_path / content)
        added = [*raw["added_tokens"], {"id": 49_152, "content": content, "special": special, **flags}]
        (folder / "tokenizer.json").write_text(json.dumps(raw | {"added_tokens": added}))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<pad>"}')
        own = BuildConfig(student=str(folder), teacher=str(folder), backend="huggingface")
        data = make([corpus], tmp_path / f"{content}-data", own)
        info = data.student_tokenizer
        assert info.vocab_size == len(data.student_byte_lengths) == 49_153 and data.student(0).max() < info.rows
        rows.append(info.rows)
    assert rows == [49_152, 49_152, 49_153]  # the last one is given by texts


def test_the_fingerprint_is_the_checksum_of_everything_else(built, copy):
    data = (built.path / "dataset.json").read_bytes()
    assert data.count(built.fingerprint.encode()) == 1
    assert hashlib.sha256(data.replace(built.fingerprint.encode(), b"0" * 64)).hexdigest() == built.fingerprint
    seal(copy, nfc=False)
    assert AlignedDataset.open(copy).fingerprint != built.fingerprint


def test_another_tokenizer_is_refused_with_what_differs(built, tmp_path):
    student, teacher = built.student_tokenizer, built.teacher_tokenizer
    assert built.require_tokenizer("student", student.path) is None
    assert built.require_tokenizer("teacher", teacher.path) is None
    other = shutil.copytree(student.path, tmp_path / "other")
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DatasetError, match="student ids") as error:
        built.require_tokenizer("student", other)
    for words in ("merges", str(other), str(student.path)):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["student.bin", "teacher.idx", "spans.bin", "anchors.bin"])
def test_a_file_cut_off_or_missing_is_refused_on_opening(copy, name):
    file = copy / "shards" / "0001" / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DatasetError, match=f"{size - 2:,} bytes, dataset.json records {size:,}: cut off") as error:
        AlignedDataset.open(copy)
    assert str(file) in str(error.value)
    file.unlink()
    with pytest.raises(DatasetError, match=f"{name} is missing"):
        AlignedDataset.open(copy)


def test_a_missing_shard_or_dataset_is_refused(copy, tmp_path):
    shutil.rmtree(copy / "shards" / "0002")
    with pytest.raises(DatasetError, match="0002"):
        AlignedDataset.open(copy)
    (copy / "dataset.json").unlink()
    with pytest.raises(DatasetError, match="did not finish"):
        AlignedDataset.open(copy)
    with pytest.raises(DatasetError, match="not a dataset"):
        AlignedDataset.open(tmp_path / "nowhere")


def seal(folder: Path, **changes: object) -> None:
    """Changes dataset.json and its checksum with it."""
    file = folder / "dataset.json"
    data = json.dumps(json.loads(file.read_text()) | changes | {"sha256": UNSEALED}).encode()
    file.write_bytes(data.replace(UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format 1, this reads format 2"),
        ({"codec": "other"}, "coded as 'other'"),
        ({"surprise": 1}, "surprise"),
        ({"totals": None}, "totals"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(copy, change, message):
    seal(copy, **change)
    with pytest.raises(DatasetError, match=message) as error:
        AlignedDataset.open(copy)
    assert str(copy / "dataset.json") in str(error.value)


@pytest.mark.parametrize("content", ["[1, 2]", "", '{"format": 2}', '{"format": 2, "sha256": "x"}', "{"])
def test_a_manifest_that_is_another_file_is_refused(copy, content):
    (copy / "dataset.json").write_text(content)
    with pytest.raises(DatasetError, match=r"dataset\.json is damaged"):
        AlignedDataset.open(copy)


def test_a_manifest_changed_by_hand_is_refused(copy):
    file = copy / "dataset.json"
    file.write_text(file.read_text().replace('"nfc": true', '"nfc": false'))
    with pytest.raises(DatasetError, match="changed since it was written"):
        AlignedDataset.open(copy)


def test_pairs_that_do_not_fit_together_are_refused_by_name(copy, built):
    """Of a right size, as only a wrong build could leave them: an index of another shard, spans of another one."""
    one, other = copy / "shards" / "0001", copy / "shards" / "0000"
    shards = json.loads((copy / "dataset.json").read_text())["shards"]
    for name in ("anchors.idx", "spans.bin"):
        shutil.copy(other / name, one / name)
        shards[1]["files"][name]["size"] = (one / name).stat().st_size
    seal(copy, shards=shards)
    with pytest.raises(DatasetError, match=r"0001/anchors.idx and .*0001/student.idx differ in their number of documents"):
        AlignedDataset.open(copy)
    shutil.copy(built.path / "shards" / "0001" / "anchors.idx", one)
    shards[1]["files"]["anchors.idx"]["size"] = (one / "anchors.idx").stat().st_size
    seal(copy, shards=shards)
    opened = AlignedDataset.open(copy)
    with pytest.raises(CorpusError, match=r"0001/spans.bin: .* bytes, its index describes"):
        opened.spans(len(opened) - 1 - sum(shard["totals"]["documents"] for shard in shards[2:]))


def test_more_shards_than_files_may_be_open(mistral, smollm2, tmp_path):
    """A map keeps its file open; 60 shards have 240 of them."""
    ds = invent_dataset(tmp_path / "many", mistral, smollm2, [[5, 6, 7]] * 60)
    program = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))
from megatron_vocagno.corpus.dataset import AlignedDataset
ds = AlignedDataset.open(sys.argv[1])
for _ in range(2):
    print(sum(int(ds[i].student_ids.sum()) + int(ds[i].teacher_ids.sum()) + int(ds[i].spans.last[-1]) for i in range(len(ds))))
"""
    finished = subprocess.run([sys.executable, "-c", program, ds.path], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    expected = sum(
        int(d.student_ids.sum()) + int(d.teacher_ids.sum()) + int(d.spans.last[-1]) for d in map(ds.__getitem__, range(180))
    )
    assert finished.stdout.split() == [str(expected)] * 2


def test_an_object_store_gets_the_same_files_and_is_read_from_a_copy(built, mistral, smollm2, tmp_path):
    url = f"memory://{tmp_path.name}/dataset"
    create(UPath(url), mistral, smollm2, built.manifest.shards, built.manifest.nfc)
    assert read_manifest(UPath(url)) == built.manifest
    names = [
        "dataset.json",
        *(f"tokenizers/{side}/{f.name}" for side in PAIRS[:2] for f in (built.path / "tokenizers" / side).iterdir()),
    ]
    assert len(names) == 7
    for name in names:
        assert (UPath(url) / name).read_bytes() == (built.path / name).read_bytes()
    for where in (url, UPath(url), "s3://bucket/dataset", Path("s3://bucket/dataset")):
        with pytest.raises(DatasetError, match=r"not on this machine.* copy the folder first"):
            AlignedDataset.open(where)
    assert len(AlignedDataset.open(f"file://{built.path}")) == len(built)


def test_merge_is_one_dataset_and_copies_no_tokens(built, settings, texts, tmp_path):
    other = make([write_jsonl(tmp_path / "b.jsonl", texts[:5])], tmp_path / "b", settings)
    merged = merge([other.path, built.path], tmp_path / "far" / "merged")
    assert not list((tmp_path / "far").rglob("*.bin"))
    assert len(merged) == 5 + len(built) and merged.totals == other.totals + built.totals
    for i in (0, 4, 5, len(merged) - 1):
        from_one = other[i] if i < 5 else built[i - 5]
        assert np.array_equal(merged[i].student_ids, from_one.student_ids)
        assert np.array_equal(merged[i].spans.first, from_one.spans.first)
    merged.verify()
    with pytest.raises(DatasetError, match="already contains a dataset"):
        merge([built.path], tmp_path / "far" / "merged")
    with pytest.raises(DatasetError, match="nothing to merge"):
        merge([], tmp_path / "nothing")


def test_merged_datasets_merge_and_move_together(built, settings, texts, tmp_path):
    a, b = (make([write_jsonl(tmp_path / f"{n}.jsonl", texts[n:3])], tmp_path / "all" / f"part{n}", settings) for n in (0, 1))
    two = merge([a.path, b.path], tmp_path / "all" / "two")
    three = merge([two.path, a.path], tmp_path / "all")  # around its own parts
    assert len(three) == 3 + 2 + 3 and three.totals == a.totals + b.totals + a.totals
    three.verify()
    moved = AlignedDataset.open((tmp_path / "all").rename(tmp_path / "elsewhere"))
    moved.verify()
    assert moved.fingerprint == three.fingerprint
    order = [0, 1, 2, 1, 2, 0, 1, 2]  # of the texts
    assert len({built[i].student_ids.tobytes() for i in order}) == 3
    for mine, text in enumerate(order):
        assert np.array_equal(moved[mine].student_ids, built[text].student_ids)
        assert np.array_equal(moved[mine].spans.last, built[text].spans.last)


def test_merge_refuses_other_tokenizers_and_settings(built, settings, texts, tmp_path):
    file = write_jsonl(tmp_path / "b.jsonl", texts[:5])
    swapped = make([file], tmp_path / "swapped", BuildConfig(student=settings.teacher, teacher=settings.student))
    with pytest.raises(DatasetError) as error:
        merge([built.path, swapped.path], tmp_path / "merged")
    assert str(built.path) in str(error.value) and "number of tokens (49,152 and 32,000)" in str(error.value)
    raw = make([file], tmp_path / "raw", BuildConfig(student=settings.student, teacher=settings.teacher, nfc=False))
    with pytest.raises(DatasetError, match=r"nfc is False, in .* it is True"):
        merge([built.path, raw.path], tmp_path / "merged")
    named = make([file], tmp_path / "named", replace(settings, id_key="text"))
    with pytest.raises(DatasetError, match=r"dataset has no ids, .*named has \('text'\)"):
        merge([built.path, named.path], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
