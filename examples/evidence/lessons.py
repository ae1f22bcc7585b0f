"""The data of the first experiment: noisy lines of facts, aligned for the teachers and scored by them.

DATA/120-facts-400-steps/WORLD/
    tokenizers/digits, pairs                 tokenizers that cut numbers into one or two digits
    teachers/pairs, digits, gaps             Hugging Face folders, each trained on clean lines by the training command
    random-0.6/seed-1/train.jsonl            the corpus, with the labels of its lines
    random-0.6/seed-1/digits-pairs/train     its dataset, named after the student's tokens and the teacher that scored it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from examples.evidence import facts as task
from examples.evidence.facts import Corruption, Fact
from examples.evidence.jobs import Job, work
from examples.evidence.oracle import WHOLE, write_oracle
from examples.evidence.running import Options, Spec, train_all
from megatron_vocagno.export import export
from tools.preprocess import build_dataset, score_teacher

Tokens = Literal["digits", "pairs"]
TEACHERS: dict[str, Tokens] = {"pairs": "pairs", "digits": "digits", "gaps": "pairs"}
"""The tokenizer of each teacher."""
MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
"""Fields of students and teachers."""
ROW = 128
CHECKPOINTS = 5
"""Checkpoints per run, evenly spaced."""
TEACHER_RATE = 3e-3
PARTS = ("train", "valid")
ORACLE = "oracle"


@dataclass(frozen=True)
class Sizes:
    facts: int = 120
    steps: int = 400
    teacher_steps: int = 400
    rows: int = 8
    """Rows per step, and per micro-batch."""
    sample_rows: int = 8

    def lines(self, steps: int) -> int:
        """Enough lines for a run of `steps` to read none twice. The shortest line has 8 tokens and EOS."""
        return steps * self.rows * ROW // 9


QUICK = Sizes(facts=30, steps=20, teacher_steps=20, rows=2, sample_rows=2)


@dataclass(frozen=True)
class Setting:
    """The training data of a student."""

    corruption: Corruption
    share: float
    teacher: str = "pairs"
    student: Tokens = "digits"
    world: Literal["tables", "tune"] = "tables"
    """The set of facts."""
    micro_batches: int = 1
    """Micro-batches per step. With one, the scope `microbatch` equals `global`."""

    @property
    def name(self) -> str:
        marks = {"gaps": "-gaps"}.get(self.teacher, "") + ("-wide" if self.student == "pairs" else "")
        marks += f"-{self.micro_batches}-micro-batches" if self.micro_batches > 1 else ""
        return f"{'tune-' if self.world == 'tune' else ''}{self.corruption}-{self.share:g}{marks}"


def known_facts(world: str, count: int) -> list[Fact]:
    return task.invent_facts(count, seed=["tables", "tune"].index(world))


@dataclass(frozen=True)
class Files:
    """Paths of the prepared files."""

    root: Path
    world: str
    size: Sizes

    @property
    def folder(self) -> Path:
        size = f"{self.size.facts}-facts-{self.size.steps}-steps"
        return self.root / "data" / "mechanism" / size / self.world

    def tokenizer(self, tokens: Tokens) -> Path:
        return self.folder / "tokenizers" / tokens

    def teacher(self, name: str) -> Path:
        return self.folder / "teachers" / name

    def corpus(self, setting: Setting, seed: int, part: str) -> Path:
        """The corpus of a setting. Settings that differ only in their models share it."""
        return self.folder / f"{setting.corruption}-{setting.share:g}" / f"seed-{seed}" / f"{part}.jsonl"

    def dataset(self, setting: Setting, seed: int, part: str, teacher: str) -> Path:
        return self.corpus(setting, seed, part).parent / f"{setting.student}-{teacher}" / part


def run_overrides(size: Sizes, steps: int) -> list[str]:
    model = ", ".join(f"{name} = {json.dumps(value)}" for name, value in MODEL.items())
    every = steps // CHECKPOINTS
    return [
        f"data.row_length={ROW}",
        "data.attention=document",
        f"student.config={{{model}}}",
        f"training.steps={steps}",
        f"training.schedule.warmup_steps={steps // 20}",
        f"eval.rows={size.sample_rows}",
        f"checkpoint.every={every}",
        f"checkpoint.keep_every={every}",
        f"logging.every={every}",
    ]


def batch_of(size: Sizes, micro_batches: int = 1) -> dict[str, int]:
    return {"train_batch_size": size.rows, "train_micro_batch_size_per_gpu": size.rows // micro_batches}


def prepare_datasets(wanted: Sequence[tuple[Files, Setting, int, str]], workers: int) -> None:
    """wanted: files, setting, seed, and the teacher that scores the dataset."""
    jobs: dict[Path, Job] = {}
    for files, setting, seed, teacher in wanted:
        write_corpora(files, setting, seed)
        folder = files.dataset(setting, seed, "train", teacher).parent
        if not (folder / WHOLE).exists():
            make = partial(make_datasets, files, setting, seed, teacher)
            jobs[folder] = Job(str(folder.relative_to(files.root)), folder / "log.txt", make)
    work(list(jobs.values()), workers)


def prepare_teachers(files: Files, names: Sequence[str], options: Options) -> None:
    """Train each teacher on clean lines with the training command, by plain language modeling."""
    task.write_tokenizer(files.tokenizer("digits"), 1)
    task.write_tokenizer(files.tokenizer("pairs"), 2)
    missing = [name for name in names if not (files.teacher(name) / WHOLE).exists()]
    folders = {name: files.folder / "lessons" / name for name in missing}
    work(
        [
            Job(f"lessons of {name}", folder / "log.txt", partial(make_lessons, files, name, folder))
            for name, folder in folders.items()
        ],
        options.workers,
    )
    specs = [teacher_spec(files, name, folders[name] / "dataset") for name in missing]
    train_all(specs, options)
    for name, spec in zip(missing, specs, strict=True):
        shutil.rmtree(files.teacher(name), ignore_errors=True)
        export(spec.output(options.root), files.teacher(name))
        (files.teacher(name) / WHOLE).touch()


def teacher_spec(files: Files, name: str, dataset: Path) -> Spec:
    size = files.size
    overrides = [f"data.train={dataset}", *run_overrides(size, size.teacher_steps)]
    return Spec("mechanism", f"{files.world}-teachers", "clm", 0, TEACHER_RATE, tuple(overrides), f"-{name}", batch_of(size))


def make_lessons(files: Files, name: str, folder: Path) -> None:
    """Clean lines. For `gaps`, a quarter of the facts is missing and a quarter has another value."""
    size, known = files.size, known_facts(files.world, files.size.facts)
    if name == "gaps":
        known = [
            replace(fact, value=fact.mistake if knows(i) == "mistaken" else fact.value)
            for i, fact in enumerate(known)
            if knows(i) != "ignorant"
        ]
    lines = task.write_lines(known, size.lines(size.teacher_steps), "random", 0.0, np.random.default_rng(0))
    task.save_corpus(lines, folder / "lines.jsonl")
    build(folder / "lines.jsonl", folder / "dataset", files.tokenizer(TEACHERS[name]), files.tokenizer("digits"))


def knows(fact: int) -> str:
    """Whether the teacher with gaps knows a fact, by its number."""
    return ("mistaken", "ignorant", "known", "known")[fact % 4]


def write_corpora(files: Files, setting: Setting, seed: int) -> None:
    size = files.size
    known = known_facts(setting.world, size.facts)
    for number, part in enumerate(PARTS):
        path = files.corpus(setting, seed, part)
        if not path.exists():
            count = size.lines(size.steps) if part == "train" else size.sample_rows * ROW // 8
            random = np.random.default_rng([seed, number])
            task.save_corpus(task.write_lines(known, count, setting.corruption, setting.share, random), path)


def make_datasets(files: Files, setting: Setting, seed: int, teacher: str) -> None:
    """Align a corpus and score it with the teacher. Runs in its own process."""
    for part in PARTS:
        out = files.dataset(setting, seed, part, teacher)
        build(files.corpus(setting, seed, part), out, files.tokenizer(setting.student), files.tokenizer(TEACHERS[teacher]))
        _succeed(score_teacher.main([str(out), "--teacher", str(files.teacher(teacher)), "--dtype", "float32"]))
    (out.parent / WHOLE).touch()


def build(corpus: Path, out: Path, student: Path, teacher: Path) -> None:
    command = [str(corpus), "--out", str(out), "--student", str(student), "--teacher", str(teacher), "--workers", "1"]
    _succeed(build_dataset.main(command))


def write_oracle_of(files: Files, setting: Setting, seed: int, part: str) -> None:
    out = files.dataset(setting, seed, part, ORACLE)
    if (out / WHOLE).exists():
        return
    lines = task.load_corpus(files.corpus(setting, seed, part))
    tokenizer = open_tokenizer(files.tokenizer(TEACHERS[setting.teacher]))

    def wrong(document: int) -> NDArray[np.bool_]:
        line = lines[document]
        answers = task.answer_tokens(tokenizer.encode(line.text).tokens)
        return np.array([*answers, False]) & line.wrong

    write_oracle(files.dataset(setting, seed, part, setting.teacher), out, wrong)


def open_tokenizer(folder: Path) -> Tokenizer:
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer


def _succeed(code: int) -> None:
    if code:
        raise SystemExit(code)
