"""Spans against brute force over bytes; the codec there and back."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vocagno.corpus.spans import (
    ANCHOR_EVERY,
    ESCAPE,
    EncodedSpans,
    Spans,
    align,
    decode,
    encode,
    intersection_over_student,
)
from megatron_vocagno.corpus.tokens import Tokens
from megatron_vocagno.errors import CorpusError


def tokens_of(ends) -> Tokens:
    ends = np.array(ends, np.int64)
    return Tokens(np.zeros(len(ends), np.int32), ends)


def random_tokens(rng, n_bytes, share_of_cuts, empty_prefix=False) -> Tokens:
    cuts = np.flatnonzero(rng.random(n_bytes - 1) < share_of_cuts) + 1
    return tokens_of([*([0] if empty_prefix else []), *cuts, n_bytes])


def random_pair(rng) -> tuple[Tokens, Tokens]:
    n_bytes = int(rng.integers(1, 400))
    s, t = (random_tokens(rng, n_bytes, rng.random() ** 2, bool(rng.random() < 0.3)) for _ in range(2))
    return s, t


def owners(tokens: Tokens) -> list[int]:
    """For each byte of the text, the token that holds it."""
    owner = [-1] * tokens.n_bytes
    for i, (start, end) in enumerate(zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True)):
        for b in range(start, end):
            assert owner[b] == -1
            owner[b] = i
    assert -1 not in owner
    return owner


def check_against_bytes(student: Tokens, teacher: Tokens) -> tuple[int, int]:
    """(mapped, wider than one) after comparing every span with the set of teacher tokens that own its bytes."""
    spans, owner = align(student, teacher), owners(teacher)
    mapped = wide = 0
    previous = spans.before
    for start, end, first, last in zip(student.starts, student.ends, spans.first.tolist(), spans.last.tolist(), strict=True):
        overlapping = {owner[b] for b in range(start, end)}
        assert set(range(first, last)) == overlapping
        assert first in (previous, previous - 1)
        previous = last
        mapped += bool(overlapping)
        wide += len(overlapping) > 1
    assert previous == len(teacher.ids)
    share = intersection_over_student(student, teacher, spans)
    assert np.all(share[spans.mapped] == 1) and np.all(np.isnan(share[~spans.mapped]))
    edges = {0, *teacher.ends.tolist()}
    assert spans.common_boundary.tolist() == [start in edges for start in student.starts.tolist()]
    return mapped, wide


@pytest.mark.parametrize(("student", "teacher"), [("mistral", "smollm2"), ("smollm2", "mistral")])
def test_spans_are_the_teacher_tokens_of_their_bytes_on_real_text(student, teacher, texts, request):
    sides = [request.getfixturevalue(name).encode_batch(texts) for name in (student, teacher)]
    counts = np.array([check_against_bytes(s, t) for s, t in zip(*sides, strict=True)])
    mapped, wide = counts.sum(axis=0)
    assert mapped > 100_000 and wide > 1_000
    # beyond English too
    assert counts[-42:, 0].sum() > 2_000


def test_spans_are_the_teacher_tokens_of_their_bytes_on_random_boundaries():
    rng = np.random.default_rng(1)
    counts = np.array([check_against_bytes(*random_pair(rng)) for _ in range(500)])
    assert counts.sum(axis=0)[0] > 20_000 and counts.sum(axis=0)[1] > 3_000


@pytest.mark.parametrize("name", ["mistral", "smollm2"])
def test_with_one_tokenizer_every_span_is_the_token_itself(name, texts, request):
    met = 0
    for tokens in request.getfixturevalue(name).encode_batch(texts):
        spans = align(tokens, tokens)
        own = np.arange(len(tokens.ids))
        m = spans.mapped
        assert np.array_equal(spans.first[m], own[m]) and np.array_equal(spans.last[m], own[m] + 1)
        # what is not mapped is a dummy prefix that stands alone
        assert not m[1:].size or m[1:].all()
        met += int(m.sum())
    assert met > 100_000


def test_tokens_of_different_texts_are_refused():
    with pytest.raises(CorpusError, match="student reads 5 bytes, teacher 6"):
        align(tokens_of([2, 5]), tokens_of([6]))
    with pytest.raises(CorpusError, match="teacher's tokens are unknown"):
        align(tokens_of([2]), Tokens(np.zeros(1, np.int32), np.array([2]), "unknown"))
    with pytest.raises(CorpusError, match="student token 1 has no text"):
        align(tokens_of([2, 2, 5]), tokens_of([5]))
    with pytest.raises(CorpusError, match="teacher token 2 has no text"):
        align(tokens_of([5]), tokens_of([2, 5, 5]))


def test_intersection_sees_a_span_that_is_too_short_or_elsewhere():
    student, teacher = tokens_of([4, 8]), tokens_of([2, 4, 8])
    spans = Spans(np.array([0, 0], np.int32), np.array([1, 1], np.int32))
    assert intersection_over_student(student, teacher, spans).tolist() == [0.5, 0.0]


def same(a: Spans, b: Spans) -> bool:
    return np.array_equal(a.first, b.first) and np.array_equal(a.last, b.last) and a.before == b.before


def part(spans: Spans, start: int, stop: int) -> Spans:
    return Spans(spans.first[start:stop], spans.last[start:stop], int(spans.last[start - 1]) if start else spans.before)


def long_spans(rng, n_bytes, widest) -> Spans:
    """A document of more than one anchor; now and then a student token of up to `widest` bytes, teacher tokens of 1 or 2."""
    steps = np.where(rng.random(n_bytes) < 0.01, rng.integers(1, widest, n_bytes), rng.integers(1, 4, n_bytes))
    ends = np.cumsum(steps)
    ends = ends[ends < n_bytes]
    student = tokens_of([0, *ends, n_bytes])
    return align(student, random_tokens(rng, n_bytes, 0.7, empty_prefix=True)).with_eos()


def test_codec_there_and_back_with_escapes_and_from_the_middle():
    rng = np.random.default_rng(2)
    escapes = beyond_an_anchor = 0
    for _ in range(12):
        spans = long_spans(rng, int(rng.integers(30_000, 60_000)), 600)
        stored = encode(spans)
        assert stored.codes.dtype == np.uint8 and len(stored.anchors) == -(-len(spans) // ANCHOR_EVERY)
        assert (stored.codes == ESCAPE).sum() == len(stored.escapes)
        assert same(decode(stored), spans)
        escapes += len(stored.escapes)
        for _ in range(60):
            start, stop = sorted(rng.integers(0, len(spans) + 1, 2).tolist())
            if start == stop:
                continue
            assert same(decode(stored, start, stop), part(spans, start, stop))
            beyond_an_anchor += start >= ANCHOR_EVERY
        for start in (0, ANCHOR_EVERY - 1, ANCHOR_EVERY, ANCHOR_EVERY + 1):
            assert same(decode(stored, start, start + 1), part(spans, start, start + 1))
    assert escapes > 500 and beyond_an_anchor > 200


@pytest.mark.parametrize("width", [1, 125, 126, 127, 128, 300, 70_000])
@pytest.mark.parametrize("shared", [0, 1])
def test_codec_at_the_edge_of_the_escape(width, shared):
    first = np.array([0, 5 - shared], np.int32)
    last = np.array([5, 5 - shared + width], np.int32)
    stored = encode(Spans(first, last))
    assert len(stored.escapes) == (width > 126)
    assert same(decode(stored), Spans(first, last))


def test_decoding_reads_no_more_than_an_anchor_before_the_start():
    spans = long_spans(np.random.default_rng(3), 60_000, 5)
    stored = encode(spans)

    class Watched:
        read: tuple[int, int] | None = None

        def __len__(self):
            return len(stored.codes)

        def __getitem__(self, key):
            self.read = (key.start, key.stop)
            return stored.codes[key]

    watched = Watched()
    start, stop = 2 * ANCHOR_EVERY + 100, 2 * ANCHOR_EVERY + 200
    assert same(decode(EncodedSpans(watched, stored.anchors, stored.escapes), start, stop), part(spans, start, stop))
    assert watched.read == (2 * ANCHOR_EVERY, stop)


def test_an_empty_range_decodes_to_nothing():
    spans = long_spans(np.random.default_rng(4), 30_000, 5)
    for at in (0, 1, ANCHOR_EVERY, len(spans)):
        assert len(decode(encode(spans), at, at)) == 0


def test_eos_stands_unmapped_at_the_teachers_eos():
    spans = align(tokens_of([2, 5]), tokens_of([1, 5])).with_eos()
    assert spans.first.tolist() == [0, 1, 2] and spans.last.tolist() == [2, 2, 2]
    assert spans.mapped.tolist() == [True, True, False] and spans.common_boundary.tolist() == [True, False, True]


def test_spans_that_skip_a_teacher_token_have_no_code():
    with pytest.raises(CorpusError, match=r"token 1 .* teacher token 3, .* 2"):
        encode(Spans(np.array([0, 3], np.int32), np.array([2, 4], np.int32)))
