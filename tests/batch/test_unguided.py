"""Baselines without a teacher choose among the tokens that a guided run chooses among, and chance repeats itself."""

from __future__ import annotations

import numpy as np
import torch

from megatron_vocagno.batch.blend import BlendedRows, Mixture
from megatron_vocagno.batch.cached import CachedLosses
from megatron_vocagno.batch.loader import Batches, Layout
from megatron_vocagno.batch.pack import MappingStatus, Rows
from megatron_vocagno.batch.unguided import RandomGuide, RandomRows, ZeroGuide
from megatron_vocagno.corpus.dataset import AlignedDataset
from tests.batch.test_cached import Scored

S = 64


def test_the_targets_that_a_cached_teacher_has_losses_of_are_mapped_one_by_one() -> None:
    met = dict.fromkeys(MappingStatus, 0)
    for seed in range(20):
        data = Scored.at_random(seed, 12, 0.2)
        order = np.random.default_rng(seed).permutation(12)
        guided, plain, drawn = (Rows(data, order, 40, x) for x in (CachedLosses(data), ZeroGuide(data), RandomGuide(data, 3, 0)))
        for k in range(len(guided)):
            row, zeros, draws = guided[k], plain[k], drawn[k]
            targets = np.arange(len(row.target_ids))
            mapped = row.mapping == MappingStatus.MAPPED
            for mine in (zeros, draws):
                assert np.array_equal(mine.mapping, row.mapping) and np.array_equal(mine.target_ids, row.target_ids)
                assert np.array_equal(mine.first, np.where(mapped, targets, 0))
                assert np.array_equal(mine.last, np.where(mapped, targets + 1, 0))
                assert mine.teacher_losses is not None and len(mine.teacher_losses) == len(targets)
                assert not len(mine.teacher_input_ids) and not len(mine.teacher_target_ids)
            assert not zeros.teacher_losses.any() and (draws.teacher_losses < 0).all() and (draws.teacher_losses >= -1).all()
            for reason in row.mapping.tolist():
                met[MappingStatus(reason)] += 1
    assert met[MappingStatus.MAPPED] > 4000 and met[MappingStatus.END_OF_DOCUMENT] > 200 and met[MappingStatus.NO_CONTEXT] == 0


def test_dummy_prefixes_are_unmapped_for_a_baseline_too(dataset: AlignedDataset) -> None:
    rows = Rows(dataset, np.arange(len(dataset)), S, ZeroGuide(dataset))
    unmapped = [(rows[k].last == rows[k].first, rows[k].mapping) for k in range(0, len(rows), 3)]
    assert all(np.array_equal(without, mapping != MappingStatus.MAPPED) for without, mapping in unmapped)
    assert sum(int((mapping == MappingStatus.NO_TEXT).sum()) for _, mapping in unmapped) > 0


def test_chance_repeats_on_any_number_of_ranks_and_is_new_in_every_epoch_seed_and_dataset(dataset: AlignedDataset) -> None:
    one, two = Layout(2, 4, 1), Layout(2, 2, 2)
    alone = Batches(RandomRows(dataset, S, 3, 0), one, 0).step(16)
    shared = [batch for rank in range(2) for batch in Batches(RandomRows(dataset, S, 3, 0), two, rank).step(16)]
    for a, b in zip(alone, shared, strict=True):
        assert a.teacher_losses is not None and b.teacher_losses is not None
        assert all(np.array_equal(x, y) for x, y in zip(a.teacher_losses, b.teacher_losses, strict=True))

    rows = RandomRows(dataset, S, 3, 0)
    n = rows.rows_in_epoch
    first, later = ([rows[start + k].teacher_losses for k in range(n)] for start in (0, n))
    assert len({x[:2].tobytes() for x in first + later}) == 2 * n > 1000, "every row of every epoch has its own"  # type: ignore[index]
    for other in (RandomRows(dataset, S, 4, 0)[0], RandomRows(dataset, S, 3, 1)[0]):
        assert not np.isin(other.teacher_losses, first[0]).any()
    blend = BlendedRows([RandomRows(dataset, S, 3, part) for part in range(2)], Mixture([1, 1]))
    assert np.array_equal(blend[0].target_ids, blend[1].target_ids)
    assert not np.array_equal(blend[0].teacher_losses, blend[1].teacher_losses)

    flat = -np.concatenate(first)  # type: ignore[arg-type]
    assert len(flat) > 50_000 and flat.dtype == np.float32
    # five standard deviations
    tenths = np.bincount((flat * 10).astype(int).clip(max=9), minlength=10) / len(flat)
    assert np.abs(tenths - 0.1).max() < 5 * np.sqrt(0.09 / len(flat))
    assert abs(np.corrcoef(flat[1:], flat[:-1])[0, 1]) < 5 / np.sqrt(len(flat))


def test_one_long_document_has_new_draws_in_every_epoch_though_its_rows_are_the_same() -> None:
    data = Scored([(np.arange(1, 400), np.arange(1, 400))])
    rows = RandomRows(data, S, 0, 0)
    n = rows.rows_in_epoch
    a, b = ({rows[start + k].target_ids.tobytes(): rows[start + k].teacher_losses for k in range(n)} for start in (0, n))
    assert a.keys() == b.keys() and len(a) == n > 5
    assert not any(torch.equal(torch.from_numpy(a[row]), torch.from_numpy(b[row])) for row in a)
