"""Batches as a pure function of (datasets, seed, step, micro-batch, data-parallel rank).

There are no workers, no state and no prefetching. All ranks that read the same rows get the same bytes for the same batch, and a
resumed run only needs the number of rows that it has consumed. A global batch is `dp * gas` micro-batches of B rows. Micro-batch
m of data-parallel rank d holds rows [(d * gas + m) * B, (d * gas + m + 1) * B) of the global batch. The same rows therefore form
the same micro-batches on any number of ranks, and the order of the ranks is the order of the rows, so that a ranking over all
ranks breaks ties in the same way.
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
"""Target of a position without a loss: padding, and in evaluation the first tokens and the ends of documents."""


@dataclass(frozen=True)
class Batch:
    """B rows. The student's side is padded to [B, S]. The teacher's side is ragged: one array per row.

    The first `lead` student positions of each row, and the first `teacher_leads[b]` teacher positions of row b, hold the prefix
    (see front.py) and have no target.
    """

    input_BS: Tensor
    """[B, S] int64, 0 in the padding."""
    target_BS: Tensor
    """[B, S] int64, IGNORE in prefix and padding."""
    text_BS: Tensor
    """[B, S] bool, whether the target is text: neither the first token nor the end of a document."""
    first_BS: Tensor
    last_BS: Tensor
    """[B, S] int32, positions among the row's teacher targets, half-open; first == last if the target is unmapped."""
    segment_BS: Tensor
    """[B, S] int32, number of the document that a position belongs to, ascending from 0 in each row. A position belongs to the
    document of its target, so the token that ends one document is the first input of the next one. Padding belongs to the last
    document.
    """
    lead: int
    teacher_inputs: tuple[Int32, ...]
    """B arrays of lead + u token ids each; empty arrays if the losses are cached."""
    teacher_targets: tuple[Int32, ...]
    """B arrays of u token ids each: the tokens that first_BS and last_BS count. The arrays are empty if the losses are cached."""
    teacher_segments: tuple[Int32, ...]
    """B arrays [lead + u], as segment_BS."""
    teacher_leads: tuple[int, ...]
    teacher_losses: tuple[Float32, ...] | None
    """B arrays [u], nats, if they are cached; else None."""
    teacher_text_losses: tuple[TextLoss, ...]
    """The losses of each teacher over the text of the rows. Empty if the losses are not cached."""
    mapping_counts: tuple[int, ...]
    """Number of targets with each `MappingStatus`."""
    row_mapped: tuple[int, ...]
    row_unmapped: tuple[int, ...]
    """Number of mapped and of unmapped targets in each row."""


@dataclass(frozen=True)
class Layout:
    """How a global batch is distributed: rows per micro-batch, micro-batches per step and rank, and data-parallel ranks."""

    micro_batch_rows: int
    micro_batches: int
    data_parallel: int
    """Number of ranks, or of groups of ranks, that read different rows."""
    sequence: int = 1
    """Number of ranks that share each row, without a pipeline."""

    @property
    def rows(self) -> int:
        """Rows per step, over all ranks."""
        return self.micro_batch_rows * self.micro_batches * self.data_parallel

    @property
    def averaged(self) -> int:
        """The number of losses over which DeepSpeed averages gradients: one per micro-batch and rank."""
        return self.micro_batches * self.data_parallel * self.sequence

    def offsets(self, micro: int, rank: int) -> range:
        """The rows of a global batch that form micro-batch `micro` of data-parallel rank `rank`."""
        start = (rank * self.micro_batches + micro) * self.micro_batch_rows
        return range(start, start + self.micro_batch_rows)


class TrainRows:
    """An endless sequence of rows. Each epoch has its own order of documents and rows."""

    def __init__(
        self,
        dataset: AlignedDocuments,
        row_length: int,
        seed: int,
        teacher: TeacherSource | None = None,
        front: Front = NO_FRONT,
    ) -> None:
        """row_length, teacher and front: see Rows. Raises ValueError: the dataset gives no row, or the rows are too short."""
        self.dataset, self.row_length, self.seed, self.teacher, self.front = dataset, row_length, seed, teacher, front
        # two epochs, because a batch may span two; an order of 6 M documents takes about a second and 100 MB
        self._epoch = lru_cache(maxsize=2)(self._open_epoch)
        if not len(self._epoch(0)[0]):
            raise ValueError("the dataset holds fewer than two tokens: nothing to learn from")

    @property
    def rows_in_epoch(self) -> int:
        """Rows per epoch. All epochs have the same number, because it depends only on the number of tokens."""
        return len(self._epoch(0)[0])

    @property
    def tokens_per_row(self) -> float:
        """Mean number of targets per row."""
        return (int(self.dataset.student_lengths.sum()) - 1) / self.rows_in_epoch

    def __getitem__(self, index: int) -> Row:
        rows, k = self._row(index)
        return rows[k]

    def pieces(self, index: int) -> list[DocumentSpan]:
        """The spans of documents that row `index` holds."""
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
        """The source of the teacher's side of the rows of an epoch."""
        return self.teacher


class EndlessRows(Protocol):
    """Rows of one dataset or of a blend."""

    @property
    def row_length(self) -> int:
        """Student positions per row, S."""
        ...

    def __getitem__(self, index: int) -> Row: ...


class Batches:
    """The micro-batches of one data-parallel rank."""

    def __init__(self, rows: EndlessRows, layout: Layout, rank: int) -> None:
        self.rows, self.layout, self.rank = rows, layout, rank

    def step(self, rows_done: int) -> list[Batch]:
        """The micro-batches of the step that begins after `rows_done` consumed rows."""
        return [
            collate([self.rows[rows_done + offset] for offset in self.layout.offsets(micro, self.rank)], self.rows.row_length)
            for micro in range(self.layout.micro_batches)
        ]


@dataclass(frozen=True)
class TextBatches:
    """Micro-batches in which only text has targets."""

    batches: tuple[Batch, ...]
    tokens: int
    text_bytes: int
    """Number of targets in these batches, and of their UTF-8 bytes."""


def evaluation_batches(
    dataset: AlignedDocuments,
    byte_lengths: Int32,
    row_length: int,
    layout: Layout,
    rank: int,
    limit: int | None,
    front: Front = NO_FRONT,
) -> Iterator[TextBatches]:
    """The rows in file order, at most `limit`, as steps of one data-parallel rank. The last step is filled with empty rows.

    byte_lengths  [V] UTF-8 bytes of each token of the student's vocabulary

    The ends and the first tokens of documents are not scored, see text_losses.py.
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
    """Combine rows into one batch, padded to [B, S]. row_length: S."""
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
        teacher_text_losses=summed(row.teacher_text_losses for row in rows),
        mapping_counts=tuple(counts.tolist()),
        row_mapped=tuple(mapped),
        row_unmapped=tuple(len(row.mapping) - count for row, count in zip(rows, mapped, strict=True)),
    )


def _teacher_segments(row: Row) -> Int32:
    """[lead + u] int32, as Batch.segment_BS."""
    begins = np.concatenate([np.zeros(len(row.teacher_lead_ids), np.bool_), row.teacher_starts_document])
    segments: Int32 = begins.cumsum(dtype=np.int32)
    return segments


def _all_or_none(losses: list[Float32 | None]) -> tuple[Float32, ...] | None:
    known = tuple(row for row in losses if row is not None)
    assert len(known) in (0, len(losses)), "some rows of the batch have cached losses, others do not"
    return known or None


_NO_TOKENS = np.zeros(0, np.int32)
EMPTY_ROW = Row(
    input_ids=_NO_TOKENS,
    target_ids=_NO_TOKENS,
    starts_document=np.zeros(0, np.bool_),
    first=_NO_TOKENS,
    last=_NO_TOKENS,
    mapping=np.zeros(0, np.uint8),
    teacher_input_ids=_NO_TOKENS,
    teacher_target_ids=_NO_TOKENS,
    teacher_starts_document=np.zeros(0, np.bool_),
)
