"""Batches as a pure function of (datasets, seed, step, micro-batch, data-parallel rank).

No worker, no state, no look-ahead: the ranks of one pipeline ask for the same batch and get the same bytes, and a resumed
run needs nothing but the number of rows it has consumed. A global batch is `dp * gas` micro-batches of B rows, micro-batch
m of data-parallel rank d holding rows [(d * gas + m) * B, …) of it: the same rows make the same micro-batches on any number
of ranks, and the ranks in their order hold the rows in theirs, so that a ranking over all of them settles ties alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.batch.pack import AlignedDocuments, DocumentSpan, Float32, Int32, MappingStatus, Row, Rows, TeacherSource
from megatron_vocagno.batch.text_losses import TextLoss, summed

IGNORE = -100
"""Target of a position that is not learned: padding, and in evaluation the ends of documents."""


@dataclass(frozen=True)
class Batch:
    """B rows. The student's side is padded to [B, S]; the teacher's is ragged, one array a row.

    The first `lead` student positions of each row, and the first `teacher_leads[b]` of the teacher's, are read in front of text
    and have no target.
    """

    input_BS: Tensor
    """[B, S] int64, 0 where there is no token."""
    target_BS: Tensor
    """[B, S] int64, IGNORE where there is no token."""
    text_BS: Tensor
    """[B, S] bool, whether the target is text: neither the first token nor the end of a document."""
    first_BS: Tensor
    last_BS: Tensor
    """[B, S] int32, positions among the row's teacher targets, half-open; first == last where unmapped."""
    segment_BS: Tensor
    """[B, S] int32, which of the row's documents a position belongs to: that of its target, so that the token that ends one
    document is the first input of the next. Ascending from 0; padding belongs to the last document.
    """
    lead: int
    teacher_inputs: tuple[Int32, ...]
    """B arrays of lead + u token ids each; without any where the losses are cached."""
    teacher_targets: tuple[Int32, ...]
    """B arrays of u token ids: what the spans count."""
    teacher_segments: tuple[Int32, ...]
    """B arrays [lead + u], as segment_BS."""
    teacher_leads: tuple[int, ...]
    teacher_losses: tuple[Float32, ...] | None
    """B arrays [u], nats, where they are cached."""
    said: tuple[TextLoss, ...]
    """What each teacher whose losses are cached said of the rows' text."""
    mapping_counts: tuple[int, ...]
    """How many targets have each `MappingStatus`."""
    row_mapped: tuple[int, ...]
    row_unmapped: tuple[int, ...]
    """How many targets of each row are mapped, and how many are not."""


@dataclass(frozen=True)
class Layout:
    """How a global batch is dealt: B rows a micro-batch, so many micro-batches a step, on so many data-parallel ranks."""

    micro_batch_rows: int
    micro_batches: int
    data_parallel: int

    @property
    def rows(self) -> int:
        """Rows of a step, over all ranks."""
        return self.micro_batch_rows * self.micro_batches * self.data_parallel

    def offsets(self, micro: int, rank: int) -> range:
        """The rows of a global batch that micro-batch `micro` of data-parallel rank `rank` holds."""
        start = (rank * self.micro_batches + micro) * self.micro_batch_rows
        return range(start, start + self.micro_batch_rows)


class TrainRows:
    """Rows without end: epoch after epoch, each with its own order of documents and of rows."""

    def __init__(
        self,
        dataset: AlignedDocuments,
        row_length: int,
        seed: int,
        teacher: TeacherSource | None = None,
        front: Front = NO_FRONT,
    ) -> None:
        """row_length, teacher and front: see Rows. Raises ValueError: no row in the dataset, or rows too short."""
        self.dataset, self.row_length, self.seed, self.teacher, self.front = dataset, row_length, seed, teacher, front
        # two epochs: a batch may reach over the border; an order of 6 M documents takes about a second and 100 MB
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)
        if not len(self._epoch(0)[0]):
            raise ValueError("the dataset holds fewer than two tokens: nothing to learn from")

    @property
    def rows_in_epoch(self) -> int:
        """The same in every epoch: it depends on the number of tokens alone."""
        return len(self._epoch(0)[0])

    @property
    def tokens_per_row(self) -> float:
        """Mean number of targets."""
        return (int(self.dataset.student_lengths.sum()) - 1) / self.rows_in_epoch

    def __getitem__(self, index: int) -> Row:
        rows, k = self._row(index)
        return rows[k]

    def pieces(self, index: int) -> list[DocumentSpan]:
        """What row `index` holds."""
        rows, k = self._row(index)
        return rows.pieces(k)

    def _row(self, index: int) -> tuple[Rows, int]:
        epoch, k = divmod(index, self.rows_in_epoch)
        rows, order = self._epoch(epoch)
        return rows, int(order[k])

    def _open_epoch(self, epoch: int) -> tuple[Rows, Int32]:
        random = np.random.default_rng([self.seed, epoch])
        documents = random.permutation(np.arange(len(self.dataset.student_lengths), dtype=np.int32))
        rows = Rows(self.dataset, documents, self.row_length, self._source(epoch), self.front)
        return rows, random.permutation(np.arange(len(rows), dtype=np.int32))

    def _source(self, epoch: int) -> TeacherSource | None:
        """The teacher's side of an epoch's rows."""
        return self.teacher


class EndlessRows(Protocol):
    """Rows of one dataset or of a blend."""

    @property
    def row_length(self) -> int:
        """Student positions, S."""
        ...

    def __getitem__(self, index: int) -> Row: ...


class Batches:
    """The micro-batches of one data-parallel rank."""

    def __init__(self, rows: EndlessRows, layout: Layout, rank: int) -> None:
        self.rows, self.layout, self.rank = rows, layout, rank

    def step(self, rows_done: int) -> list[Batch]:
        """The micro-batches that follow so many consumed rows."""
        return [
            collate([self.rows[rows_done + offset] for offset in self.layout.offsets(micro, self.rank)], self.rows.row_length)
            for micro in range(self.layout.micro_batches)
        ]


@dataclass(frozen=True)
class TextBatches:
    """Micro-batches whose targets are text alone."""

    batches: tuple[Batch, ...]
    tokens: int
    text_bytes: int
    """Targets of these batches, and their UTF-8 bytes."""


def evaluation_batches(
    dataset: AlignedDocuments,
    byte_lengths: Int32,
    row_length: int,
    layout: Layout,
    rank: int,
    limit: int | None,
    front: Front = NO_FRONT,
) -> Iterator[TextBatches]:
    """The rows in file order, `limit` at most, as steps of one data-parallel rank; missing rows of the last step are empty.

    byte_lengths [V]: UTF-8 bytes of each student token. Ends of documents are not scored, they are no text; nor are the first
    tokens of documents: nothing before them speaks of them, and a dummy prefix makes their number of bytes depend on the text.
    """
    rows = Rows(dataset, np.arange(len(dataset.student_lengths), dtype=np.int32), row_length, front=front)
    count = len(rows) if limit is None else min(limit, len(rows))
    for start in range(0, count, layout.rows):
        batches, tokens, text_bytes = [], 0, 0
        for micro in range(layout.micro_batches):
            share = [rows[start + o] if start + o < count else EMPTY_ROW for o in layout.offsets(micro, rank)]
            tokens += sum(int(row.is_text.sum()) for row in share)
            text_bytes += sum(int(byte_lengths[row.target_ids[row.is_text]].sum()) for row in share)
            batches.append(
                collate([replace(row, target_ids=np.where(row.is_text, row.target_ids, IGNORE)) for row in share], row_length)
            )
        yield TextBatches(tuple(batches), tokens, text_bytes)


def collate(rows: list[Row], row_length: int) -> Batch:
    """Pad rows to [B, S]."""
    shape = (len(rows), row_length)
    inputs, targets, text = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64), np.zeros(shape, np.bool_)
    first, last, begins = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    lead = max(len(row.lead_ids) for row in rows)
    for b, row in enumerate(rows):
        inputs[b, : len(row.lead_ids)] = row.lead_ids
        own = slice(lead, lead + len(row.input_ids))
        inputs[b, own], targets[b, own], text[b, own] = row.input_ids, row.target_ids, row.is_text
        first[b, own], last[b, own], begins[b, own] = row.first, row.last, row.starts_document
    counts = np.bincount(np.concatenate([row.mapping for row in rows]), minlength=len(MappingStatus))
    mapped = [int(np.count_nonzero(row.mapping == MappingStatus.MAPPED)) for row in rows]
    return Batch(
        input_BS=torch.from_numpy(inputs),
        target_BS=torch.from_numpy(targets),
        text_BS=torch.from_numpy(text),
        first_BS=torch.from_numpy(first),
        last_BS=torch.from_numpy(last),
        segment_BS=torch.from_numpy(begins.cumsum(1, dtype=np.int32)),
        lead=lead,
        teacher_inputs=tuple(np.concatenate([np.array(row.teacher_lead_ids, np.int32), row.teacher_input_ids]) for row in rows),
        teacher_targets=tuple(row.teacher_target_ids for row in rows),
        teacher_segments=tuple(_teacher_segments(row) for row in rows),
        teacher_leads=tuple(len(row.teacher_lead_ids) for row in rows),
        teacher_losses=_all_or_none([row.teacher_losses for row in rows]),
        said=summed(row.said for row in rows),
        mapping_counts=tuple(counts.tolist()),
        row_mapped=tuple(mapped),
        row_unmapped=tuple(len(row.mapping) - count for row, count in zip(rows, mapped, strict=True)),
    )


def _teacher_segments(row: Row) -> Int32:
    """[lead + u]"""
    begins = np.concatenate([np.zeros(len(row.teacher_lead_ids), np.bool_), row.teacher_starts_document])
    segments: Int32 = begins.cumsum(dtype=np.int32)
    return segments


def _all_or_none(losses: list[Float32 | None]) -> tuple[Float32, ...] | None:
    known = tuple(row for row in losses if row is not None)
    assert len(known) in (0, len(losses)), "the rows of a batch have one kind of teacher"
    return known or None


_NOTHING = np.zeros(0, np.int32)
EMPTY_ROW = Row(
    input_ids=_NOTHING,
    target_ids=_NOTHING,
    starts_document=np.zeros(0, np.bool_),
    first=_NOTHING,
    last=_NOTHING,
    mapping=np.zeros(0, np.uint8),
    teacher_input_ids=_NOTHING,
    teacher_target_ids=_NOTHING,
    teacher_starts_document=np.zeros(0, np.bool_),
)
