"""Batches at once: the compiled walk, the numpy road and the definition of one document give the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from megatron_vocagno.corpus.encoders import Ragged, bounds_of
from megatron_vocagno.corpus.spans import align, encode, intersection_over_student
from megatron_vocagno.corpus.tokens import UNSURE, Tokens
from megatron_vocagno.preprocess import aligner
from megatron_vocagno.preprocess.aligner import WHOLE, AlignedTexts, Part, Side, align_texts, append_to_each, by_bytes, by_walk

BYTES = np.arange(300).astype(np.uint16)  # token i holds i bytes


def ragged(texts: list[list[int]]) -> Ragged:
    return Ragged(np.array([i for text in texts for i in text], np.uint32), bounds_of(np.array([len(t) for t in texts])))


def tiling(random: np.random.Generator, n_bytes: int, widest: int) -> list[int]:
    ends = np.cumsum(random.integers(1, widest + 1, n_bytes))
    inner = ends[ends < n_bytes]
    return np.diff(np.concatenate([[0], inner, [n_bytes]])).tolist()


def spoil(random: np.random.Generator, ids: list[int]) -> list[int]:
    """Tokens that no longer tile the text: one missing, one more, or one without text."""
    at = int(random.integers(0, len(ids) + 1))
    return [ids[:-1], [*ids, 1], [*ids[:at], 0, *ids[at:]], [ids[0] + 1, *ids[1:]]][int(random.integers(4))]


def batch(seed: int, texts: int = 12) -> tuple[Side, Side, np.ndarray]:
    random = np.random.default_rng(seed)
    wide, spoilt = seed % 3 == 0, seed % 2 == 0
    n_bytes = [int(random.integers(1, 40_000 if d % 7 == 0 else 60)) for d in range(texts)]
    prefixes = random.integers(0, 2, (2, texts)).astype(np.uint8)
    ids = [
        [tiling(random, n + int(p), widest) for n, p in zip(n_bytes, prefix, strict=True)]
        for prefix, widest in zip(prefixes, (299 if wide else 6, 1 if wide else 6), strict=True)
    ]
    if spoilt:
        ids = [[spoil(random, t) if random.random() < 0.2 else t for t in side] for side in ids]
    sides = [Side(ragged(side), prefix, BYTES) for side, prefix in zip(ids, prefixes, strict=True)]
    return sides[0], sides[1], np.array(n_bytes)


def same(a: AlignedTexts, b: AlignedTexts) -> None:
    for field in fields(AlignedTexts):
        assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_both_backends_give_the_same():
    good = bad = escapes = 0
    for seed in range(60):
        for part in (WHOLE, Part(5000, 77, ends=False), Part(4095, 3, ends=True), Part(4096, 0, ends=False)):
            sides = batch(seed)
            walked, counted = by_walk(*sides, part), by_bytes(*sides, part)
            same(walked, counted)
            good, bad, escapes = good + walked.good.sum(), bad + (~walked.good).sum(), escapes + len(walked.escapes)
    assert good > 1200 and bad > 200 and escapes > 200


def test_a_text_whose_bytes_the_table_cannot_know_is_never_good():
    met = 0
    for seed in range(1, 151, 2):
        for side in (0, 1):
            sides = list(batch(seed, texts=6))
            marked = np.arange(6) % 2 == 0
            expected = by_walk(*sides).good & ~marked
            sides[side] = replace(sides[side], prefix=np.where(marked, UNSURE, sides[side].prefix).astype(np.uint8))
            walked = by_walk(*sides)
            same(walked, by_bytes(*sides))
            assert np.array_equal(walked.good, expected)
            met += int(expected.sum())
    assert met > 100
    # nor one whose first token would make up for the mark
    fits, plain = (Side(ragged([[n]]), np.array([p], np.uint8), BYTES) for n, p in ((10 + UNSURE, UNSURE), (10, 0)))
    for sides in ([fits, plain], [plain, fits]):
        assert not by_walk(*sides, np.array([10])).good[0] and not by_bytes(*sides, np.array([10])).good[0]


def test_a_batch_is_what_each_document_is_alone():
    good = bad = escapes = 0
    for seed in range(150):
        student, teacher, n_bytes = batch(seed)
        made = by_walk(student, teacher, n_bytes)
        codes, lists, widths, covered = [], [], np.zeros(9, np.int64), 0
        for d, n in enumerate(n_bytes):
            both = [
                Tokens(s.tokens[d].astype(np.int32), np.cumsum(s.tokens[d].astype(np.int64)) - s.prefix[d])
                for s in (student, teacher)
            ]
            tiles = all(
                len(t.ends)
                and t.ends[-1] == n
                and t.ends[0] >= 0
                and (np.diff(t.ends) > 0).all()
                and (t.ends[0] > 0 or s.prefix[d])
                for t, s in zip(both, (student, teacher), strict=True)
            )
            assert made.good[d] == tiles
            if not tiles:
                bad += 1
                continue
            good += 1
            spans = align(*both)
            stored = encode(spans.with_eos())
            codes.append(stored.codes)
            lists.append(np.concatenate([stored.anchors, stored.escapes.ravel()]))
            widths += np.bincount(np.minimum(spans.last - spans.first, 8), minlength=9)
            covered += int((intersection_over_student(*both, spans) == 1).sum())
            escapes += len(stored.escapes)
        assert np.array_equal(made.codes, np.concatenate([np.zeros(0, np.uint8), *codes]))
        flat, lengths = made.side_lists
        assert np.array_equal(flat, np.concatenate([np.zeros(0, np.int32), *lists]))
        assert lengths.tolist() == [len(x) for x in lists]
        assert np.array_equal(made.widths, widths) and made.covered == covered == int(widths[1:].sum())
    assert good > 1000 and bad > 100 and escapes > 100


def test_parts_of_a_document_are_the_whole_of_it():
    """Cut at a common boundary, with positions that go on."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 9000, 8)
    s_parts, t_parts = ([tiling(random, int(n), w) for n in sizes] for w in (3, 7))
    none = np.zeros(1, np.uint8)
    whole = align_texts(
        *(Side(ragged([[i for part in p for i in part]]), none, BYTES) for p in (s_parts, t_parts)), np.array([sizes.sum()])
    )
    done, codes, anchors = Part(ends=False), [], []
    for k, (s, t, n) in enumerate(zip(s_parts, t_parts, sizes, strict=True)):
        done = Part(done.student, done.teacher, ends=k == len(sizes) - 1)
        part = align_texts(Side(ragged([s]), none, BYTES), Side(ragged([t]), none, BYTES), np.array([n]), done)
        codes.append(part.codes)
        anchors.append(part.anchors)
        done = Part(done.student + len(s), done.teacher + len(t))
    assert np.array_equal(np.concatenate(codes), whole.codes)
    assert np.array_equal(np.concatenate(anchors), whole.anchors) and len(whole.anchors) == 3


def test_an_empty_batch_is_legal():
    none = np.zeros(0, np.int64)
    side = Side(Ragged(np.zeros(0, np.uint32), np.zeros(1, np.int64)), np.zeros(0, np.uint8), BYTES)
    same(by_walk(side, side, none), by_bytes(side, side, none))


def test_an_id_beyond_the_vocabulary_is_never_looked_up():
    side = Side(ragged([[300]]), np.zeros(1, np.uint8), BYTES)
    fine = Side(ragged([[3]]), np.zeros(1, np.uint8), BYTES)
    for sides in ((side, fine), (fine, side)):
        with pytest.raises(ValueError, match="token id 300 in a vocabulary of 300"):
            align_texts(*sides, np.array([3]))


def test_each_text_gets_its_end():
    ended = append_to_each(ragged([[1, 2], [], [3]]), 9, np.dtype(np.uint16))
    assert ended.dtype == np.uint16 and ended.tolist() == [1, 2, 9, 9, 3, 9]


def test_numpy_does_it_where_numba_is_missing(monkeypatch):
    original = aligner.importlib.util.find_spec
    assert aligner._backend() is by_walk
    monkeypatch.setattr(aligner.importlib.util, "find_spec", lambda name: None if name == "numba" else original(name))
    assert aligner._backend() is by_bytes


@pytest.mark.long
def test_the_walk_is_compiled_once_and_then_read_from_its_cache(tmp_path):
    code = (
        "import numpy as np\nfrom megatron_vocagno.preprocess import aligner_numba, aligner\n"
        "from tests.preprocess.test_aligner import batch\n"
        "aligner.by_walk(*batch(1))\nstats = aligner_numba._compiled.stats\n"
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))"
    )
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"]]
