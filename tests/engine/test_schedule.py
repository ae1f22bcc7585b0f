"""Learning rates of every schedule, and runs that only decay from a checkpoint of another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import get_wsd_schedule

from megatron_vocagno.config import Schedule
from megatron_vocagno.engine.build import share_of_peak
from megatron_vocagno.engine.manifest import newest_checkpoint
from tests.runs import Case, metrics, spawn
from tests.training.test_resume import weights


def of_transformers(steps: int, warmup: int, decay: int, shape: str, ratio: float) -> list[float]:
    """Learning rates of transformers' schedule, which begins one step later."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_wsd_schedule(
        optimizer, warmup, decay, num_stable_steps=steps - 1 - decay - warmup, decay_type=shape, min_lr_ratio=ratio
    )
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "decay", "ratio"), [(0, 7, 0.0), (5, 12, 0.1), (5, 1, 0.25)])
def test_wsd_is_that_of_transformers_after_its_own_warmup(shape: str, warmup: int, decay: int, ratio: float) -> None:
    schedule = Schedule.model_validate(
        {"kind": "wsd", "warmup_steps": warmup, "decay_shape": shape, "decay_steps": decay, "min_lr_ratio": ratio}
    )
    rates = [share_of_peak(schedule, 40, step) for step in range(40)]
    # float32 of the cosine
    assert rates[warmup:] == pytest.approx(of_transformers(40, warmup, decay, shape, ratio)[warmup:], abs=2e-7)
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert rates[warmup : 40 - decay] == [1.0] * (40 - decay - warmup) and rates[-1] == pytest.approx(ratio)
    assert len(set(rates[40 - decay :])) == decay and max(rates[40 - decay :]) < 1


def test_a_linear_decay_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = [
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1),
        torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=10),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[19])
    expected = []
    for _ in range(30):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    own = Schedule(kind="wsd", decay_steps=10, min_lr_ratio=0.2)
    assert [share_of_peak(own, 30, step) for step in range(30)] == pytest.approx(expected)


def test_a_decay_over_all_steps_is_the_schedule_of_that_name() -> None:
    for kind in ("linear", "cosine"):
        whole = Schedule(kind="wsd", decay_shape=kind, decay_steps=39 - 6, warmup_steps=6)
        assert [share_of_peak(whole, 40, step) for step in range(40)] == [
            share_of_peak(Schedule(kind=kind, warmup_steps=6), 40, step) for step in range(40)
        ]


def test_a_share_of_the_steps_is_rounded_up_to_complete_steps() -> None:
    for fraction, steps, decay in ((0.1, 100, 10), (0.1, 101, 11), (0.3, 10, 3), (1.0, 7, 7)):
        assert Schedule(kind="wsd", decay_fraction=fraction).decay(steps) == decay
    assert Schedule(kind="wsd", decay_steps=4).decay(100) == 4
    assert [*Schedule(kind="wsd", warmup_steps=95).notes(100)] == [
        "note: training.schedule has 95 steps of warm-up and 10 of decay, the run has 100: the decay begins below the peak."
    ]
    assert not [*Schedule(kind="wsd", warmup_steps=90).notes(100)]


STABLE = ["training.schedule.kind=wsd", "training.schedule.warmup_steps=2", "checkpoint.every=2", "checkpoint.keep_last=9"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "stages"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.long)])
def test_a_decay_from_a_checkpoint_equals_a_run_that_had_this_decay_from_the_start(
    case: Case, processes: int, stages: int, tmp_path: Path
) -> None:
    name, layout = f"decay-{stages}", [f"parallel.pipeline_stages={stages}", "eval.rows=2"]
    stable = case.run(f"{name}-stable", processes, [*STABLE, *layout, "training.steps=8", "training.schedule.decay_steps=2"])
    short = ["training.steps=7", "training.schedule.decay_steps=3", "training.schedule.decay_shape=1-sqrt"]
    straight = case.run(f"{name}-straight", processes, [*STABLE, *layout, *short])
    source = tmp_path / "checkpoint"  # a copy under any name
    shutil.copytree(stable / "checkpoints" / "step-00000004", source)
    branch = [*STABLE, *layout, *short, f"training.schedule.decay_from={source}"]
    out = case.run(f"{name}-only", processes, branch)
    ends = [newest_checkpoint(folder, print) for folder in (straight, out)]
    assert ends[0] is not None and ends[1] is not None and ends[1].name == "step-00000007"
    a, b = weights(ends[0]), weights(ends[1])
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    rates = {line["step"]: line["optimizer/learning_rate"] for line in metrics(out) if "optimizer/learning_rate" in line}
    expected = of_transformers(7, 2, 3, "1-sqrt", 0.1)
    assert list(rates) == [5, 6, 7]
    assert [*rates.values()] == pytest.approx([3e-3 * share for share in expected[4:]], rel=1e-6)

    # a checkpoint of its own comes first, and the other run is no longer needed
    shutil.rmtree(source)
    again = spawn(processes, case.command(f"{name}-only", branch))
    assert again.returncode == 0 and "resuming after step 7" in again.stdout, again.stdout[-3000:]
    if not stages:
        refuse(case, stable, [*STABLE, *layout])


def refuse(case: Case, stable: Path, overrides: list[str]) -> None:
    """Starts that would be more than a decay write no checkpoint."""
    folder = stable / "checkpoints" / "step-00000008"
    ends = [*overrides, "training.steps=11", "training.schedule.decay_steps=3"]
    for i, (settings, further, complaint) in enumerate(
        [
            ({}, [], "would continue with learning rate 0.0003, this run decays from 0.003: the learning rate would jump"),
            ({}, ["training.steps=12"], "To decay in 3 steps from there, set training.steps = 11."),
            ({}, ["guidance.keep=0.5"], "belongs to another run than this one: guidance.keep = 0.5 (was 0.4)"),
            ({}, ["training.schedule.decay_from=/nowhere"], "Give a folder OUTPUT/checkpoints/step-N."),
        ]
    ):
        arguments = case.command(f"decay-refused-{i}", [*ends, f"training.schedule.decay_from={folder}", *further], settings)
        finished = spawn(1, arguments)
        assert finished.returncode == 2 and complaint in finished.stdout, finished.stdout[-3000:]
        assert not (case.out(f"decay-refused-{i}") / "checkpoints").exists()
    # a checkpoint of a release that did not record its learning rate: taken on the user's word
    old = case.folder / "old-decay"
    shutil.copytree(stable / "checkpoints" / "step-00000004", old)
    counters, manifest = (json.loads((old / name).read_text()) for name in ("engine.json", "manifest.json"))
    del counters["learning_rate"], manifest["files"]["engine.json"]
    (old / "engine.json").write_text(json.dumps(counters))
    (old / "manifest.json").write_text(json.dumps(manifest))
    taken = [*overrides, "training.steps=5", "training.schedule.decay_steps=1", f"training.schedule.decay_from={old}"]
    finished = spawn(1, case.command("decay-old", taken))
    assert finished.returncode == 0 and "does not record its learning rate" in finished.stdout, finished.stdout[-3000:]
