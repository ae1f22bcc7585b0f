"""What a run tells is written once a step, whole, and by one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vocagno.monitor import METRICS_FILE, Monitor, read_metrics


def write(output: Path, first: int, steps: range) -> None:
    with Monitor(output, first, every=1, last_step=9) as monitor:
        if first == 0:
            monitor.evaluation(0, {"eval/bits_per_byte": 5.0})
        for step in steps:
            monitor.step(step, {"loss/train": step + first / 100, "guidance/threshold": math.nan})


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


def test_numbers_that_do_not_exist_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3))
    assert all("guidance/threshold" not in line for line in read_metrics(tmp_path))


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/train")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "guidance/threshold" not in board.Tags()["scalars"]


def test_the_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Monitor(None, 0, every=1, last_step=3) as monitor:
        monitor.step(1, {"loss/train": 1.0})
        monitor.evaluation(1, {"eval/bits_per_byte": 1.0})
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
