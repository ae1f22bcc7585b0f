"""The benchmark of the GPU: the estimates in the documentation, its printed tables, and its exit without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import CHIPS, HEADS, Arm, Result, Work, contest, dense_work, table, tiles_work
from benchmarks.page import APPENDIX

CPU = torch.device("cpu")
H100 = CHIPS["NVIDIA H100 80GB HBM3"]


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
        assert f"| {name} | {cells([count(head) for head in HEADS])} |" in page, (name, cells([count(h) for h in HEADS]))


def test_arms_take_turns_and_a_time_is_a_median() -> None:
    calls: list[str] = []
    arms = [Arm(name, lambda name=name: calls.append(name)) for name in ("a", "b")]
    results = contest(arms, CPU, rounds=5)
    assert calls == ["a", "b"] * (1 + gpu.WARM_UP + 5)
    assert all(result is not None and 0 < result.milliseconds < 1 and result.memory == 0 for result in results.values())


def test_an_arm_that_does_not_fit_is_reported_as_out_of_memory() -> None:
    def too_large() -> None:
        raise torch.cuda.OutOfMemoryError

    arms = [Arm("large", too_large), Arm("small", lambda: None, Work(9.89e12, 0.0))]
    assert contest(arms, CPU, rounds=2)["large"] is None
    rows = table("t", {"large": None, "small": Result(20.0, 2**30)}, arms, H100).splitlines()[4:]
    assert rows == ["| large | out of memory | |  |  | |", "| small | 20.000 | 1.00 | 9.89 | 0.00 | 50% |"]


def test_all_arms_run(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run"])
    printed = capsys.readouterr().out
    for arm in (
        "ours, 40% kept",
        "ours, 100% kept",
        "F.cross_entropy",
        "F.linear_cross_entropy",
        "ours, sequence",
        "topk and gather",
    ):
        assert re.search(rf"^\| {arm}.* \| \d+\.\d+ \|", printed, re.MULTILINE), arm
    assert "these times are meaningless" in printed and "%  |" not in printed


def test_a_library_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    rates = []
    monkeypatch.setattr(gpu, "measure", lambda device, heads, chip: rates.append(chip) or "tables")
    monkeypatch.setattr(gpu, "_liger", lambda: None)
    gpu.main([])
    assert "Liger is not installed" in capsys.readouterr().out
    assert rates == [None], "the rates of another form of the chip"


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "performance.md")
    with pytest.raises(SystemExit, match="no GPU was found"):
        gpu.main(["--write"])
    assert not gpu.PAGE.exists()
