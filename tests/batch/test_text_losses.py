"""What is said of text counts every token of text once, and neither the first token nor the end of a document."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_vocagno.batch.cached import CachedLosses, CombinedGuides
from megatron_vocagno.batch.loader import Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import Rows
from megatron_vocagno.batch.text_losses import TextLoss, summed, text_bytes
from megatron_vocagno.corpus.dataset import AlignedDataset
from tests.batch.test_cached import Scored


def said_of(data: Scored, rows: Rows, k: int) -> TextLoss:
    """From the documents, byte by byte: the teacher's tokens from the one that holds the row's first byte on."""
    pieces = rows.pieces(k)
    nats, tokens, text_bytes_ = [], 0, 0
    for document, start, stop in pieces:
        ends = data.documents[document][1]
        spans = data.spans(document, start, stop)
        # the row's last piece ends with what its last target needs, the others with their documents
        begin, end = (int(spans.first[0]) if start else 0), int(spans.last[-1])
        for token in range(max(begin, 1), min(end, len(ends))):
            nats.append(float(data.losses[document][token]))
            tokens += 1
            text_bytes_ += int(ends[token] - ends[token - 1])
    return TextLoss(math.fsum(nats) if np.isfinite(nats).all() else math.nan, tokens, text_bytes_)


@pytest.mark.parametrize("common", [0.0, 0.3, 1.0])
def test_the_text_losses_of_a_cached_row_are_those_of_its_documents(common: float) -> None:
    met = finite = 0
    for seed in range(20):
        data = Scored.at_random(seed, 12, common)
        other = Scored(data.documents)
        other.losses = [losses / 2 for losses in data.losses]
        order = np.random.default_rng(seed).permutation(12)
        one = Rows(data, order, 40, CachedLosses(data))
        two = Rows(data, order, 40, CombinedGuides([CachedLosses(data), CachedLosses(other)], "max", "min"))
        for k in range(len(one)):
            [said], expected = one[k].teacher_text_losses, said_of(data, one, k)
            assert (said.tokens, said.text_bytes) == (expected.tokens, expected.text_bytes)
            if math.isfinite(expected.nats):
                assert said.nats == pytest.approx(expected.nats, rel=1e-12)
                finite += 1
            else:
                assert not math.isfinite(said.nats), "a loss that is no number shows"
            first, second = two[k].teacher_text_losses
            assert first == said or not math.isfinite(said.nats)
            assert second.tokens == said.tokens and (second.nats == pytest.approx(said.nats / 2) or not math.isfinite(said.nats))
            met += said.tokens
    assert met > 3000 and finite > 15


def test_text_is_everything_except_first_tokens_and_ends_for_cached_and_scored_losses(dataset: AlignedDataset) -> None:
    """By the mapping of a row, as evaluation has it, and by the table of bytes."""
    rows, met = TrainRows(dataset, 64, seed=1), 0
    for batch in Batches(rows, Layout(8, rows.rows_in_epoch // 8, 1), 0).step(0):
        for b in range(len(batch.target_BS)):
            ids, text = batch.target_BS[b].numpy(), batch.text_BS[b].numpy()
            valid = ids >= 0
            starts = np.diff(batch.segment_BS[b].numpy(), prepend=np.int32(0)) > 0
            lengths = text_bytes(np.where(valid, ids, 0), starts, dataset.student_byte_lengths)
            assert np.array_equal(text, valid & (lengths > 0))
            assert (ids[valid & ~text & ~starts] == dataset.student_tokenizer.eos_id).all()
            met += int((valid & ~text).sum())
    assert met > 100


def test_a_sum_over_no_tokens_has_no_mean() -> None:
    nothing = TextLoss(0.0, 0, 0)
    assert math.isnan(nothing.per_token) and math.isnan(nothing.bits_per_byte)
    assert summed([(), ()]) == ()
    assert summed([(TextLoss(1.0, 2, 3), nothing), (), (TextLoss(4.0, 5, 6), TextLoss(7.0, 8, 9))]) == (
        TextLoss(5.0, 7, 9),
        TextLoss(7.0, 8, 9),
    )
