"""Stress a run: kill ranks at random moments under a supervisor, or train for many steps without interruption.

    python -m benchmarks.soak --kills 20     # are the final weights bit for bit those of an uninterrupted run?
    python -m benchmarks.soak --steps 500    # does memory stay flat, and is nothing left behind?

The run has a tiny student and teacher on real text, and two pipeline stages as two processes, started by the DeepSpeed
launcher.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.page import GOALS
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.engine.manifest import MANIFEST, OPTIMIZER, STUDENT, checkpoint_folders, finished_checkpoints
from tests import tokenizers_for_tests as real
from tests.runs import REPOSITORY, SCRIPT, Case, build_case, environment, metrics

SUPERVISOR = REPOSITORY / "examples" / "launch" / "run_forever.sh"
LAYOUT = ["parallel.pipeline_stages=2", "logging.every=1000000"]


@dataclass(frozen=True)
class Kill:
    """One kill -9."""

    rank: int
    step: int
    """Number of steps that were done."""
    moment: str
    """"start": before the first step since the last restart. "step": during a later step. "save": a checkpoint is unfinished."""


def shared_memory() -> set[Path]:
    """Files in /dev/shm, without semaphores. Training has no semaphores, but other programs may."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


class Supervised:
    """A run under the supervisor run_forever.sh."""

    def __init__(self, case: Case, name: str, overrides: Sequence[str]) -> None:
        self.output = case.out(name)
        arguments = case.command(name, overrides)
        variables = environment(RUN_FOREVER_TRIES="1000", RUN_FOREVER_SECONDS="0")
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", variables["MASTER_PORT"]]
        self.log = self.output.with_name("log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(SUPERVISOR), str(self.output), *launcher, SCRIPT, *arguments],
                cwd=REPOSITORY,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ranks(self) -> dict[int, psutil.Process]:
        """Running ranks by number."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if SCRIPT in process.cmdline() and "RANK" in (variables := process.environ()):
                    found[int(variables["RANK"])] = process
            except psutil.Error:
                continue
        return found

    def steps(self) -> int:
        """Number of steps in metrics.jsonl."""
        try:
            return (self.output / "metrics.jsonl").read_bytes().count(b'"loss/train"')
        except OSError:
            return 0

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; returns False if the run ended first."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def kill(self, rank: int) -> None:
        """Send SIGKILL to a rank, and wait until all ranks have exited."""
        ranks = self.ranks()
        if rank in ranks:
            ranks[rank].send_signal(signal.SIGKILL)
        psutil.wait_procs(list(ranks.values()), timeout=120)

    def unfinished(self) -> list[Path]:
        """Checkpoints that were started, but not finished."""
        return [folder for folder in checkpoint_folders(self.output / "checkpoints") if not (folder / MANIFEST).is_file()]


def kill_at_random(case: Case, name: str, overrides: Sequence[str], kills: int, seed: int) -> tuple[list[Kill], Supervised]:
    """Kill a run `kills` times, at most once per restart, then let it finish. Every third kill aims at a save."""
    chance, run, kills_done = random.Random(seed), Supervised(case, name, overrides), list[Kill]()
    while len(kills_done) < kills and (kill := _strike(run, ("save", "step", "any")[len(kills_done) % 3], chance)):
        kills_done.append(kill)
    run.process.wait()
    return kills_done, run


def _strike(run: Supervised, aim: str, chance: random.Random) -> Kill | None:
    """Wait for the next restart and kill a rank. Returns None if the run finished first."""
    run.wait_for(lambda: len(run.ranks()) == 2)
    before, debris = run.steps(), set(run.unfinished())
    if aim == "save":
        run.wait_for(lambda: bool(set(run.unfinished()) - debris))
        time.sleep(chance.uniform(0, 0.05))
    else:
        # a limit in steps, so that a fast run does not finish first
        limit, seconds = (before + 1, 1) if aim == "step" else (before, 12)
        if aim == "step":
            run.wait_for(lambda: run.steps() > before)
        end = time.monotonic() + chance.uniform(0, seconds)
        run.wait_for(lambda: time.monotonic() > end or run.steps() > limit)
    if run.process.poll() is not None:
        return None
    rank = chance.randrange(2)
    run.kill(rank)
    broken = set(run.unfinished()) - debris
    return Kill(rank, run.steps(), "save" if broken else "step" if run.steps() > before else "start")


def differences(a: Path, b: Path) -> list[str]:
    """Names of tensors (weights, optimizer states) that differ in any bit between the last checkpoints of two runs."""
    ends = [_tensors(finished_checkpoints(output / "checkpoints")[0]) for output in (a, b)]
    names = ends[0].keys() | ends[1].keys()
    return sorted(name for name in names if not all(name in end for end in ends) or not torch.equal(*(end[name] for end in ends)))


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = [file for part in (STUDENT, OPTIMIZER) for file in (checkpoint / part).glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def soak(case: Case, steps: int) -> tuple[list[int], Supervised]:
    """Run `steps` steps; returns the resident bytes of all ranks, once per step from step 50."""
    run = Supervised(case, "soak", [*LAYOUT, f"training.steps={steps}", "checkpoint.every=100"])
    resident: dict[int, int] = {}
    while run.process.poll() is None:
        ranks, done = run.ranks(), run.steps()
        if len(ranks) == 2 and done:
            try:
                resident[done] = sum(rank.memory_info().rss for rank in ranks.values())
            except psutil.Error:
                continue
        time.sleep(0.1)
    return [resident[step] for step in sorted(resident) if step >= 50], run


def left_behind(run: Supervised) -> list[str]:
    """Command lines of processes that still belong to a finished run."""
    mark = str(run.output.parent)
    return [
        " ".join(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"]) if mark in str(process.info["cmdline"])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run; returns the exit code."""
    parser = Parser(
        "python -m benchmarks.soak",
        "",
        "Stress a run: kill ranks at random moments, and train for many steps. Takes half an hour.",
        "python -m benchmarks.soak --kills 20 --steps 500",
        GOALS,
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=0,
        metavar="N",
        help="number of kills; the final weights must equal those of an uninterrupted run (default: 0)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        metavar="N",
        help="number of steps without interruption; memory must stay flat (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random moments (default: 0)")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Run both parts that are requested; returns 0 if they succeed, else 1."""
    before = shared_memory()
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        build_case(Path(folder), real.smollm2_tokenizer_folder(Path(folder) / "teacher_tokenizer"))
        case = Case.of(Path(folder))
        if options.kills:
            overrides = [*LAYOUT, f"training.steps={2 * options.kills}", "checkpoint.every=1"]
            straight = case.run("straight", 2, overrides)
            kills, run = kill_at_random(case, "killed", overrides, options.kills, options.seed)
            print("| kill | moment | rank | steps done |\n|---|---|---|---|")
            print("\n".join(f"| {i} | {kill.moment} | {kill.rank} | {kill.step} |" for i, kill in enumerate(kills, start=1)))
            different = differences(straight, run.output)
            moments = ", ".join(f"{count} in a {moment}" for moment, count in Counter(kill.moment for kill in kills).items())
            print(f"{len(kills)} kills ({moments}), exit code {run.process.returncode}; {len(different)} tensors differ")
            fine = len(kills) == options.kills and run.process.returncode == 0 and not different and not left_behind(run)
        if options.steps:
            resident, run = soak(case, options.steps)
            growth = max(resident) / resident[0] - 1
            print(
                f"{len(metrics(run.output))} lines of metrics, exit code {run.process.returncode}; two ranks use "
                f"{resident[0] / 1e6:.0f} MB after step 50, at most {max(resident) / 1e6:.0f} MB later ({growth:+.2%}), "
                f"{len(left_behind(run))} processes left"
            )
            fine &= run.process.returncode == 0 and growth <= 0.02 and not left_behind(run)
    print(f"new in /dev/shm: {len(shared_memory() - before)}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
