"""Steps whose loss or gradient norm is an outlier of the last steps are skipped, on all ranks alike, and change nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megatron_vocagno.engine.manifest import checkpoint_folders
from megatron_vocagno.engine.outliers import find_outlier
from megatron_vocagno.files import sha256
from tests.runs import Case, metrics, spawn


def test_an_outlier_is_what_olmo_core_takes_for_one() -> None:
    """Compared with torch's mean and standard deviation."""
    draw, met = random.Random(5), {True: 0, False: 0}
    for case in range(300):
        window, sigma = draw.choice([20, 32, 64]), draw.choice([1.0, 2.5, 6.0])
        steps = [(draw.gauss(3, 0.2), draw.gauss(1, 0.1)) for _ in range(draw.randrange(10, 70))]
        if case % 2:
            steps[-1] = (draw.gauss(3, 2), draw.gauss(1, 1))
        *recent, (loss, norm) = steps[-window - 1 :]
        found = find_outlier(loss, norm, recent, window, sigma)
        columns = torch.tensor(recent, dtype=torch.float64).T
        std, mean = torch.std_mean(columns, dim=1)
        far = bool((((torch.tensor([loss, norm]) - mean).abs() / std) > sigma).any())
        assert (found is not None) == (far and len(recent) + 1 >= max(20, window // 2))
        met[found is not None] += 1
        if found is not None:
            assert (found.loss_mean, found.grad_norm_std) == pytest.approx((float(mean[0]), float(std[1])))
            assert found.compared_steps == len(recent)
    assert min(met.values()) > 60


def test_a_loss_that_is_not_finite_is_an_outlier() -> None:
    recent = [(2.0 + step % 3, 1.0 + step % 2) for step in range(19)]
    assert find_outlier(float("nan"), 1.0, recent, 20, 6.0) is not None
    assert find_outlier(2.0, float("inf"), recent, 20, 6.0) is not None
    assert find_outlier(2.0, 1.0, recent, 20, 6.0) is None


RUN = ["training.steps=26", "training.schedule.kind=wsd", "training.outlier_window=20", "training.outlier_sigma=1.4"]
EVERY = ["checkpoint.every=1", "checkpoint.keep_last=30", "eval.rows=2"]
LOSES_SIGHT = """
import os, sys
from megatron_vocagno import pretrain
from megatron_vocagno.engine import outliers
if os.environ["RANK"] == "1":
    outliers.find_outlier = lambda *_: None
sys.exit(pretrain.main(sys.argv[1:]))
"""
"""The second rank would decide otherwise than the first one does."""


def counted(output: Path) -> dict[int, float]:
    return {int(line["step"]): line["optimizer/outlier_steps"] for line in metrics(output) if "optimizer/outlier_steps" in line}


def skipped(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "outliers.jsonl").read_text().splitlines()]


def hashes(checkpoint: Path) -> dict[str, str]:
    """Of weights and optimizer states."""
    parts = ("student", "optimizer")
    return {str(file.relative_to(checkpoint)): sha256(file) for part in parts for file in (checkpoint / part).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "stages", "zero"),
    [(2, 2, 1), (2, 0, 3), pytest.param(1, 0, 1, marks=pytest.mark.long), pytest.param(2, 0, 2, marks=pytest.mark.long)],
    ids=["pp2", "zero3", "zero1", "zero2"],
)
def test_a_skipped_step_changes_nothing_and_a_resumed_run_skips_the_same(
    case: Case, processes: int, stages: int, zero: int
) -> None:
    name, layout = f"outliers-pp{stages}-zero{zero}", [f"parallel.pipeline_stages={stages}"]
    settings = {"zero_optimization": {"stage": zero}}
    finished = spawn(processes, case.command(name, [*RUN, *EVERY, *layout], settings), ("-c", LOSES_SIGHT))
    assert finished.returncode == 0, finished.stdout[-4000:]
    output = case.out(name)
    steps, counts = skipped(output), counted(output)
    assert len(steps) >= 2 and min(steps) >= 20 and counts[26] == len(steps) and counts[19] == 0
    assert finished.stdout.count("was skipped as an outlier (") == len(steps)
    assert f"step {steps[-1]} was skipped as an outlier ({len(steps)} so far): loss " in finished.stdout
    assert "was not finite" not in finished.stdout
    of_step = {int(folder.name[-8:]): folder for folder in checkpoint_folders(output / "checkpoints")}
    counters = {step: json.loads((folder / "engine.json").read_text()) for step, folder in of_step.items()}
    for step in range(2, 27):
        same = hashes(of_step[step]) == hashes(of_step[step - 1])
        assert same == (step in steps), step
        advanced = counters[step]["schedule_step"] - counters[step - 1]["schedule_step"]
        assert advanced == (step not in steps)
        assert counters[step]["optimizer_scalars"] == counters[step - 1]["optimizer_scalars"] or step not in steps
    assert not any("optimizer/skipped_steps" in line and line["optimizer/skipped_steps"] for line in metrics(output))

    # resumed between the first skipped step and the last
    for step, folder in of_step.items():
        if step > steps[0]:
            (folder / "manifest.json").unlink()
    resumed = spawn(processes, case.command(name, [*RUN, *EVERY, *layout], settings))
    assert resumed.returncode == 0 and f"resuming after step {steps[0]}" in resumed.stdout, resumed.stdout[-3000:]
    assert skipped(output) == steps and counted(output) == counts
    again = json.loads((of_step[26] / "engine.json").read_text())
    assert again == counters[26] and len(again["recent_steps"]) == 20
