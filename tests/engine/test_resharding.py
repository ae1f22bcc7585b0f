"""A checkpoint does not depend on the layout: a run resumes in any other layout with the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vocagno.engine.manifest import COUNTERS, OPTIMIZER, STUDENT, finished_checkpoints
from tests.runs import Case, metrics, spawn

pytestmark = pytest.mark.slow

COMMON = ["training.schedule.kind=constant", "checkpoint.every=1", "checkpoint.keep_last=9"]
MOVES = [
    (2, 2, 1, 1),
    (2, 1, 1, 1),
    (2, 0, 3, 1),
    (1, 0, 1, 1),
    (2, 0, 2, 2),
    (1, 0, 1, 1),
    (2, 0, 3, 2),
    (2, 2, 1, 1),
]
"""Processes, pipeline stages, ZeRO stage and ranks per row of step after step."""


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = [file for part in (STUDENT, OPTIMIZER) for file in sorted((checkpoint / part).glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def learned(output: Path, name: str = "loss/train") -> list[float]:
    return [line[name] for line in metrics(output) if name in line]


def test_a_run_that_changes_its_layout_every_step_learns_as_if_it_never_moved(case: Case) -> None:
    straight = case.run("unmoved", 1, [*COMMON, f"training.steps={len(MOVES)}", "parallel.pipeline_stages=1"])
    said = ""
    for step, (processes, stages, zero, sequence) in enumerate(MOVES, start=1):
        parallel = [f"parallel.pipeline_stages={stages}", f"parallel.sequence={sequence}"]
        overrides = [*COMMON, f"training.steps={step}", *parallel]
        finished = spawn(processes, case.command("moved", overrides, {"zero_optimization": {"stage": zero}}))
        assert finished.returncode == 0, finished.stdout[-4000:]
        said += finished.stdout
    moved = case.out("moved")
    assert "note: from here on with 2 processes, 1 stage, ZeRO-1 (was 2 processes, 2 stages, ZeRO-1)" in said
    assert said.count("note: from here on with") == len(MOVES) - 1

    assert len(learned(moved)) == len(MOVES) and len(set(learned(straight))) == len(MOVES)
    assert learned(moved) == pytest.approx(learned(straight), rel=1e-5)
    assert learned(moved, "optimizer/grad_norm") == pytest.approx(learned(straight, "optimizer/grad_norm"), rel=1e-4)
    assert learned(moved, "optimizer/learning_rate") == learned(straight, "optimizer/learning_rate")
    ends = [finished_checkpoints(output / "checkpoints")[0] for output in (straight, moved)]
    assert (ends[0] / COUNTERS).read_bytes() == (ends[1] / COUNTERS).read_bytes()
    a, b = (tensors(end) for end in ends)
    assert a.keys() == b.keys() and len(a) == 3 * 29
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)
    assert all(a[name].any() for name in a if name.endswith(".exp_avg_sq"))
    # no file of a checkpoint can run code when it is read
    assert not {file.suffix for file in ends[1].rglob("*")} & {".pt", ".pth", ".bin", ".pkl", ".pickle"}


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("layout", "parallel", "settings"),
    [
        ("bf16-pp2", "pipeline_stages=2", BF16),
        ("zero2", "pipeline_stages=0", {"zero_optimization": {"stage": 2}}),
        ("sequence2-zero3", "sequence=2", {"zero_optimization": {"stage": 3}}),
    ],
    ids=["bf16-pp2", "zero2", "sequence2-zero3"],
)
def test_a_resumed_run_is_bit_for_bit_the_one_that_went_on(
    case: Case, layout: str, parallel: str, settings: dict[str, Any]
) -> None:
    overrides = [*COMMON, "training.steps=3", f"parallel.{parallel}"]
    straight = case.run(f"on-{layout}", 2, overrides, settings)
    again = case.out(f"again-{layout}")
    shutil.copytree(straight / "checkpoints" / "step-00000002", again / "checkpoints" / "step-00000002")
    case.run(f"again-{layout}", 2, overrides, settings)
    a, b = (tensors(output / "checkpoints" / "step-00000003") for output in (straight, again))
    before = tensors(straight / "checkpoints" / "step-00000002")
    assert a.keys() == b.keys() == before.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sum(not torch.equal(a[name], before[name]) for name in a) > 50
    masters = [name for name in a if name.endswith(".master")]
    assert len(masters) == (29 if layout == "bf16-pp2" else 0)
    assert all(torch.equal(a[name].bfloat16(), a[name.removesuffix(".master")]) for name in masters)
