"""The sample rows of a run: read once, scored by the teacher once, and by the student at every evaluation.

The student's losses are computed by forward passes, with the rows assigned to ranks as in a training step. Each loss is computed
by one rank and is 0 on the others, so the sum over all ranks is exact. The first rank selects and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import EMPTY_ROW, IGNORE, collate
from megatron_vocagno.batch.pack import Int32, Row, Rows, TeacherTargets
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.cached import TeacherSources
from megatron_vocagno.engine.collectives import all_reduce_sum, my_rank, run_on_rank0
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.errors import RunError
from megatron_vocagno.training.sample_files import FOLDER, SampleRows, SampleStep, difference, read_rows, step_files, write_rows


class Samples:
    """The first rows of `data.valid`, with the teacher's losses."""

    def __init__(
        self,
        count: int,
        row_length: int,
        datasets: Sequence[AlignedDataset],
        valid: AlignedDataset,
        sources: TeacherSources,
        front: Front,
    ) -> None:
        """
        count     number of rows (`logging.samples`); fewer if `valid` contains fewer
        datasets  of `data.train`
        front     prefix of the student

        Raises RunError if cached losses are missing, or if there is no row.
        """
        self.requested, self.row_length, self.guidance, self._lead = count, row_length, sources.guidance, len(front)
        order = np.arange(len(valid.student_lengths), dtype=np.int32)
        rows = Rows(valid, order, row_length, sources.held_out(datasets, valid), front)
        if not len(rows):
            raise RunError(f"{valid.path} contains fewer than two tokens: there is no row for logging.samples")
        count = min(count, len(rows))
        self._rows = [rows[k] for k in range(count)]
        # objectives that select without a teacher replace the alignment; the sample files contain the one of the dataset
        replaced = self.guidance.selects and not self.guidance.needs_teacher
        aligned = Rows(valid, order, row_length, front=front) if replaced else rows
        self.rows = _sample_rows(valid, aligned, self._rows, [aligned[k] for k in range(count)] if replaced else self._rows)
        self._teacher_loss_RU: Tensor | None = None

    def prepare(self, output: Path, step: int, report: Callable[[str], None]) -> None:
        """Write the file of the rows, and remove the files of later steps. Collective over the world.

        step    the number of steps already done
        report  gets lines for the user, on the first rank only

        Raises SharedError, and removes nothing, if the folder contains files of other rows or of another release that this run
        would not write again.
        """
        run_on_rank0(lambda: self._prepare(output, step, report), RunError, OSError)

    def _prepare(self, output: Path, step: int, report: Callable[[str], None]) -> None:
        files = list(step_files(output))
        # a run that starts over evaluates before its first step again, so the file of step 0 is removed too
        outdated = [path for written, path in files if written > step or not step]
        if len(outdated) < len(files):
            existing = read_rows(output)
            if differs := difference(existing, self.rows):
                raise RunError(
                    f"{output / FOLDER} contains {len(existing)} rows of {existing.dataset} ({existing.fingerprint}), "
                    f"this run has {len(self.rows)} of {self.rows.dataset} ({self.rows.fingerprint}).\n"
                    f"  They differ in {differs}, so they cannot be compared. Move the folder away, or restore that setting."
                )
        for path in outdated:
            path.unlink()
        write_rows(output, self.rows)
        if (count := len(self.rows)) < self.requested:
            report(f"note: logging.samples = {self.requested:,} rows, but {self.rows.dataset} has only {count:,}: all are used")

    def evaluate(
        self, step: int, engine: TrainEngine, scorer: Scorer | None, stop_requested: Callable[[], int]
    ) -> SampleStep | None:
        """The losses and the selection after a step, on the first rank. None on other ranks, or if a stop is requested meanwhile.

        stop_requested  whether a stop is requested on any rank. Collective over the world

        Collective over the world.
        """
        layout, count = engine.layout, len(self.rows)
        loss_RS = torch.zeros(self.rows.target_RS.shape, device=engine.objective.device)
        teacher_loss_RU = self._teacher_loss_RU
        longest = max(len(row.teacher_starts_document) for row in self._rows)
        scored_RU = torch.zeros(count, longest, device=loss_RS.device) if teacher_loss_RU is None else None
        for start in range(0, count, layout.rows):
            if stop_requested():
                return None
            own = [[start + o for o in layout.offsets(micro, engine.data_rank)] for micro in range(layout.micro_batches)]
            batches = [collate([self._row(k) for k in micro], self.row_length) for micro in own]
            if scored_RU is not None and scorer is not None:
                _put(scored_RU, own, scorer.score(batches))
            _put(loss_RS, own, [loss_BS[:, self._lead :] for loss_BS in engine.student_losses(batches)])
        all_reduce_sum(loss_RS)
        if scored_RU is not None:
            # the ranks that read the same rows divide the scoring between them, and all have the result
            all_reduce_sum(scored_RU, engine.data_group)
            teacher_loss_RU = self._teacher_loss_RU = scored_RU.cpu()
        assert teacher_loss_RU is not None
        return self._select(step, engine, loss_RS.cpu(), teacher_loss_RU) if my_rank() == 0 else None

    def _select(self, step: int, engine: TrainEngine, loss_RS: Tensor, teacher_loss_RU: Tensor) -> SampleStep:
        valid_RS = torch.from_numpy(self.rows.valid_RS)
        guide_RS, weight_RS = torch.full_like(loss_RS, torch.nan), valid_RS.float()
        if self.guidance.selects:
            batch = collate(self._rows, self.row_length)
            # a batch begins with the prefix, at which there is no loss: roll the unused end of the rows there, and back
            selection = engine.select_only(batch, loss_RS.roll(self._lead, 1), teacher_loss_RU)
            weight_RS = selection.weight_BS.roll(-self._lead, 1)
            if self.guidance.needs_teacher:
                guide_RS = selection.guide_BS.roll(-self._lead, 1)
        loss_RS = loss_RS.masked_fill(~valid_RS, torch.nan)
        return SampleStep(step, loss_RS.numpy(), guide_RS.numpy(), weight_RS.numpy(), self.guidance)

    def _row(self, k: int) -> Row:
        """Row k, or an empty row after the last one."""
        if k < len(self._rows):
            return self._rows[k]
        losses = self._rows[0].teacher_losses
        return EMPTY_ROW if losses is None else replace(EMPTY_ROW, teacher_losses=losses[:0])


def _put(all_RX: Tensor, indices: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> None:
    """Copy the rows of micro-batches to their indices. Indices after the last row belong to empty rows, which are dropped."""
    for of_batch, part_BX in zip(indices, parts, strict=False):
        for k, row_X in zip(of_batch, part_BX.float(), strict=True):
            if k < len(all_RX):
                all_RX[k, : len(row_X)] = row_X


def _sample_rows(valid: AlignedDataset, rows: Rows, read: Sequence[Row], aligned: Sequence[Row]) -> SampleRows:
    """aligned: the rows `read` with the dataset's own alignment, and with `rows` as their source."""
    places = [[np.concatenate(parts)[1:] for parts in zip(*_places(rows, k), strict=True)] for k in range(len(read))]
    teacher = [_teacher_ids(valid, rows, k, row) for k, row in enumerate(aligned)]
    longest = max(map(len, teacher))
    return SampleRows(
        target_RS=_padded([row.target_ids for row in read], rows.row_length, IGNORE),
        document_RS=_padded([documents for documents, _ in places], rows.row_length, -1),
        token_RS=_padded([tokens for _, tokens in places], rows.row_length, -1),
        first_RS=_padded([row.first for row in aligned], rows.row_length, 0),
        last_RS=_padded([row.last for row in aligned], rows.row_length, 0),
        mapping_RS=_padded([row.mapping for row in read], rows.row_length, 0).astype(np.uint8),
        teacher_RU=_padded(teacher, longest, -1),
        dataset=str(valid.path),
        fingerprint=valid.fingerprint,
    )


def _places(rows: Rows, k: int) -> Iterator[tuple[Int32, Int32]]:
    """Document number and index in the document, for all tokens of a row: its inputs and its last target."""
    for document, start, stop in rows.pieces(k):
        yield np.full(stop - start, document, np.int32), np.arange(start, stop, dtype=np.int32)


def _teacher_ids(valid: AlignedDataset, rows: Rows, k: int, row: Row) -> Int32:
    """The ids of a row's teacher targets. If losses are cached, the row has no ids, and they are read from the dataset."""
    if row.teacher_losses is None:
        return row.teacher_target_ids
    pieces = rows.pieces(k)
    document, start, _ = pieces[0]
    skipped = int(valid.spans(document, start, start + 1).first[0]) if start else 0
    ids: Int32 = np.concatenate([valid.teacher(*piece) for piece in TeacherTargets.of(valid, pieces, skipped).pieces])
    return ids


def _padded(rows: Sequence[np.ndarray], length: int, fill: int) -> Int32:
    padded = np.full((len(rows), length), fill, np.int32)
    for r, row in enumerate(rows):
        padded[r, : len(row)] = row
    return padded
