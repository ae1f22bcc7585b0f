"""Scores from the sample rows of a run (`logging.samples`): the kept shares of its rule, and the overlap of its ranges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.batch.equal_parts import overlap
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.training.sample_files import SampleRows, read_rows, read_steps


def shares_kept(output: Path, kinds: Callable[[int], NDArray[np.str_]]) -> dict[int, dict[str, float]]:
    """The share of each kind of token that the run's rule would keep: {step: {`kept_KIND`: share}}.

    kinds: function from the number of a document of data.valid to [N] the kind of each of its student tokens, including the last
    """
    rows = read_rows(output)
    valid_RS = rows.valid_RS
    known = {int(number): kinds(int(number)) for number in np.unique(rows.document_RS[valid_RS])}
    places = zip(rows.document_RS[valid_RS].tolist(), rows.token_RS[valid_RS].tolist(), strict=True)
    kind_N = np.array([known[document][token] for document, token in places])
    return {
        step.step: {f"kept_{kind}": float((step.weight_RS[valid_RS][kind_N == kind] > 0).mean()) for kind in np.unique(kind_N)}
        for step in read_steps(output)
    }


def measured_overlap(output: Path) -> tuple[float, float]:
    """IoS and IoU of the ranges of the run, over the mapped tokens of its sample rows. Only for cached losses."""
    rows = read_rows(output)
    data = AlignedDataset.open(rows.dataset)
    found = [_overlap_of_row(rows, data, row) for row in range(len(rows))]
    ios, iou, count = (np.array(column) for column in zip(*found, strict=True))
    return float(ios @ count / count.sum()), float(iou @ count / count.sum())


def _overlap_of_row(rows: SampleRows, data: AlignedDataset, row: int) -> tuple[float, float, int]:
    valid_S = rows.valid_RS[row]
    document, token = int(rows.document_RS[row, 0]), int(rows.token_RS[row, 0])
    # the first input of a row is not a target, and the teacher's side begins with the tokens that cover it
    before = data.student(document, token - 1, token)[0] if token else data.student_tokenizer.eos_id
    ids = np.concatenate([[before], rows.target_RS[row][valid_S]])
    first, last = (np.concatenate([[0], ends[row][valid_S]]) for ends in (rows.first_RS, rows.last_RS))
    teacher_ids = rows.teacher_RU[row][rows.teacher_RU[row] >= 0]
    ends = np.cumsum(data.student_byte_lengths[ids], dtype=np.int64)
    teacher_ends = np.cumsum(data.teacher_byte_lengths[teacher_ids], dtype=np.int64)
    return *overlap(ends, teacher_ends, first, last), int((first < last).sum())
