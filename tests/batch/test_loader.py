"""A batch is a pure function of the seed and of its place, and the same rows on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows, evaluation_batches
from megatron_vocagno.batch.pack import MappingStatus
from megatron_vocagno.corpus.dataset import AlignedDataset

S = 64


def same(a, b) -> bool:
    tensors = ("input_BS", "target_BS", "first_BS", "last_BS")
    arrays = zip((*a.teacher_inputs, *a.teacher_targets), (*b.teacher_inputs, *b.teacher_targets), strict=True)
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and all(
        np.array_equal(x, y) for x, y in arrays
    )


def test_the_same_micro_batches_on_any_number_of_ranks(dataset: AlignedDataset) -> None:
    one, two = Layout(2, 4, 1), Layout(2, 2, 2)
    assert one.rows == two.rows == 8
    compared = 0
    for step in range(3):
        alone = Batches(TrainRows(dataset, S, seed=3), one, 0).step(step * 8)
        shared = [Batches(TrainRows(dataset, S, seed=3), two, rank).step(step * 8) for rank in range(2)]
        for micro in range(4):
            assert same(alone[micro], shared[micro // 2][micro % 2])
            compared += 1
    assert compared == 12


def test_another_seed_is_another_order_and_every_epoch_has_its_own(dataset: AlignedDataset) -> None:
    rows = TrainRows(dataset, S, seed=0)
    n = rows.rows_in_epoch
    first = [rows[i].target_ids for i in range(20)]
    again = [TrainRows(dataset, S, seed=0)[i].target_ids for i in range(20)]
    other = [TrainRows(dataset, S, seed=1)[i].target_ids for i in range(20)]
    later = [rows[n + i].target_ids for i in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert sum(np.array_equal(a, b) for a, b in zip(first, other, strict=True)) < 3
    assert sum(np.array_equal(a, b) for a, b in zip(first, later, strict=True)) < 3


def test_an_epoch_learns_every_token_but_the_first_once(dataset: AlignedDataset) -> None:
    rows = TrainRows(dataset, S, seed=7)
    seen = np.sort(np.concatenate([rows[i].target_ids for i in range(rows.rows_in_epoch)]))
    everything = np.concatenate([dataset.student(d) for d in range(len(dataset))])
    first = rows._epoch(0)[0].student.order[0]
    left_out = dataset.student(int(first), 0, 1)[0]
    assert len(seen) == len(everything) - 1 > 50_000
    assert np.array_equal(np.sort(np.append(seen, left_out)), np.sort(everything))
    assert rows.tokens_per_row == np.mean([len(rows[i].target_ids) for i in range(rows.rows_in_epoch)])


def test_padding_has_no_target_and_no_guide_and_counts_agree(dataset: AlignedDataset) -> None:
    layout = Layout(4, 2, 1)
    met = 0
    for batch in Batches(TrainRows(dataset, S, seed=3), layout, 0).step(0):
        padded = batch.target_BS == IGNORE
        assert (batch.first_BS[padded] == batch.last_BS[padded]).all()
        assert sum(batch.mapping_counts) == int((~padded).sum()) == sum(batch.row_mapped) + sum(batch.row_unmapped)
        assert batch.mapping_counts[MappingStatus.MAPPED] == int((batch.first_BS < batch.last_BS).sum()) == sum(batch.row_mapped)
        met += int(padded.sum())
    assert met > 8


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(3, 2, 1), Layout(2, 2, 3)])
def test_evaluation_reads_every_text_token_once_and_knows_its_bytes(dataset: AlignedDataset, layout: Layout) -> None:
    tokens = text_bytes = scored = 0
    for rank in range(layout.data_parallel):
        for step in evaluation_batches(dataset, dataset.student_byte_lengths, S, layout, rank, limit=None):
            assert len(step.batches) == layout.micro_batches
            tokens += step.tokens
            text_bytes += step.text_bytes
            scored += sum(int((batch.target_BS != IGNORE).sum()) for batch in step.batches)
    # all tokens of the documents but the first and the one that ends it; the first has its bytes but for the dummy prefix
    firsts = sum(int(dataset.student_byte_lengths[dataset.student(d, 0, 1)[0]]) - 1 for d in range(len(dataset)))
    spaces = sum(dataset.student(d, 0, 1)[0] == 28705 for d in range(len(dataset)))  # the prefix alone: it has no byte at all
    assert tokens == scored == int(dataset.student_lengths.sum()) - 2 * len(dataset)
    # one document writes U+2581, the sign for a space: three bytes of text each time, one in the table
    assert text_bytes == dataset.totals.text_bytes - firsts - 4 * 2
    assert spaces > 0


def test_an_evaluation_of_few_rows_ends_after_them(dataset: AlignedDataset) -> None:
    steps = list(evaluation_batches(dataset, dataset.student_byte_lengths, S, Layout(2, 2, 1), 0, limit=5))
    rows = [int((row != IGNORE).any()) for step in steps for batch in step.batches for row in batch.target_BS]
    assert rows == [1, 1, 1, 1, 1, 0, 0, 0]
