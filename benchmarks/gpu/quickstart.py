"""Ten steps of examples/quickstart.toml under DeepSpeed on the GPU, compared with the losses of the same steps on the CPU.

    CPU                  one process, float32: the reference
    GPU, float32         one process, ZeRO-1
    GPU, bfloat16        one process, ZeRO-1, the settings of ds_configs/gpu_zero1_bf16.json
    GPU, two stages      two processes, float32, if there are two GPUs

All runs have the micro-batches of ds_configs/cpu_pp2.json, because a selection is within a micro-batch. The teacher is float32.
The data and the models are those of `make demo`. In a rehearsal, all runs are on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.record import Skipped, Task

ROOT = Path(__file__).parents[2]
DEMO = (".demo/teacher/model.safetensors", ".demo/data/train", ".demo/data/heldout")
STEPS, FEW_STEPS = 10, 2
EXACT, ROUNDED = 2e-3, 3e-2
"""Largest relative difference of a step's loss from the CPU's, for float32 and bfloat16. A rounding error can change which tokens
are kept, so float32 is not compared to the last bits."""


@dataclass(frozen=True)
class Run:
    name: str
    settings: dict[str, Any]
    tolerance: float
    on_cpu: bool
    stages: int = 1


def run(task: Task) -> None:
    _need_demo()
    steps = FEW_STEPS if task.rehearse else STEPS
    task.note(f"Tolerances of a step's loss, relative to the CPU: {EXACT:g} for float32, {ROUNDED:g} for bfloat16.")
    reference, *runs = _runs(task)
    with TemporaryDirectory(prefix="gpu-check-quickstart-") as name:
        # the reference takes the longest, so the first run is made at the same time
        first, *others = runs
        started, started_first = _start(reference, Path(name), steps), _start(first, Path(name), steps)
        expected = _losses(task, reference, started)
        _compare(task, first, expected, _losses(task, first, started_first))
        for other in others:
            _compare(task, other, expected, _losses(task, other, _start(other, Path(name), steps)))


def _need_demo() -> None:
    """Raises Skipped: DeepSpeed or the files of the demo are missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("DeepSpeed is not installed")
    missing = [name for name in DEMO if not (ROOT / name).exists()]
    if missing:
        raise Skipped(f"there is no {missing[0]}: run `make demo`, or copy the folder .demo from another machine")


def _runs(task: Task) -> list[Run]:
    """The reference, and the runs that can be made here."""
    exact, rounded = (json.loads((ROOT / "ds_configs" / name).read_text()) for name in ("cpu_pp2.json", "gpu_zero1_bf16.json"))
    batch = {name: exact[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu")}
    rounded["optimizer"]["params"]["lr"] = exact["optimizer"]["params"]["lr"]
    reference = Run("CPU", exact, 0.0, on_cpu=True)
    if task.rehearse:
        task.note("The runs in bfloat16 are left out.")
        return [reference, Run("CPU, two stages", exact, EXACT, on_cpu=True, stages=2)]
    runs = [reference, Run("GPU, float32", exact, EXACT, on_cpu=False), Run("GPU, bfloat16", rounded | batch, ROUNDED, False)]
    import torch

    if torch.cuda.device_count() >= 2:
        runs.append(Run("GPU, two stages", exact, EXACT, on_cpu=False, stages=2))
    else:
        task.note("There is one GPU, so the run with two stages is left out: NCCL refuses two processes on one GPU.")
    return runs


@dataclass(frozen=True)
class _Started:
    """A run in progress."""

    folder: Path
    """Its output `run`, and a log of each rank."""
    ranks: list[subprocess.Popen[bytes]]


def _start(run: Run, folder: Path, steps: int) -> _Started:
    """The ranks are in the process group of this part, which is ended as a whole if the part reaches its time limit."""
    own = folder / run.name.replace(" ", "_").replace(",", "")
    own.mkdir()
    settings = own / "ds.json"
    settings.write_text(json.dumps(run.settings), encoding="utf-8")
    values = {
        "output": own / "run",
        "teacher.dtype": "float32",
        "parallel.pipeline_stages": run.stages,
        "training.steps": steps,
        "training.schedule.warmup_steps": 1,
        "eval.rows": 2,
        "checkpoint.every": 1000,
    }
    command = [sys.executable, "examples/pretrain_vocagno.py", "examples/quickstart.toml", "--deepspeed_config", str(settings)]
    command += [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    ranks = []
    for rank, variables in enumerate(_variables(run)):
        with (own / f"rank{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT))
    return _Started(own, ranks)


def _variables(run: Run) -> list[dict[str, str]]:
    """The environment of each rank, as a launcher would set it."""
    from benchmarks.prove_same_loss import free_port

    threads = str(max(1, (os.cpu_count() or 1) // (2 * run.stages)))
    shared = {
        "WORLD_SIZE": str(run.stages),
        "LOCAL_SIZE": str(run.stages),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    shared |= {"OMP_NUM_THREADS": threads}
    if run.on_cpu:
        shared |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(run.stages)]


def _losses(task: Task, run: Run, started: _Started) -> list[float]:
    """The loss of each step. Adds the row of the run. An empty list if it failed."""
    from megatron_vocagno.training.monitor import read_metrics

    while any(rank.poll() is None for rank in started.ranks) and not any(rank.poll() for rank in started.ranks):
        time.sleep(0.1)
    failed = [number for number, rank in enumerate(started.ranks) if rank.poll()]
    for rank in started.ranks:  # the others of a failed run would wait for it
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    if failed:
        lines = (started.folder / f"rank{failed[0]}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        task.check(f"run: {run.name}", False, why=" / ".join(line for line in lines[-6:] if line.strip()))
        return []
    lines_of_steps = [line for line in read_metrics(started.folder / "run") if "loss/train" in line]
    # the first step compiles
    seconds = median(line["throughput/step_seconds"] for line in lines_of_steps[1:])
    task.add(f"run: {run.name}", "", {"ms": 1000 * seconds, "steps": len(lines_of_steps)})
    return [line["loss/train"] for line in lines_of_steps]


def _compare(task: Task, run: Run, expected: Sequence[float], losses: Sequence[float]) -> None:
    from benchmarks.prove_same_loss import relative

    if not expected or not losses:
        return  # the row of the run that failed is there
    gaps = [relative(a, b) for a, b in zip(expected, losses, strict=True)]
    numbers = {"largest relative difference": max(gaps), "tolerance": run.tolerance, "first loss": losses[0], "last": losses[-1]}
    task.check(f"losses: {run.name}", max(gaps) <= run.tolerance, numbers)
