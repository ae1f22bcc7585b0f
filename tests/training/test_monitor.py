"""Metrics are written once per step, complete, and by one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.monitor import METRICS_FILE, Monitor, read_metrics
from tests.runs import REPOSITORY


def write(output: Path, first: int, steps: range) -> None:
    monitor = Monitor(output, every=1, last_step=9)
    with monitor.writing(first):
        if first == 0:
            monitor.evaluation(0, {"eval/bits_per_byte": 5.0})
        for step in steps:
            monitor.step(step, {"loss/train": step + first / 100, "optimizer/grad_norm": math.nan if step == 2 else 1.0})


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"step":6,"loss/tr')  # killed while writing
    write(tmp_path, 3, range(4, 8))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [line.get("loss/train") for line in lines] == [None, 1, 2, 3, 4.03, 5.03, 6.03, 7.03]


def test_a_run_that_starts_over_forgets_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    write(tmp_path, 0, range(1, 2))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_what_is_not_finite_is_shown_and_is_null_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, range(1, 4))
    assert b'{"step":2,"loss/train":2.0,"optimizer/grad_norm":null}\n' in (tmp_path / METRICS_FILE).read_bytes()
    assert [math.isnan(line.get("optimizer/grad_norm", 0.0)) for line in read_metrics(tmp_path)] == [False, False, True, False]
    assert "step 2/9  loss 2.0000  grad nan" in capsys.readouterr().out


def test_the_console_has_a_line_now_and_then_and_the_files_have_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, every=4, last_step=10)
    with monitor.writing(0):
        for step in range(1, 11):
            monitor.step(step, {"loss/train": 1.0, "loss/nonfinite_tokens": float(step == 8)})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[1] for line in lines] == ["1", "4", "8", "10"]
    assert [line.endswith("NOT FINITE 1 tokens") for line in lines] == [False, False, True, False]
    assert len(read_metrics(tmp_path)) == 10


def lines_of(output: Path, steps: range, last_step: int, numbers: dict[str, float]) -> None:
    monitor = Monitor(output, every=1, last_step=last_step)
    with monitor.writing(steps.start - 1):
        for step in steps:
            monitor.step(step, numbers)


def test_the_line_tells_what_remains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {1: "44m01s", 1319: "59s", 1320: "57s", 1348: "2s", 1349: None}
    lines_of(tmp_path, range(1, 1350), 1349, {"throughput/step_seconds": 1.959})
    lines = dict(enumerate(capsys.readouterr().out.splitlines(), 1))
    assert {step: lines[step].partition("eta ")[2] or None for step in told} == told
    # resumed, at another pace: of its own steps alone
    lines_of(tmp_path, range(1000, 1002), 1350, {"throughput/step_seconds": 1000.0})
    assert [line.partition("eta ")[2] for line in capsys.readouterr().out.splitlines()] == ["4d01h", "4d00h"]


def test_a_slow_step_is_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, every=1, last_step=101)
    with monitor.writing(0):
        for step in range(1, 102):
            monitor.step(step, {"throughput/step_seconds": 3600.0 if step == 1 else 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("eta 4d04h") and "h" in lines[49].partition("eta")[2] and lines[50].endswith("eta 50s")


def test_a_line_fits_120_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    widest = {
        "loss/train": 10.1234,
        "optimizer/learning_rate": 1e-4,
        "optimizer/grad_norm": 100.0,
        "guidance/share_kept": 0.4,
        "guidance/share_unmapped": 0.123,
        "guidance/threshold": 10.0,
        "throughput/student_tokens_per_second": 1_234_567.0,
        "throughput/step_seconds": 9.0,
        "teacher/share_of_time": 0.66,
    }
    lines_of(tmp_path, range(100_000, 100_001), 400_000, widest)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("teacher 66%  eta 31d06h") and len(line) <= 120


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/train")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "guidance/threshold" not in board.Tags()["scalars"]
    assert len(board.Scalars("eval/bits_per_byte")) == 1


def test_each_start_says_what_the_run_was_asked_to_do(tmp_path: Path) -> None:
    for first, keep in ((0, 0.25), (3, 0.75)):
        run = load_run(REPOSITORY / "examples" / "quickstart.toml", [f"guidance.keep={keep}"])
        monitor = Monitor(tmp_path, every=1, last_step=9)
        with monitor.writing(first):
            monitor.log_config(run, {"train_batch_size": 4})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Tensors("configuration/run/text_summary")
    assert [event.step for event in events] == [0, 3]
    for event, keep in zip(events, (b'"keep": 0.25', b'"keep": 0.75'), strict=True):
        assert keep in event.tensor_proto.string_val[0]
    assert b'"train_batch_size": 4' in board.Tensors("configuration/deepspeed_config/text_summary")[1].tensor_proto.string_val[0]
    assert len(board.Tensors("custom_scalars__config__")) == 2


def test_the_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = Monitor(None, every=1, last_step=3)
    with monitor.writing(0):
        monitor.step(1, {"loss/train": 1.0})
        monitor.evaluation(1, {"eval/bits_per_byte": 1.0})
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
