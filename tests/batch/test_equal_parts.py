"""Equal parts cover what equal cuts of both sides say, and how badly they cover it is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vocagno.batch.cached import CachedLosses, CombinedGuides, guides
from megatron_vocagno.batch.equal_parts import EqualParts, overlap, part_ranges
from megatron_vocagno.batch.pack import MappingStatus, Rows, TeacherIds
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.spans import Spans, align, intersection_over_student
from megatron_vocagno.corpus.tokens import Tokens, open_tokenizer
from tests import tokenizers_for_tests as real
from tests.batch.test_cached import Scored, share_the_student
from tests.datasets import build_dataset


def expected(mapped: list[int], begin: int, end: int, parts: int) -> dict[int, list[int]]:
    """Teacher tokens of each mapped target, by asking every token for its part."""
    targets, covering = mapped[-1] - mapped[0] + 1, end - begin
    covered = {}
    for i in mapped:
        part = (i - mapped[0]) * parts // targets
        inside = [begin + j for j in range(covering) if j * parts // covering == part]
        covered[i] = inside or [begin + part * covering // parts]
    return covered


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 16, 40, 200])
def test_a_target_is_covered_by_the_teacher_tokens_of_its_part(parts: int, cached: bool) -> None:
    met = empty = 0
    for seed in range(8):
        data = Scored.at_random(seed, 12, 0.3)
        source = CachedLosses(data) if cached else TeacherIds(data, 30)
        plain, rows = Rows(data, np.arange(12), 50, source), Rows(data, np.arange(12), 50, EqualParts(source, parts))
        for k in range(len(plain)):
            row, aligned = rows[k], plain[k]
            assert np.array_equal(row.mapping, aligned.mapping), "the same targets are mapped"
            assert np.array_equal(row.teacher_target_ids, aligned.teacher_target_ids)
            mapped = np.flatnonzero(aligned.mapping == MappingStatus.MAPPED).tolist()
            if not mapped:
                continue
            begin, end = int(aligned.first[mapped[0]]), int(aligned.last[mapped[-1]])
            for i, covering in expected(mapped, begin, end, parts).items():
                assert list(range(row.first[i], row.last[i])) == covering
                empty += len(covering) == 1
            met += len(mapped)
    assert met > 1000 and (empty > 500) == (parts > 16)


def test_one_part_gives_every_mapped_target_of_a_row_one_guide() -> None:
    met = 0
    for seed in range(10):
        data = Scored.at_random(seed, 12, 0.3)
        source = EqualParts(CachedLosses(data), 1)
        rows = Rows(data, np.arange(12), 40, source)
        for k in range(len(rows)):
            side = source.read(rows.pieces(k))
            guide = guides(side, "mean")[side.first < side.last]
            assert len({value.tobytes() for value in guide}) == 1
            met += len(guide)
    assert met > 2000


def test_each_of_several_teachers_is_cut_before_they_are_combined() -> None:
    met = 0
    for seed in range(5):
        first, other = (Scored.at_random(seed + 100 * t, 10, 0.2) for t in range(2))
        teachers = [first, share_the_student(first, other)]
        sources = [EqualParts(CachedLosses(data), 5) for data in teachers]
        rows = Rows(first, np.arange(10), 50, CombinedGuides(sources, "min", "min"))
        for k in range(len(rows)):
            row = rows[k]
            each = [guides(source.read(rows.pieces(k)), "min") for source in sources]
            mapped = row.mapping == MappingStatus.MAPPED
            assert np.array_equal(row.teacher_losses[mapped], np.fmin(*each)[mapped], equal_nan=True)  # type: ignore[index]
            met += int((each[0][mapped] != each[1][mapped]).sum())
    assert met > 300


# ---- one tokenizer on both sides


@pytest.fixture(scope="module")
def one_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> AlignedDataset:
    tokenizer = real.mistral_tokenizer_path()
    return build_dataset(tmp_path_factory.mktemp("one") / "all", real.texts()[:40] + real.awkward_texts(), tokenizer, tokenizer)


@pytest.mark.parametrize("cached", [True, False])
def test_with_one_tokenizer_every_range_is_the_token_itself_and_so_are_fine_parts(
    one_tokenizer: AlignedDataset, cached: bool
) -> None:
    """The first half of Rho-1's identity; tests/objective has the other."""
    source = TeacherIds(one_tokenizer) if not cached else CachedLosses(WithLosses(one_tokenizer))
    order = np.random.default_rng(1).permutation(len(one_tokenizer))
    rows, fine, coarse = (Rows(one_tokenizer, order, 64, x) for x in (source, EqualParts(source, 64), EqualParts(source, 30)))
    met = differ = 0
    for k in range(0, len(rows), 5):
        row, parted = rows[k], fine[k]
        mapped = row.mapping == MappingStatus.MAPPED
        text = (row.mapping != MappingStatus.END_OF_DOCUMENT) & (row.mapping != MappingStatus.NO_TEXT)
        assert np.array_equal(mapped, text), "what has text is mapped"
        assert ((row.last - row.first)[mapped] == 1).all()
        if not cached:
            assert np.array_equal(row.teacher_target_ids[row.first[mapped]], row.target_ids[mapped])
        assert np.array_equal(parted.first, row.first) and np.array_equal(parted.last, row.last)
        differ += not np.array_equal(coarse[k].first, row.first)
        met += int(mapped.sum())
    assert met > 2000 and differ > 50


class WithLosses:
    """A dataset with random losses of its teacher."""

    def __init__(self, dataset: AlignedDataset) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self.dataset, name)

    def teacher_losses(self, document: int, start: int, stop: int) -> np.ndarray:
        random = np.random.default_rng(document)
        return random.random(int(self.dataset.teacher_lengths[document]), np.float32)[start:stop] * 9


# ---- overlap


@pytest.fixture(scope="module")
def tokenized(teacher_tokenizer: Path) -> list[tuple[Tokens, Tokens]]:
    student, teacher = (open_tokenizer(path) for path in (real.mistral_tokenizer_path(), teacher_tokenizer))
    texts = [text for text in real.texts() if len(text) > 200][:60]
    return list(zip(student.encode_batch(texts), teacher.encode_batch(texts), strict=True))


def test_the_true_alignment_covers_real_text_completely_and_equal_parts_do_not(tokenized: list[tuple[Tokens, Tokens]]) -> None:
    measured = []
    for student, teacher in tokenized:
        spans = align(student, teacher)
        ios, iou = overlap(student.ends, teacher.ends, spans.first, spans.last)
        assert ios == 1.0 and 0.5 < iou <= 1.0
        row = []
        for parts in (1, 4, 16, 64, 256):
            first, last = part_ranges(spans.first, spans.last, len(teacher.ends), parts)
            ios, iou = overlap(student.ends, teacher.ends, first, last)
            # the same from the corpus's own measure
            theirs = intersection_over_student(student, teacher, Spans(first, last, spans.before))
            assert ios == pytest.approx(np.nanmean(theirs), abs=1e-12) and iou <= ios <= 1
            row.append((ios, iou))
        measured.append(row)
    ios, iou = np.moveaxis(np.mean(measured, axis=0), 1, 0)
    assert ios[0] == 1 and (np.diff(ios) < -0.01).all(), "finer parts miss more of the text"
    assert (np.diff(iou) > 0.01).all() and iou[-1] < 0.2, "and cover less of what is not the token's"
