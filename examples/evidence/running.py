"""Train students with the training command, each for an arm, a setting and a seed, and score them at each checkpoint.

    ROOT/runs/EXPERIMENT/SETTING/NAME/seed-3-lr-0.002/   the output of the run, with spec.json, settings.json, scores.jsonl
    ROOT/runs/EXPERIMENT/SETTING/NAME/seed-3-lr-0.002.log   the log of the command
    ROOT/results/EXPERIMENT.jsonl                        the rows of all runs of an experiment, in the order of its specs

A run with scores.jsonl is complete and does not run again. An interrupted run resumes from its checkpoint. A run whose spec has
changed starts over.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.page import circumstances
from examples.evidence.costs import Costs
from examples.evidence.jobs import Job, work
from megatron_vocagno.compat import tomllib
from megatron_vocagno.engine.manifest import checkpoint_folders, step_of
from megatron_vocagno.files import write_durably
from megatron_vocagno.pretrain import main
from megatron_vocagno.training.monitor import FINISHED_FILE, read_metrics

HERE = Path(__file__).parent
ARMS = HERE / "arms"
BASE, SETTINGS = HERE / "base.toml", HERE / "settings.json"
EXPERIMENTS = ("mechanism", "noise", "continued", "beyond")
"""The last one takes hours, and runs only if it is named."""
SPEC, SCORES = "spec.json", "scores.jsonl"


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    root: Path = Path(".evidence")
    seeds: int = 3
    """Number of seeds of the main arms: 1, 2, …"""
    quick: bool = False
    """Few steps and arms, only to check that everything runs."""
    workers: int = 2


@dataclass(frozen=True)
class Spec:
    """One student."""

    experiment: str
    """A module of this package, whose `score` scores the student."""
    setting: str
    """For example `random-0.6`. Arms of one setting and seed learn from the same data in the same order."""
    arm: str
    """arms/ARM.toml"""
    seed: int
    learning_rate: float
    overrides: tuple[str, ...] = ()
    """Fields of the run file: data, student, steps, and seeds other than `training.seed`."""
    variant: str = ""
    """A suffix of the arm's name if overrides change the arm, for example `-16` for `equal-parts`."""
    batch: Mapping[str, int] = field(default_factory=dict)
    """Fields that replace those of settings.json: train_batch_size, train_micro_batch_size_per_gpu."""

    @property
    def name(self) -> str:
        return self.arm + self.variant

    def output(self, root: Path) -> Path:
        return root / "runs" / self.experiment / self.setting / self.name / f"seed-{self.seed}-lr-{self.learning_rate:g}"


@dataclass(frozen=True)
class Run:
    """A trained student."""

    spec: Spec
    output: Path

    @property
    def root(self) -> Path:
        """The `root` of the options that it was made with."""
        return self.output.parents[4]

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps, ascending, and the folders of their checkpoints: those of `checkpoint.keep_every`, and the last.

        A checkpoint of an interruption, at a step without an evaluation, is left out.
        """
        looked_at = {line["step"] for line in read_metrics(self.output) if "eval/loss" in line}
        folders = reversed(checkpoint_folders(self.output / "checkpoints"))
        return [(step, folder) for folder in folders if (step := step_of(folder)) in looked_at and step is not None]


class Experiment(Protocol):
    """A module of this package."""

    JUDGE: str
    """The score by which learning rates are chosen and arms are compared."""
    HIGHER_IS_BETTER: bool

    def runs(self, options: Options) -> Sequence[Spec]: ...

    def tuning(self, options: Options) -> Sequence[Spec]:
        """The same arms at several learning rates, on a seed and data that no table uses."""

    def prepare(self, specs: Sequence[Spec], options: Options) -> None:
        """Make missing corpora, datasets, teachers and losses for these specs."""

    def words(self, options: Options) -> dict[str, str]:
        """The values of `words` in templates/NAME.md."""

    def score(self, run: Run) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, scores by name) of each step to report. Called in its own process, on one thread."""


def experiment(name: str) -> Experiment:
    module: Any = importlib.import_module(f"examples.evidence.{name}")
    return module  # type: ignore[no-any-return]


def has_teacher(arm: str) -> bool:
    """Whether the run file of an arm has a section for the teacher."""
    return "teacher" in tomllib.loads((ARMS / f"{arm}.toml").read_text(encoding="utf-8"))


def run_all(specs: Sequence[Spec], options: Options) -> None:
    """Train and score the missing students. Raises JobFailed."""
    due = [spec for spec in specs if not is_done(spec, options.root)]
    work([job(spec, options, train_and_score) for spec in due], options.workers)


def train_all(specs: Sequence[Spec], options: Options) -> None:
    """Train missing teachers, and students to continue from, without scoring them. Raises JobFailed."""
    due = [spec for spec in specs if not is_trained(spec, options.root)]
    work([job(spec, options, train) for spec in due], options.workers)


def job(spec: Spec, options: Options, do: Callable[[Spec, Path], None]) -> Job:
    output = spec.output(options.root)
    return Job(str(output.relative_to(options.root / "runs")), output.parent / f"{output.name}.log", partial(do, spec, output))


def is_trained(spec: Spec, root: Path) -> bool:
    output = spec.output(root)
    return (output / FINISHED_FILE).exists() and (output / SPEC).read_text(encoding="utf-8") == _text(spec)


def is_done(spec: Spec, root: Path) -> bool:
    return is_trained(spec, root) and (spec.output(root) / SCORES).exists()


def train_and_score(spec: Spec, output: Path) -> None:
    """Run the training command, then the experiment's `score`, and record the costs. Runs in its own process."""
    train(spec, output)
    run, costs = Run(spec, output), Costs(output)
    rows = [
        {"experiment": spec.experiment, "setting": spec.setting, "arm": spec.name, "seed": spec.seed}
        | {"learning_rate": spec.learning_rate, "step": step, "scores": scores, "costs": asdict(costs.at(step))}
        for step, scores in experiment(spec.experiment).score(run)
    ]
    _write(output / SCORES, "".join(json.dumps(row) + "\n" for row in rows))
    for _, checkpoint in run.checkpoints():
        shutil.rmtree(checkpoint / "optimizer", ignore_errors=True)  # two thirds of its size, and no run resumes from here


def train(spec: Spec, output: Path) -> None:
    """Run the training command in this process. Raises SystemExit with its exit code if the run did not finish."""
    if (output / SPEC).exists() and (output / SPEC).read_text(encoding="utf-8") != _text(spec):
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    _write(output / SPEC, _text(spec))
    if (output / FINISHED_FILE).exists():
        return
    settings = json.loads(SETTINGS.read_text(encoding="utf-8")) | dict(spec.batch)
    settings["optimizer"]["params"]["lr"] = spec.learning_rate
    _write(output / SETTINGS.name, json.dumps(settings, indent=2))
    arguments = [str(ARMS / f"{spec.arm}.toml"), "--deepspeed_config", str(output / SETTINGS.name)]
    for override in (f"output={output}", f"training.seed={spec.seed}", *spec.overrides):
        arguments += ["--set", override]
    os.environ["MASTER_PORT"] = str(_free_port())
    code = main(arguments)
    if code or not (output / FINISHED_FILE).exists():
        raise SystemExit(code or f"{output} stopped before its last step")


def collect(specs: Sequence[Spec], root: Path) -> list[dict[str, Any]]:
    """The rows of complete runs, in the order of their specs."""
    files = [spec.output(root) / SCORES for spec in specs if is_done(spec, root)]
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def write_results(name: str, specs: Sequence[Spec], options: Options) -> None:
    """Write the rows of an experiment, and a note of when and how they were made."""
    folder = options.root / "results"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in collect(specs, options.root)))
    command = f"python -m examples.evidence run {name} {'--quick' if options.quick else f'--seeds {options.seeds}'}"
    command += "" if options.root == Options().root else f" --root {options.root}"
    made = circumstances("torch", "deepspeed", "transformers")
    note = {"command": command, "runs": len(specs), "circumstances": made, "words": experiment(name).words(options)}
    _write(folder / f"{name}.json", json.dumps(note, indent=1))


def _text(spec: Spec) -> str:
    """Everything that determines a run: the spec, and the contents of its files."""
    files = [(path.name, path.read_text(encoding="utf-8")) for path in (ARMS / f"{spec.arm}.toml", BASE, SETTINGS)]
    return json.dumps(asdict(spec) | {"files": files}, indent=1)


def _write(path: Path, text: str) -> None:
    write_durably(path, text.encode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
