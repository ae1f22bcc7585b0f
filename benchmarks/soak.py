"""How a run bears what machines do to it: ranks killed at random moments under a supervisor, and many steps on end.

    python -m benchmarks.soak --kills 20     # final weights bit for bit those of an undisturbed run?
    python -m benchmarks.soak --steps 500    # does it keep to its memory, and leave nothing behind?

A tiny student and teacher on real text, two pipeline stages as two real processes, started by the real launcher.
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
    """Steps done by then."""
    moment: str
    """"start": before a step of this life. "step". "save": a checkpoint was left unfinished."""


def shared_memory() -> set[Path]:
    """What lies in /dev/shm, without the semaphores that other programs' processes share: training has none."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


class Supervised:
    """A run under run_forever.sh."""

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
        """The living ranks by number."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if SCRIPT in process.cmdline() and "RANK" in (variables := process.environ()):
                    found[int(variables["RANK"])] = process
            except psutil.Error:
                continue
        return found

    def steps(self) -> int:
        """Steps that metrics.jsonl holds."""
        try:
            return (self.output / "metrics.jsonl").read_bytes().count(b'"loss/train"')
        except OSError:
            return 0

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether it came before the run's end."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def kill(self, rank: int) -> None:
        """kill -9 one rank, and wait until nothing of this life is left."""
        ranks = self.ranks()
        if rank in ranks:
            ranks[rank].send_signal(signal.SIGKILL)
        psutil.wait_procs(list(ranks.values()), timeout=120)

    def unfinished(self) -> list[Path]:
        """Checkpoints that have been begun."""
        return [folder for folder in checkpoint_folders(self.output / "checkpoints") if not (folder / MANIFEST).is_file()]


def kill_at_random(case: Case, name: str, overrides: Sequence[str], kills: int, seed: int) -> tuple[list[Kill], Supervised]:
    """A run that is killed so often, each time in another life, and then left to finish. Every third kill aims at a save."""
    chance, run, met = random.Random(seed), Supervised(case, name, overrides), list[Kill]()
    while len(met) < kills and (kill := _strike(run, ("save", "step", "any")[len(met) % 3], chance)):
        met.append(kill)
    run.process.wait()
    return met, run


def _strike(run: Supervised, aim: str, chance: random.Random) -> Kill | None:
    """Wait for the next life and end it; None where the run came to its end before that."""
    run.wait_for(lambda: len(run.ranks()) == 2)
    before, debris = run.steps(), set(run.unfinished())
    if aim == "save":
        run.wait_for(lambda: bool(set(run.unfinished()) - debris))
        time.sleep(chance.uniform(0, 0.05))
    elif aim == "step":
        run.wait_for(lambda: run.steps() > before)
        time.sleep(chance.uniform(0, 1))
    else:
        time.sleep(chance.uniform(0, 12))
    if run.process.poll() is not None:
        return None
    rank = chance.randrange(2)
    run.kill(rank)
    broken = set(run.unfinished()) - debris
    return Kill(rank, run.steps(), "save" if broken else "step" if run.steps() > before else "start")


def differences(a: Path, b: Path) -> list[str]:
    """Tensors of two runs' last checkpoints, weights and optimizer states, that are not bit for bit the same."""
    ends = [_tensors(finished_checkpoints(output / "checkpoints")[0]) for output in (a, b)]
    names = ends[0].keys() | ends[1].keys()
    return sorted(name for name in names if not all(name in end for end in ends) or not torch.equal(*(end[name] for end in ends)))


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = [file for part in (STUDENT, OPTIMIZER) for file in (checkpoint / part).glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def soak(case: Case, steps: int) -> tuple[list[int], Supervised]:
    """Resident bytes of all ranks, once a step."""
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
    """Living or undead processes that belong to a run which has ended."""
    mark = str(run.output.parent)
    return [
        " ".join(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"]) if mark in str(process.info["cmdline"])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(
        "python -m benchmarks.soak",
        "",
        "How a run bears what machines do: ranks killed at random moments, and many steps on end. Half an hour.",
        "python -m benchmarks.soak --kills 20 --steps 500",
        GOALS,
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=0,
        metavar="N",
        help="kills of a rank; the weights must stay those of an undisturbed run (default: 0)",
    )
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="steps on end; memory must stay flat (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments of the kills (default: 0)")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Returns 0 when the run bore it."""
    before = shared_memory()
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        case = build_case(Path(folder), real.smollm2_tokenizer_folder(Path(folder) / "teacher_tokenizer"))
        if options.kills:
            overrides = [*LAYOUT, f"training.steps={2 * options.kills}", "checkpoint.every=1"]
            straight = case.run("straight", 2, overrides)
            kills, run = kill_at_random(case, "killed", overrides, options.kills, options.seed)
            print("| kill | moment | rank | steps done |\n|---|---|---|---|")
            print("\n".join(f"| {i} | {kill.moment} | {kill.rank} | {kill.step} |" for i, kill in enumerate(kills, start=1)))
            different = differences(straight, run.output)
            moments = ", ".join(f"{count} in a {moment}" for moment, count in Counter(kill.moment for kill in kills).items())
            print(f"{len(kills)} kills ({moments}); exit code {run.process.returncode}; {len(different)} tensors differ")
            fine = len(kills) == options.kills and run.process.returncode == 0 and not different and not left_behind(run)
        if options.steps:
            resident, run = soak(case, options.steps)
            growth = max(resident) / resident[0] - 1
            print(
                f"{len(metrics(run.output))} lines of metrics; exit code {run.process.returncode}; two ranks hold "
                f"{resident[0] / 1e6:.0f} MB after step 50, at most {max(resident) / 1e6:.0f} MB since ({growth:+.2%}); "
                f"{len(left_behind(run))} processes left"
            )
            fine &= run.process.returncode == 0 and growth <= 0.02 and not left_behind(run)
    print(f"new in /dev/shm: {len(shared_memory() - before)}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
