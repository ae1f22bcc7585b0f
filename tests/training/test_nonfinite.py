"""Steps that are not finite are detected, named and limited."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from megatron_vocagno.batch.blend import BlendedRows, Mixture
from megatron_vocagno.batch.loader import TrainRows
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import RunError
from megatron_vocagno.training.nonfinite import NonFiniteGuard, NonFiniteStep, describe, documents_of

GOOD = {"loss/train": 2.0, "optimizer/grad_norm": 1.0, "optimizer/skipped_steps": 7.0, "loss/nonfinite_tokens": 0.0}
BROKEN = [
    GOOD | {"loss/train": float("nan")},
    GOOD | {"optimizer/grad_norm": float("inf")},
    GOOD | {"loss/nonfinite_tokens": 3.0},
    GOOD | {"optimizer/skipped_steps": 8.0},
]
LOG = Path("run/not_finite.jsonl")


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_step_is_no_healthy_one_and_a_resumed_run_remembers_its_skipped_steps(broken: dict[str, float]) -> None:
    assert NonFiniteGuard(2, 7).check(1, GOOD) is None
    found = NonFiniteGuard(2, 7).check(1, broken)
    assert found is not None and found.step == 1 and found.skipped == (broken["optimizer/skipped_steps"] == 8)


def test_the_guard_stops_after_steps_in_a_row_and_forgives_single_ones() -> None:
    guard = NonFiniteGuard(3, 7)
    for step, numbers in enumerate([BROKEN[0], BROKEN[1], GOOD, BROKEN[2], BROKEN[0]]):
        if found := guard.check(step, numbers):
            guard.stop_at_limit(found, LOG)
        assert (found is None) == (numbers is GOOD)
    third = guard.check(9, BROKEN[3])
    assert third is not None
    complaint = r"3 steps in a row were not finite .* last step 9 (.|\n)*learning rate is too high\.(.|\n)*run/not_finite\.jsonl"
    with pytest.raises(RunError, match=complaint):
        guard.stop_at_limit(third, LOG)


def test_the_named_documents_are_those_whose_tokens_a_row_holds(dataset: AlignedDataset) -> None:
    rows = BlendedRows([TrainRows(dataset, 64, seed=3)], Mixture([1.0]))
    texts = [dataset.student(document, 0, int(length)).tobytes() for document, length in enumerate(dataset.student_lengths)]
    met = 0
    for index in range(400):
        row = rows[index]
        tokens = np.append(row.input_ids, row.target_ids[-1:])
        (named,) = documents_of(rows, range(index, index + 1))
        begins = [0, *(np.flatnonzero(row.starts_document) + 1).tolist(), len(tokens)]
        parts = [tokens[begin:end] for begin, end in itertools.pairwise(begins)]
        assert len(parts) == len(named)
        for part in parts:
            holders = {document for document, text in enumerate(texts) if part.tobytes() in text}
            assert holders & set(named)
            met += 1
    assert met > 250
    (together,) = documents_of(rows, range(400))
    assert together == sorted(set(together)) and len(together) > 20


def test_a_line_for_a_person_names_a_few_documents_and_counts_the_rest() -> None:
    broken = NonFiniteStep(step=4, loss=float("nan"), grad_norm=1.5, nonfinite_tokens=2, skipped=True)
    line = describe(broken, {"data/a": list(range(10, 30)), "data/b": [], "data/c": [5]}, shown=3)
    assert line == (
        "step 4 was not finite and was skipped: loss nan, gradient norm 1.5, 2 tokens without a finite loss. "
        "It read documents 10, 11, 12 and 17 more of data/a; 5 of data/c"
    )
