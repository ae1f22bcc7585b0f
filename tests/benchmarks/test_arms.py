"""The arms of the benchmarks are comparable, and their corpus, memory and pages are correct."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from benchmarks import corpus, step, step_arms, step_memory
from benchmarks.page import write_section

SIZE = 300_000


def test_a_corpus_has_each_text_once_in_an_order_that_does_not_depend_on_the_input(tmp_path: Path) -> None:
    texts = list(itertools.islice(corpus.installed(), 1000))
    content = corpus.write(tmp_path / "a.jsonl", texts, SIZE)
    corpus.write(tmp_path / "b.jsonl", [*reversed(texts), *texts[:500]], SIZE)
    rows = [orjson.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert rows == [orjson.loads(line)["text"] for line in (tmp_path / "b.jsonl").read_bytes().splitlines()]
    assert len(set(rows)) == len(rows) == content.documents > 20
    assert SIZE <= sum(len(row.encode()) for row in rows) == content.total < 1.5 * SIZE
    assert rows != sorted(rows)


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for name, text in (("one", "first"), ("two", "second"), ("one", r"third \1")):
        write_section(name, text, page)
    written = page.read_text()
    assert "first" not in written and written.count("<!-- one -->") == 1
    assert written.index(r"third \1") < written.index("second")


def test_peak_memory_is_measured_from_its_start() -> None:
    size = 100_000_000
    np.ones(2 * size, np.uint8)
    before = step_memory.start()
    np.ones(size, np.uint8)
    assert 0.95 * size < step_memory.peak() - before < 1.2 * size


@pytest.mark.long
def test_the_compared_steps_have_the_same_losses(tmp_path: Path) -> None:
    case = step.prepare(tmp_path, step.QUICK)
    students = step_arms._student(case), step_arms._hugging_face(case.student, torch.float32)
    teachers = step_arms._teacher(case), step_arms._hugging_face(case.teacher, torch.float32)
    for inputs in step_arms.inputs_of(case):
        read = (
            (*students, inputs.batch.input_BS, inputs.batch.target_BS),
            (*teachers, inputs.teacher_input_BU, inputs.teacher_target_BU),
        )
        for ours, theirs, ids, target in read:
            with torch.no_grad():
                loss = ours(ids, target)
                dense = step_arms._dense_loss(theirs(ids).logits, target, "none").view_as(target)
            assert (target != -100).sum() > 150
            assert loss.std() > 0.01  # not the same for every token
            torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="older torch has no fused loss")
def test_all_implementations_of_the_heads_loss_agree() -> None:
    """All arms have the same gradients."""
    from benchmarks import head

    case = replace(head.CASES[0], tokens=40, size=16, vocabulary=300)
    want: list[torch.Tensor] = []
    for arm in ("dense", "ours", "rows", "torch", "as is"):
        one = head.Head(case)
        one.step(arm)
        assert one.hidden.grad is not None and one.head.grad is not None and one.head.grad.any()
        want = want or [one.hidden.grad, one.head.grad]
        for mine, theirs in zip([one.hidden.grad, one.head.grad], want, strict=True):
            torch.testing.assert_close(mine, theirs)
