"""Figures of the check on a GPU: the estimates in the documentation, times, memory, and shares of the roofline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks.gpu import heads, step, timing
from benchmarks.gpu.record import Record, Task
from benchmarks.gpu.timing import CHIPS, Arm, Rates, Result, Work, contest, report
from benchmarks.gpu.work import QWEN_7B, TINYLLAMA, dense_work, tiles_work
from benchmarks.page import APPENDIX

CPU = torch.device("cpu")
H100 = CHIPS["NVIDIA H100 80GB HBM3"]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path / "part.json", 60, rehearse=True)


def test_the_appendix_has_the_current_estimates() -> None:
    page = APPENDIX.read_text(encoding="utf-8")

    def cells(works: list[Work]) -> str:
        return " | ".join(
            f"{work.flops / 1e12:#.3g} | {work.bytes / 1e9:.1f} | {work.flops / H100.flops * 1e3:.1f}, "
            f"{work.bytes / H100.bytes * 1e3:.1f}"
            for work in works
        )

    for name, count in {
        "dense, forward and backward": lambda head: dense_work(head, learns=True),
        **{f"ours, f = {share}": lambda head, share=share: tiles_work(head, float(share)) for share in ("0.40", "0.45", "0.50")},
        "ours, f = 2/3": lambda head: tiles_work(head, 2 / 3),
        "ours, f = 1": lambda head: tiles_work(head, 1.0),
        "forward only (teacher): dense": lambda head: dense_work(head, learns=False),
        "forward only: tiles": lambda head: tiles_work(head, None),
    }.items():
        found = cells([count(head) for head in (TINYLLAMA, QWEN_7B)])
        assert f"| {name} | {found} |" in page, (name, found)


def test_arms_take_turns_and_a_time_is_a_median() -> None:
    calls: list[str] = []
    arms = [Arm(name, lambda name=name: calls.append(name)) for name in ("a", "b")]
    results = contest(arms, CPU, rounds=5)
    assert calls == ["a", "b"] * (1 + timing.WARM_UP + 5)
    assert all(isinstance(result, Result) and 0 < result.milliseconds < 1 and result.memory == 0 for result in results.values())


def test_a_contest_without_time_left_still_has_a_round() -> None:
    calls: list[int] = []
    assert isinstance(contest([Arm("a", lambda: calls.append(0))], CPU, rounds=50, seconds=0)["a"], Result)
    assert len(calls) == 2 + timing.WARM_UP


def test_memory_that_is_exhausted_is_a_result_and_an_error_of_ours_a_failure(task: Task) -> None:
    def too_large() -> None:
        raise torch.cuda.OutOfMemoryError

    def broken() -> None:
        raise RuntimeError("no such kernel\nmore")

    arms = [
        Arm("ours", too_large, ours=True),
        Arm("theirs", broken),
        Arm("small", lambda: None),
        Arm("broken", broken, ours=True),
    ]
    report(task, "case", arms, contest(arms, CPU, rounds=2), Rates(None, None))
    found = [(row.arm, row.result, row.failed) for row in Record.read(task.file).rows]
    assert found == [
        ("ours", "out of memory", False),
        ("theirs", "RuntimeError: no such kernel", False),
        ("small", "", False),
        ("broken", "RuntimeError: no such kernel", True),
    ]


def test_shares_are_those_of_the_data_sheet_and_of_the_measured_rates(task: Task) -> None:
    measured = timing.Chip(H100.flops / 2, H100.bytes / 2)
    arms = [Arm("a", lambda: None, Work(9.89e12, 0.0))]
    report(task, "case", arms, {"a": Result(20.0, 2**30)}, Rates(H100, measured))
    [row] = task.record.rows
    assert row.numbers["share of the data sheet's"] == pytest.approx(0.5)
    assert row.numbers["share of the measured roofline"] == pytest.approx(1.0)
    assert Rates(H100, None).mfu(989e11) == {"MFU": pytest.approx(0.1)}


def test_measured_rates_are_the_best_rows_of_the_ceilings(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    ceilings = Task(task.file.with_name("ceilings.json"), 60, rehearse=False)
    for name, value in (("TB/s", 1.5), ("TFLOP/s", 600.0), ("TB/s", 1.75), ("TFLOP/s", 500.0)):
        ceilings.add("case", "", {name: value})
    task.rehearse = False
    assert Rates.of(task) == Rates(None, timing.Chip(600e12, 1.75e12)), "another form of the chip has other rates"
    task.rehearse = True
    assert Rates.of(task) == Rates(None, None)


def test_libraries_that_are_missing_are_named(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    heads.run(task)
    arms = {row.arm for row in task.record.rows}
    assert {"ours, 40% kept", "ours, 100% kept", "ours, sequence", "topk and gather, microbatch"} <= arms
    assert not any("linear_cross_entropy" in arm for arm in arms)
    assert any("linear_cross_entropy" in note for note in task.record.notes) and any(
        "Liger" in note for note in task.record.notes
    )


@pytest.fixture
def trainer() -> step.Trainer:
    return step.Trainer(AutoConfig.for_model("llama", **step.TINY), CPU)


def test_a_micro_batch_that_does_not_fit_is_halved(trainer: step.Trainer) -> None:
    def large(student: torch.nn.Module, batch: step.Batch, planned: int, planned_of_step: int) -> Tensor:
        loss = step.dense_loss(student, batch, planned, planned_of_step)
        if len(batch.input_BS) > 2:
            loss.backward()  # gradients of a step that fails must not be left
            raise torch.OutOfMemoryError
        return loss

    batch = step.Batch.make(300, 8, 16, CPU).unguided()
    before = [weight.clone() for weight in trainer.weights]
    found = step._fitting(trainer, large, batch, "sdpa")
    assert not isinstance(found, str) and found[0] == 2
    assert all(weight.grad is None for weight in (*trainer.student.parameters(), *trainer.weights))
    assert sum(not torch.equal(a, b) for a, b in zip(before, trainer.weights, strict=True)) > 5, "the step was taken"

    def always(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError

    assert step._fitting(trainer, always, batch, "sdpa") == "out of memory"


def test_micro_batches_add_up_to_the_step(trainer: step.Trainer) -> None:
    other = step.Trainer(trainer.student.config, CPU)
    batch = step.Batch.make(300, 4, 16, CPU).unguided()
    for loss in (step.dense_loss, step.selected_loss):
        whole, parts = (
            float(each.step(loss, batch.split(rows), [x.planned() for x in batch.split(rows)], "sdpa"))
            for each, rows in ((trainer, 4), (other, 1))
        )
        assert whole == pytest.approx(parts, rel=1e-3) and 5 < whole < 7


def test_model_flops_are_those_of_the_matrices_and_of_causal_attention(trainer: step.Trainer) -> None:
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    assert trainer.flops(10, 64) == 10 * (6 * (2 * layer + 32 + 300 * 32) + 6 * 2 * 32 * 64)
