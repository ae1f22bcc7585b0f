"""A dataset says what the tokenizers say, in any slice; damage and other tokenizers are refused; merging copies no tokens."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.dataset import PAIRS, AlignedDataset, DatasetError, TokenizerMismatch, merge
from megatron_vocagno.corpus.indexed import PairReader
from megatron_vocagno.corpus.shards import Settings, build
from megatron_vocagno.corpus.spans import ANCHOR_EVERY, align
from megatron_vocagno.corpus.tokens import open_tokenizer
from tests.corpus.conftest import write_jsonl


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
        built[-1]


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
    assert built.fingerprint == hashlib.sha256((built.path / "dataset.json").read_bytes()).hexdigest()


def test_another_tokenizer_is_refused_with_both_fingerprints(built):
    own = built.student_tokenizer.fingerprint, built.teacher_tokenizer.fingerprint
    built.require_tokenizers(*own)
    built.require_tokenizers(teacher_fingerprint=own[1])
    with pytest.raises(TokenizerMismatch, match="student ids") as error:
        built.require_tokenizers(student_fingerprint=own[1])
    assert own[0] in str(error.value) and own[1] in str(error.value)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this reads format 1"),
        ({"codec": "other"}, "coded as 'other'"),
        ({"surprise": 1}, "surprise"),
        ({"totals": None}, "totals"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(copy, change, message):
    file = copy / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DatasetError, match=message):
        AlignedDataset.open(copy)


def test_a_manifest_that_is_no_json_is_refused(copy):
    (copy / "dataset.json").write_text("[1, 2]")
    with pytest.raises(DatasetError, match="damaged"):
        AlignedDataset.open(copy)


def rehash(copy):
    """Makes the manifest agree with the files, so that only their content is wrong."""
    manifest = json.loads((copy / "dataset.json").read_text())
    for shard in manifest["shards"]:
        for name, record in shard["files"].items():
            record["sha256"] = hashlib.sha256((copy / shard["path"] / name).read_bytes()).hexdigest()
    (copy / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("student.bin", -2, b"\x05\x00", "does not end with the student's EOS"),
        ("student.bin", 0, b"\xff\xff", "has id 65535"),
        ("teacher.bin", -2, b"\x05\x00", "does not end with the teacher's EOS"),
        ("spans.bin", -1, b"\x02", "ends at teacher token"),
        ("spans.bin", 3, b"\x06", r"ends at teacher token|do not lead to the anchors"),
        ("spans.bin", 3, b"\xff", "its escapes are not those"),
        ("anchors.bin", 0, b"\x01", "ends at teacher token"),
        ("anchors.bin", "second", b"\x01", "do not lead to the anchors"),
    ],
)
def test_verify_sees_one_changed_byte(copy, name, at, value, message):
    file = copy / "shards" / "0000" / name
    data = bytearray(file.read_bytes())
    if at == "second":  # the second anchor of the first document that has one
        pair = PairReader(file.with_suffix(""))
        at = 4 * int(pair.lengths[: np.argmax(pair.lengths > 1)].sum() + 1)
    at %= len(data)
    assert data[at : at + len(value)] != value
    data[at : at + len(value)] = value
    file.write_bytes(data)
    damaged = AlignedDataset.open(copy)
    with pytest.raises(DatasetError, match="changed since it was written") as error:
        damaged.verify()
    assert str(file) in str(error.value)
    rehash(copy)
    with pytest.raises(CorpusError, match=message):
        AlignedDataset.open(copy).verify()


def test_merge_is_one_dataset_and_copies_no_tokens(built, settings, texts, tmp_path):
    other = build([write_jsonl(tmp_path / "b.jsonl", texts[:5])], tmp_path / "b", settings)
    merged = merge([other.path, built.path], tmp_path / "far" / "merged")
    assert not list((tmp_path / "far").rglob("*.bin"))
    assert len(merged) == 5 + len(built) and merged.totals == other.totals + built.totals
    for i in (0, 4, 5, len(merged) - 1):
        from_one = other[i] if i < 5 else built[i - 5]
        assert np.array_equal(merged[i].student_ids, from_one.student_ids)
        assert np.array_equal(merged[i].spans.first, from_one.spans.first)
    merged.verify()
    with pytest.raises(DatasetError, match="already holds a dataset"):
        merge([built.path], tmp_path / "far" / "merged")


def test_merge_refuses_other_tokenizers_and_settings(built, settings, texts, tmp_path):
    file = write_jsonl(tmp_path / "b.jsonl", texts[:5])
    swapped = build([file], tmp_path / "swapped", Settings(student=settings.teacher, teacher=settings.student))
    with pytest.raises(TokenizerMismatch) as error:
        merge([built.path, swapped.path], tmp_path / "merged")
    assert built.student_tokenizer.fingerprint in str(error.value) and swapped.student_tokenizer.fingerprint in str(error.value)
    raw = build([file], tmp_path / "raw", Settings(student=settings.student, teacher=settings.teacher, nfc=False))
    with pytest.raises(DatasetError, match="nfc is False"):
        merge([built.path, raw.path], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
