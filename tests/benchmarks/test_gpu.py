"""The benchmark of the GPU: what it counts, what it prints, and that it measures nothing where there is no GPU."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import CHIPS, HEADS, KEPT, Arm, Result, Work, contest, dense_work, fused_work, table, tiles_work
from megatron_vocagno.objective.linear_ce import GPU_TILE_BYTES

TINYLLAMA, QWEN = HEADS
CPU = torch.device("cpu")
H100 = CHIPS["NVIDIA H100 80GB HBM3"]


def test_flops_are_those_of_the_products_that_each_arm_makes() -> None:
    """U(1 + 3f) against 3U: the selective backward wins below two thirds."""
    for head, product in ((TINYLLAMA, 2.147e12), (QWEN, 17.859e12)):
        assert head.product == pytest.approx(product, rel=1e-3)
        assert tiles_work(head, None).flops == fused_work(head).flops == head.product
        assert tiles_work(head, KEPT).flops == pytest.approx(2.2 * head.product)
        assert tiles_work(head, 2 / 3).flops == pytest.approx(dense_work(head, learns=True).flops)


def test_bytes_are_dominated_by_what_is_as_wide_as_the_vocabulary() -> None:
    logits = QWEN.tokens * QWEN.vocabulary
    assert fused_work(QWEN).bytes == 2 * 3584 * (16_384 + 152_064)
    tiles = math.ceil(QWEN.vocabulary / (GPU_TILE_BYTES // 4 // QWEN.tokens))
    reread = (tiles - 1) * 2 * 16_384 * 3584  # hidden states
    assert tiles_work(QWEN, None).bytes - fused_work(QWEN).bytes == 8 * logits + reread
    assert dense_work(QWEN, learns=False).bytes > 16 * logits
    assert tiles_work(QWEN, KEPT).bytes < dense_work(QWEN, learns=True).bytes


def test_bytes_of_the_backward_are_those_of_each_operation_on_a_tile() -> None:
    """Counted one by one, as _gradients runs them."""
    h, v = QWEN.size, QWEN.vocabulary
    rows = QWEN.tokens // 4
    width = GPU_TILE_BYTES // 4 // rows
    moved, met = 0, 0
    for begin in range(0, v, width):
        t = min(width, v - begin)
        hidden, head, logits, dz, sums = 2 * rows * h, 2 * t * h, 4 * rows * t, 2 * rows * t, 4 * rows * h
        moved += hidden + head + logits  # the product
        moved += logits + dz  # its gradient
        moved += dz + head + sums  # the product for the hidden states
        moved += 3 * sums  # added
        moved += dz + hidden + head  # the product for the head
        met += 1
    assert met == 10
    assert tiles_work(QWEN, 0.25).bytes - tiles_work(QWEN, None).bytes == moved


def test_the_page_has_the_arithmetic_of_today() -> None:
    page = gpu.PAGE.read_text(encoding="utf-8")

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
        "a forward alone (teacher): dense": lambda head: dense_work(head, learns=False),
        "a forward alone: tiles": lambda head: tiles_work(head, None),
        "a forward alone: fused": lambda head: fused_work(head),
    }.items():
        assert f"| {name} | {cells([count(head) for head in HEADS])} |" in page, (name, cells([count(h) for h in HEADS]))


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    assert Work(989e12, 1.0).seconds(H100) == 1.0 and Work(1.0, 3.35e12).seconds(H100) == 1.0
    assert tiles_work(TINYLLAMA, KEPT).seconds(H100) == tiles_work(TINYLLAMA, KEPT).flops / 989e12


def test_arms_take_turns_and_a_time_is_a_median() -> None:
    calls: list[str] = []
    arms = [Arm(name, lambda name=name: calls.append(name)) for name in ("a", "b")]
    results = contest(arms, CPU, rounds=5)
    assert calls == ["a", "b"] * (1 + gpu.WARM_UP + 5)
    assert all(result is not None and 0 < result.milliseconds < 1 and result.memory == 0 for result in results.values())


def test_an_arm_that_does_not_fit_is_left_out_and_said_so() -> None:
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
    assert "these times say nothing" in printed and "%  |" not in printed


def test_a_library_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    rates = []
    monkeypatch.setattr(gpu, "measure", lambda device, heads, chip: rates.append(chip) or "tables")
    monkeypatch.setattr(gpu, "_liger", lambda: None)
    gpu.main([])
    assert "Liger is not installed, so it has no row" in capsys.readouterr().out
    assert rates == [None], "the rates of another form of the chip"


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "performance.md")
    with pytest.raises(SystemExit, match="no GPU here, so nothing was measured"):
        gpu.main(["--write"])
    assert not gpu.PAGE.exists()
