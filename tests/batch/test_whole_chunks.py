"""Which chunks a row holds as a whole, against the bytes of the documents."""

from __future__ import annotations

import numpy as np

from megatron_vocagno.batch.cached import CachedLosses, combined
from megatron_vocagno.batch.pack import MappingStatus, Rows, TeacherIds
from megatron_vocagno.batch.whole_chunks import CombinedChunks, WholeChunks
from tests.batch.test_cached import Scored
from tests.batch.test_pack import Invented


def chunk_of_tokens(data: Invented, document: int) -> list[tuple[int, int]]:
    """For each student token of a document, the bytes of its chunk."""
    student, teacher = (ends.tolist() for ends in data.documents[document])
    common = sorted({0} | set(student) & set(teacher))
    starts = [0, *student[:-1]]
    return [(max(c for c in common if c <= a), min(c for c in common if c >= b)) for a, b in zip(starts, student, strict=True)]


def test_a_chunk_is_mapped_only_if_the_row_holds_all_of_it() -> None:
    met = {"whole": 0, "cut at the start": 0, "cut at the end": 0, "of many": 0}
    for seed, common in ((1, 0.3), (2, 0.05), (3, 0.6)):
        data = Scored.at_random(seed, 60, common)
        order = np.random.default_rng(seed).permutation(60).astype(np.int32)
        chunks = [chunk_of_tokens(data, document) for document in range(60)]
        for source in (CachedLosses(data), TeacherIds(data)):
            rows, plain = Rows(data, order, 40, WholeChunks(source, data)), Rows(data, order, 40, source)
            for k in range(len(rows)):
                row = rows[k]
                places = [(piece.document, token) for piece in rows.pieces(k) for token in range(piece.start, piece.stop)][1:]
                own: dict[tuple[int, tuple[int, int]], int] = {}
                for document, token in places:
                    if token < len(chunks[document]):
                        own[document, chunks[document][token]] = own.get((document, chunks[document][token]), 0) + 1
                for i, (document, token) in enumerate(places):
                    if token == len(chunks[document]):
                        assert row.mapping[i] == MappingStatus.END_OF_DOCUMENT
                        continue
                    chunk = chunks[document][token]
                    whole = own[document, chunk] == chunks[document].count(chunk)
                    assert (row.mapping[i] == MappingStatus.MAPPED) == whole, (seed, k, i)
                    if whole:
                        assert (row.first[i], row.last[i]) == (plain[k].first[i], plain[k].last[i])
                    met["whole"] += whole
                    met["of many"] += whole and own[document, chunk] > 2
                    met["cut at the start"] += not whole and i < 8
                    met["cut at the end"] += not whole and i > len(places) - 8
    assert min(met.values()) > 10, met


def test_with_several_teachers_a_chunk_ends_where_all_have_a_boundary() -> None:
    """The loss of a chunk is the lowest, or the mean, of the teachers' sums over its bytes."""
    first = Scored.at_random(4, 30, 0.4)
    second = Scored([(student, np.unique(np.append(teacher[::2], teacher[-1]))) for student, teacher in first.documents])
    order, met = np.arange(30, dtype=np.int32), 0
    for how in ("min", "mean"):
        scored = [first, second]
        sources = [WholeChunks(CachedLosses(data), data) for data in scored]
        rows = Rows(first, order, 40, CombinedChunks(sources, how))  # type: ignore[arg-type]
        for k in range(len(rows)):
            row = rows[k]
            assert row.teacher_losses is not None
            places = [(piece.document, token) for piece in rows.pieces(k) for token in range(piece.start, piece.stop)][1:]
            for i in np.flatnonzero(row.mapping == MappingStatus.MAPPED):
                document, _ = places[i]
                members = np.flatnonzero((row.first == row.first[i]) & (row.mapping == MappingStatus.MAPPED))
                ends = first.documents[document][0]
                begin = int(ends[places[members[0]][1] - 1]) if places[members[0]][1] else 0
                end = int(ends[places[members[-1]][1]])
                sums = []
                for data in scored:
                    teacher_ends = data.documents[document][1]
                    low = int(np.searchsorted(teacher_ends, begin, side="right"))
                    high = int(np.searchsorted(teacher_ends, end, side="left")) + 1
                    assert begin in (0, *teacher_ends) and end in teacher_ends
                    sums.append(data.teacher_losses(document, low, high).astype(np.float64).sum())
                want = combined(np.array(sums, np.float32)[:, None], how)[0]  # type: ignore[arg-type]
                assert np.array_equal(row.teacher_losses[row.first[i]], want, equal_nan=True) and row.last[i] == row.first[i] + 1
                met += len(members) > 1
    assert met > 50


def behind_no_text(ends: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """With up to two tokens without bytes at the start, as of a dummy prefix."""
    return np.concatenate([np.zeros(random.integers(0, 3), np.int64), ends])


def test_tokens_without_text_and_a_teacher_that_reads_less_than_the_row() -> None:
    met = {"whole": 0, "beyond the teacher": 0, "no text": 0}
    for seed, limit in ((1, 1000), (2, 1000), (3, 25), (4, 12)):
        random = np.random.default_rng(seed)
        made = Scored.at_random(seed, 40, 0.3)
        data = Scored([(behind_no_text(student, random), behind_no_text(teacher, random)) for student, teacher in made.documents])
        order = random.permutation(40).astype(np.int32)
        chunks = [chunk_of_tokens(data, document) for document in range(40)]
        source = TeacherIds(data, limit)
        rows, plain = Rows(data, order, 40, WholeChunks(source, data)), Rows(data, order, 40, source)
        for k in range(len(rows)):
            mapping, of_source = rows[k].mapping, plain[k].mapping
            places = [(piece.document, token) for piece in rows.pieces(k) for token in range(piece.start, piece.stop)][1:]
            members: dict[tuple[int, tuple[int, int]], list[int]] = {}
            for i, (document, token) in enumerate(places):
                if token < len(chunks[document]) and of_source[i] != MappingStatus.NO_TEXT:
                    members.setdefault((document, chunks[document][token]), []).append(i)
                else:
                    assert mapping[i] == of_source[i] != MappingStatus.MAPPED
                    met["no text"] += mapping[i] == MappingStatus.NO_TEXT
            for (document, chunk), inside in members.items():
                begin, ends = 0, data.documents[document][0].tolist()
                count = 0
                for end, of_token in zip(ends, chunks[document], strict=True):
                    count += of_token == chunk and begin < end
                    begin = end
                reasons = of_source[inside]
                whole = len(inside) == count and (reasons == MappingStatus.MAPPED).all()
                assert ((mapping[inside] == MappingStatus.MAPPED) == whole).all(), (seed, k, chunk)
                met["whole"] += whole
                met["beyond the teacher"] += not whole and MappingStatus.MAPPED in reasons and len(inside) == count
    assert min(met.values()) > 10, met
