"""The sample rows of a run: read once, scored by the teacher once, and looked at by the student at every evaluation.

The student's losses are taken by a forward alone, dealt to ranks as the rows of a step are. They come together on all ranks (each
loss is written by one and 0 on the others, so the sum is exact), and the first rank chooses and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import EMPTY_ROW, IGNORE, collate
from megatron_vocagno.batch.pack import Int32, Row, Rows, TeacherTargets
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.cached import held_out_source
from megatron_vocagno.engine.collectives import all_reduce_sum, my_rank, run_on_rank0
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.errors import RunError
from megatron_vocagno.training.sample_files import FOLDER, SampleRows, SampleStep, difference, read_rows, step_files, write_rows


def open_samples(
    run: Run,
    datasets: Sequence[AlignedDataset],
    valid: AlignedDataset | None,
    teacher_limit: int | None,
    fronts: tuple[Front, Front],
) -> Samples | None:
    """None where the run asks for none. Raises RunError, see Samples."""
    if run.logging.samples is None or valid is None:
        return None
    return Samples(run, datasets, valid, teacher_limit, fronts)


class Samples:
    """The first rows of `data.valid`, and what the teacher says of them."""

    def __init__(
        self,
        run: Run,
        datasets: Sequence[AlignedDataset],
        valid: AlignedDataset,
        teacher_limit: int | None,
        fronts: tuple[Front, Front],
    ) -> None:
        """teacher_limit: most positions that a loaded teacher reads. fronts: of the student, and of a loaded teacher.

        Raises RunError: cached losses that are missing.
        """
        assert run.logging.samples is not None
        self.run, (front, teacher), self._lead = run, fronts, len(fronts[0])
        order = np.arange(len(valid.student_lengths), dtype=np.int32)
        source = held_out_source(run, datasets, valid, teacher_limit, teacher)
        rows = Rows(valid, order, run.data.row_length, source, front)
        if not len(rows):
            raise RunError(f"{run.data.valid} holds fewer than two tokens: there is no row for logging.samples")
        count = min(run.logging.samples, len(rows))
        self._read = [rows[k] for k in range(count)]
        # what selects without a teacher covers targets by themselves: the alignment is read for those who look
        without = run.guidance.selects and not run.guidance.needs_teacher
        aligned = Rows(valid, order, run.data.row_length, front=front) if without else rows
        self.rows = _described(valid, aligned, self._read, [aligned[k] for k in range(count)] if without else self._read)
        self._teacher_loss_RU: Tensor | None = None

    def begin(self, step: int, say: Callable[[str], None]) -> None:
        """Make room for what comes after `step`, the steps already done: later files go. Collective over the world.

        say  takes a line for a person, on the first rank alone

        Raises SharedError: what lies there is of other rows or another release, and not all of it is to come again. Nothing is
        removed then.
        """
        run_on_rank0(lambda: self._begin(step, say), RunError, OSError)

    def _begin(self, step: int, say: Callable[[str], None]) -> None:
        output = self.run.output
        files = list(step_files(output))
        # nothing of step 0 is kept when a run starts over: its first evaluation comes again
        again = [path for written, path in files if written > step or not step]
        if len(again) < len(files):
            there = read_rows(output)
            if differs := difference(there, self.rows):
                raise RunError(
                    f"{output / FOLDER} holds {len(there)} rows of {there.dataset} ({there.fingerprint}), this run asks for "
                    f"{len(self.rows)} of {self.rows.dataset} ({self.rows.fingerprint}).\n"
                    f"  They differ in {differs}, and files of both cannot be compared: move the folder away, or set that back."
                )
        for path in again:
            path.unlink()
        write_rows(output, self.rows)
        asked, count = self.run.logging.samples or 0, len(self.rows)
        if count < asked:
            say(f"note: logging.samples = {asked:,} rows, but {self.run.data.valid} makes {count:,}: these are taken")

    def look(self, step: int, engine: TrainEngine, scorer: Scorer | None, asked: Callable[[], int]) -> SampleStep | None:
        """The rows after a step, on the first rank; None where the run is asked to leave meanwhile. Collective over the world.

        asked  whether any rank was asked to leave. Collective over the world
        """
        layout, count = engine.layout, len(self.rows)
        loss_RS = torch.zeros(self.rows.target_RS.shape, device=engine.objective.device)
        said = self._teacher_loss_RU
        longest = max(len(row.teacher_starts_document) for row in self._read)
        teacher_RU = torch.zeros(count, longest, device=loss_RS.device) if said is None else None
        for start in range(0, count, layout.rows):
            if asked():
                return None
            mine = [[start + o for o in layout.offsets(micro, engine.data_rank)] for micro in range(layout.micro_batches)]
            batches = [collate([self._row(k) for k in micro], self.run.data.row_length) for micro in mine]
            if teacher_RU is not None and scorer is not None:
                _put(teacher_RU, mine, scorer.score(batches))
            _put(loss_RS, mine, [loss_BS[:, self._lead :] for loss_BS in engine.look(batches)])
        all_reduce_sum(loss_RS)
        if teacher_RU is not None:
            # the ranks of one pipeline have scored its rows together, and hold the same
            all_reduce_sum(teacher_RU, engine.data_group)
            said = self._teacher_loss_RU = teacher_RU.cpu()
        assert said is not None
        return self._judged(step, engine, loss_RS.cpu(), said) if my_rank() == 0 else None

    def _judged(self, step: int, engine: TrainEngine, loss_RS: Tensor, teacher_loss_RU: Tensor) -> SampleStep:
        valid_RS = torch.from_numpy(self.rows.valid_RS)
        guide_RS, weight_RS = torch.full_like(loss_RS, torch.nan), valid_RS.float()
        if self.run.guidance.selects:
            batch = collate(self._read, self.run.data.row_length)
            # a batch begins with what is read in front of text; here that would be places without a token, as at the rows' ends
            chosen = engine.judge(batch, loss_RS.roll(self._lead, 1), teacher_loss_RU)
            weight_RS = chosen.weight_BS.roll(-self._lead, 1)
            if self.run.guidance.needs_teacher:
                guide_RS = chosen.guide_BS.roll(-self._lead, 1)
        loss_RS = loss_RS.masked_fill(~valid_RS, torch.nan)
        return SampleStep(step, loss_RS.numpy(), guide_RS.numpy(), weight_RS.numpy(), self.run.guidance)

    def _row(self, k: int) -> Row:
        if k < len(self._read):
            return self._read[k]
        known = self._read[0].teacher_losses
        return EMPTY_ROW if known is None else replace(EMPTY_ROW, teacher_losses=known[:0])


def _put(all_RX: Tensor, mine: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> None:
    """Rows of micro-batches to their places; those past the last row are empty, and nowhere."""
    for places, part_BX in zip(mine, parts, strict=False):
        for k, row_X in zip(places, part_BX.float(), strict=True):
            if k < len(all_RX):
                all_RX[k, : len(row_X)] = row_X


def _described(valid: AlignedDataset, rows: Rows, read: Sequence[Row], aligned: Sequence[Row]) -> SampleRows:
    """aligned: the rows `read` with the teacher's positions."""
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
    """Document and place there of a row's tokens: its inputs, and its last target."""
    for document, start, stop in rows.pieces(k):
        yield np.full(stop - start, document, np.int32), np.arange(start, stop, dtype=np.int32)


def _teacher_ids(valid: AlignedDataset, rows: Rows, k: int, row: Row) -> Int32:
    """The ids of a row's teacher targets. Where losses are cached, the row itself has none."""
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
