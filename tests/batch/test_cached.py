"""Rows with cached losses say of each target what the teacher's whole document says, and several teachers speak as one guide."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from megatron_vocagno.batch.cached import CachedLosses, CombinedGuides, combined, guides
from megatron_vocagno.batch.loader import Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import MappingStatus, Rows, TeacherIds
from megatron_vocagno.objective.selection import gather_guide
from tests.batch.test_pack import Invented, positions

AGGREGATES = ("max", "min", "sum", "mean")


class Scored(Invented):
    """With losses as float16 gives them, among them NaN and infinite ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        random = np.random.default_rng(len(self.documents))
        self.losses = []
        for length in self.teacher_lengths:
            # of all magnitudes, so that a sum in float32 would be another one
            losses = (random.gamma(1.0, 3.0, length) * 10 ** random.uniform(-4, 3, length)).astype(np.float16).astype(np.float32)
            losses[random.random(length) < 0.03] = np.nan
            losses[random.random(length) < 0.03] = np.inf
            self.losses.append(losses)
        # its ids tell where they stand, so each has its own number of bytes; what ends a document has none
        self.teacher_byte_lengths = np.zeros(500_000 + 1000 * len(self.documents), np.int32)
        for document, (_, ends) in enumerate(self.documents):
            first = 500_000 + 1000 * document
            self.teacher_byte_lengths[first : first + len(ends)] = np.diff(ends, prepend=0)

    def teacher_losses(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.losses[document][start:stop].copy()


def expected_guide(data: Scored, document: int, token: int, aggregate: str) -> float:
    """From the unpacked document, as one would write it; NaN for an empty span."""
    spans = data.spans(document, token, token + 1)
    losses = data.losses[document][int(spans.first[0]) : int(spans.last[0])].astype(np.float64)
    if not len(losses):
        return float("nan")
    return float(np.float32(getattr(np, aggregate)(losses)))


@pytest.mark.parametrize("common", [0.0, 0.3, 1.0])
def test_a_row_has_the_losses_of_its_documents_wherever_it_starts(common: float) -> None:
    met = dict.fromkeys(MappingStatus, 0)
    without_context = 0
    for seed in range(20):
        data = Scored.at_random(seed, 12, common)
        order = np.random.default_rng(seed).permutation(len(data.documents))
        places = positions(data, order)
        rows, online = (Rows(data, order, 40, teacher) for teacher in (CachedLosses(data), TeacherIds(data)))
        for k in range(len(rows)):
            row, start = rows[k], rows.start(k)
            assert row.teacher_losses is not None and len(row.teacher_losses) == len(row.teacher_starts_document)
            assert not len(row.teacher_input_ids) and not len(row.teacher_target_ids)
            for i in range(len(row.target_ids)):
                document, token = places[start + i + 1]
                spans = data.spans(document, token, token + 1)
                want = data.losses[document][int(spans.first[0]) : int(spans.last[0])]
                assert row.teacher_losses[row.first[i] : row.last[i]].tobytes() == want.tobytes()
                met[MappingStatus(row.mapping[i])] += 1
            without_context += int((online[k].mapping == MappingStatus.NO_CONTEXT).sum())
    assert met[MappingStatus.MAPPED] > 4000 and met[MappingStatus.NO_CONTEXT] == met[MappingStatus.BEYOND_TEACHER] == 0
    assert (without_context > 20) == (common < 1), "online some targets have no context"


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_guide_is_what_the_objective_gathers(aggregate: str) -> None:
    met = special = 0
    for seed in range(10):
        data = Scored.at_random(seed, 12, 0.1)
        rows = Rows(data, np.arange(12), 60, CachedLosses(data))
        for k in range(len(rows)):
            row = rows[k]
            side = rows.teacher.read(rows.pieces(k))
            # as the loop would have it
            first, last, losses = (torch.from_numpy(x)[None] for x in (side.first, side.last, side.losses))
            want = gather_guide(losses, first, last, aggregate)[0].numpy()
            got = guides(side, aggregate)
            assert np.array_equal(got, want, equal_nan=True), "bit for bit"
            met += int((row.last - row.first > 1).sum())
            special += int((~np.isfinite(got)).sum())
    assert met > 1000 and special > 300


@pytest.mark.parametrize(("aggregate", "combine"), product(AGGREGATES, ("min", "mean")))
def test_several_teachers_are_combined_into_one_guide(aggregate: str, combine: str) -> None:
    silent = partly = mapped_by_one = 0
    for seed in range(6):
        # one student, three teachers with other tokens, one of them without a say in most places
        first, second, third = (Scored.at_random(seed + 100 * t, 10, 0.2) for t in range(3))
        teachers = [first, *(share_the_student(first, other) for other in (second, third))]
        order = np.random.default_rng(seed).permutation(10)
        rows = Rows(first, order, 50, CombinedGuides([CachedLosses(data) for data in teachers], aggregate, combine))
        places = positions(first, order)
        for k in range(len(rows)):
            row = rows[k]
            for i in range(len(row.target_ids)):
                document, token = places[rows.start(k) + i + 1]
                each = [expected_guide(data, document, token, aggregate) for data in teachers]
                known = [value for value in each if not np.isnan(value)]
                want = np.float32(np.nan) if not known else np.float32(min(known) if combine == "min" else np.mean(known))
                any_span = any(len(span_of(data, document, token)) for data in teachers)
                assert (row.mapping[i] == MappingStatus.MAPPED) == any_span
                if any_span:
                    assert (row.first[i], row.last[i]) == (i, i + 1)
                    assert np.array_equal(row.teacher_losses[i], want, equal_nan=True)
                silent += any_span and not known
                partly += 0 < len(known) < 3
                mapped_by_one += any_span
    assert mapped_by_one > 800 and partly > 50 and silent > 0


def share_the_student(first: Scored, other: Scored) -> Scored:
    """A teacher's tokens over the first one's documents: as many boundaries as fit, the last one always."""
    documents = []
    for (student, _), (_, teacher) in zip(first.documents, other.documents, strict=True):
        ends = teacher[teacher < student[-1]]
        documents.append((student, np.append(ends, student[-1])))
    return Scored(documents)


def span_of(data: Scored, document: int, token: int) -> range:
    spans = data.spans(document, token, token + 1)
    return range(int(spans.first[0]), int(spans.last[0]))


def test_a_mean_is_rounded_once_and_the_minimum_ignores_teachers_without_a_loss() -> None:
    nan, inf = np.nan, np.inf
    guide = np.array([[1, nan, nan, inf, 1e-8], [2, 3, nan, 1, 1], [nan, 5, nan, nan, 1]], np.float32)
    assert np.array_equal(combined(guide, "min"), np.float32([1, 3, nan, 1, 1e-8]), equal_nan=True)
    mean = combined(guide, "mean")
    assert np.array_equal(mean, np.float32([1.5, 4, nan, inf, (np.float64(np.float32(1e-8)) + 2) / 3]), equal_nan=True)


def test_a_batch_carries_the_losses_of_its_rows() -> None:
    data = Scored.at_random(3, 30, 0.2)
    cached = Batches(TrainRows(data, 48, 5, CachedLosses(data)), Layout(3, 2, 1), 0).step(0)
    online = Batches(TrainRows(data, 48, 5), Layout(3, 2, 1), 0).step(0)
    for mine, other in zip(cached, online, strict=True):
        assert other.teacher_losses is None and mine.teacher_losses is not None and len(mine.teacher_losses) == 3
        assert torch.equal(mine.input_BS, other.input_BS) and torch.equal(mine.target_BS, other.target_BS)
        for b in range(3):
            assert int(mine.last_BS[b].max()) <= len(mine.teacher_losses[b])
