"""A packed row says of its text what the documents say, whatever the order and wherever it is cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from megatron_vocagno.batch.pack import SLACK, MappingStatus, Row, Rows, TeacherIds, TokenStream
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.spans import Spans, align
from megatron_vocagno.corpus.tokens import Tokens


@dataclass
class Invented:
    """Documents with random token boundaries, far apart from each other on purpose, and ids that tell where they stand."""

    documents: list[tuple[np.ndarray, np.ndarray]]
    """Byte ends of both sides, the last token without bytes."""

    @classmethod
    def at_random(cls, seed: int, count: int, common: float) -> Invented:
        random = np.random.default_rng(seed)
        documents = []
        for _ in range(count):
            n_bytes = int(random.integers(1, 120))
            shared = random.random(n_bytes) < common
            owner = random.integers(0, 2, n_bytes)
            sides = []
            for side in range(2):
                ends = np.flatnonzero(shared | ((owner == side) & (random.random(n_bytes) < 0.6))) + 1
                sides.append(np.append(ends[ends < n_bytes], n_bytes).astype(np.int64))
            documents.append((sides[0], sides[1]))
        return cls(documents)

    def __post_init__(self) -> None:
        self.student_lengths = np.array([len(s) + 1 for s, _ in self.documents], np.int32)
        self.teacher_lengths = np.array([len(t) + 1 for _, t in self.documents], np.int32)
        self.aligned = [
            align(Tokens(np.zeros(len(s), np.int32), s), Tokens(np.zeros(len(t), np.int32), t)).with_eos()
            for s, t in self.documents
        ]

    def student(self, document: int, start: int, stop: int) -> np.ndarray:
        return (document * 1000 + np.arange(start, stop)).astype(np.int32)

    def teacher(self, document: int, start: int, stop: int) -> np.ndarray:
        return (500_000 + document * 1000 + np.arange(start, stop)).astype(np.int32)

    def spans(self, document: int, start: int, stop: int) -> Spans:
        whole = self.aligned[document]
        before = int(whole.last[start - 1]) if start else whole.before
        return Spans(whole.first[start:stop], whole.last[start:stop], before)

    def common_boundary(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.spans(document, start, stop).common_boundary


def expected(data, document: int, token: int) -> list[int]:
    """Teacher ids of a student token, from the unpacked document."""
    spans = data.spans(document, token, token + 1)
    return data.teacher(document, int(spans.first[0]), int(spans.last[0])).tolist()


def positions(data, order) -> list[tuple[int, int]]:
    return [(int(d), i) for d in order for i in range(int(data.student_lengths[d]))]


def check_row(data, places: list[tuple[int, int]], start: int, row: Row, met: dict[str, int]) -> None:
    n = len(row.input_ids)
    for i in range(n):
        document, token = places[start + i]
        assert row.input_ids[i] == data.student(document, token, token + 1)[0]
        document, token = places[start + i + 1]
        assert row.target_ids[i] == data.student(document, token, token + 1)[0]
        assert row.starts_document[i] == (token == 0)
        want = expected(data, document, token)
        got = row.teacher_target_ids[row.first[i] : row.last[i]].tolist()
        assert (row.mapping[i] == MappingStatus.END_OF_DOCUMENT) == (token == data.student_lengths[document] - 1)
        match MappingStatus(row.mapping[i]):
            case MappingStatus.MAPPED:
                assert got == want and got
                met["mapped"] += 1
                met["several"] += len(got) > 1
            case MappingStatus.END_OF_DOCUMENT:
                assert got == []
                met["ends"] += 1
            case MappingStatus.NO_TEXT:
                assert got == want == []
                met["no_text"] += 1
            case MappingStatus.NO_CONTEXT:
                assert got == [] and row.teacher_input_ids[:1].tolist() in ([], want[:1])
                assert places[start][1] > 0, "where a row starts with a document, the teacher reads EOS first"
                met["no_context"] += 1
            case MappingStatus.BEYOND_TEACHER:
                assert got == [] and want[-1] != row.teacher_target_ids[-1]
                met["beyond"] += 1
    assert np.array_equal(row.teacher_input_ids[1:], row.teacher_target_ids[:-1])
    document, token = places[start]
    if token == 0 and len(row.teacher_target_ids):
        ids = data.teacher(document, 0, int(data.teacher_lengths[document]))
        assert (row.teacher_input_ids[0], row.teacher_target_ids[0]) == (ids[-1], ids[0])
        met["begun"] = met.get("begun", 0) + 1
    firsts = {int(data.teacher(d, 0, 1)[0]) for d in {d for d, _ in places[start : start + n + 1]}}
    begins = np.isin(row.teacher_target_ids, list(firsts)) if start_ids_are_unique(data) else row.teacher_starts_document
    assert np.array_equal(row.teacher_starts_document, begins)


def start_ids_are_unique(data) -> bool:
    return isinstance(data, Invented)


@pytest.mark.parametrize("common", [0.0, 0.02, 0.3, 1.0])
def test_packed_rows_have_the_spans_and_targets_of_their_documents(common: float) -> None:
    met = dict.fromkeys(("mapped", "several", "ends", "no_text", "no_context", "beyond"), 0)
    cut_inside = 0
    for seed in range(30):
        data = Invented.at_random(seed, count=12, common=common)
        order = np.random.default_rng(seed).permutation(len(data.documents))
        places = positions(data, order)
        row_length = int(np.random.default_rng(seed + 99).integers(2 * SLACK + 1, 70))
        rows = Rows(data, order, row_length)
        start = 0
        for k in range(len(rows)):
            row = rows[k]
            assert rows.start(k) == start and 1 <= len(row.input_ids) <= row_length
            document, token = places[start]
            cut_inside += not data.spans(document, token, token + 1).common_boundary[0]
            check_row(data, places, start, row, met)
            start += len(row.input_ids)
        assert start == len(places) - 1, "every token but the first is a target once"
    assert met["begun"] > 5
    assert met["mapped"] > 5000 and met["ends"] > 300 and (met["no_context"] > 20 and met["several"] > 1000) == (common < 1)
    if common == 0:
        assert cut_inside > 10
    if common == 1:
        assert cut_inside == 0, "where every boundary is common, no row is cut inside a teacher token"


def test_packed_rows_of_real_text_have_the_spans_and_targets_of_their_documents(dataset: AlignedDataset) -> None:
    met = dict.fromkeys(("mapped", "several", "ends", "no_text", "no_context", "beyond"), 0)
    order = np.random.default_rng(5).permutation(len(dataset))
    places = positions(dataset, order)
    rows = Rows(dataset, order, 128)
    for k in range(0, len(rows), 7):
        check_row(dataset, places, rows.start(k), rows[k], met)
    assert met["mapped"] > 10_000 and met["several"] > 100 and met["no_text"] > 0 and met["no_context"] > 0 and met["ends"] > 5


def test_rows_of_real_text_start_where_both_tokenizers_have_a_boundary(dataset: AlignedDataset) -> None:
    order = np.arange(len(dataset))
    places = positions(dataset, order)
    rows = Rows(dataset, order, 64)

    def inside_a_teacher_token(position: int) -> bool:
        document, token = places[position]
        return not dataset.spans(document, token, token + 1).common_boundary[0]

    at_stride = sum(inside_a_teacher_token(k * rows.stride) for k in range(len(rows)))
    at_start = sum(inside_a_teacher_token(rows.start(k)) for k in range(len(rows)))
    assert at_stride > 50, "nothing had to be backed up"
    assert at_start <= at_stride // 20, "common boundaries farther apart than the slack are rare, even in awkward texts"


def test_no_row_needs_more_than_the_teacher_reads() -> None:
    longest = 0
    met = dict.fromkeys(("mapped", "several", "ends", "no_text", "no_context", "beyond"), 0)
    for seed in range(20):
        data = Invented.at_random(seed, count=10, common=0.2)
        order = np.arange(len(data.documents))
        places = positions(data, order)
        rows = Rows(data, order, 60, TeacherIds(data, 30))
        for k in range(len(rows)):
            row = rows[k]
            longest = max(longest, len(row.teacher_target_ids))
            check_row(data, places, rows.start(k), row, met)
    assert longest == 30
    assert met["beyond"] > 100 and met["mapped"] > 1000


def test_a_span_never_leaves_its_document(dataset: AlignedDataset) -> None:
    order = np.random.default_rng(1).permutation(len(dataset))
    rows = Rows(dataset, order, 64)
    places = positions(dataset, order)
    teacher = TokenStream.of(order, dataset.teacher_lengths)
    checked = 0
    for k in range(0, len(rows), 11):
        row, start = rows[k], rows.start(k)
        document, token = places[start]
        slot = int(np.flatnonzero(order == document)[0])
        before = int(dataset.spans(document, token, token + 1).first[0]) + 1 if token else 0
        origin = int(teacher.starts[slot]) + before
        for i in np.flatnonzero(row.mapping == MappingStatus.MAPPED):
            slot = int(np.flatnonzero(order == places[start + i + 1][0])[0])
            low, high = origin + int(row.first[i]), origin + int(row.last[i])
            assert teacher.starts[slot] <= low < high <= teacher.starts[slot + 1] - 1, "the teacher's EOS is no text"
            checked += 1
    assert checked > 3000


def test_rows_that_are_too_short_are_refused(dataset: AlignedDataset) -> None:
    with pytest.raises(ValueError, match=r"\b16\b.*\b17\b"):
        Rows(dataset, np.arange(len(dataset)), 16)
    rows = Rows(dataset, np.arange(len(dataset)), 64)
    with pytest.raises(IndexError, match=f"row {len(rows)} of {len(rows)}"):
        rows[len(rows)]
