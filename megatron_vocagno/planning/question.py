"""What is asked: a run on a cluster, out of its files and the command line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from megatron_vocagno.batch.pack import SLACK
from megatron_vocagno.config import Bos, Run, Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_ids
from megatron_vocagno.corpus.manifest import DATASET
from megatron_vocagno.engine.settings import DeepSpeedConfig, batch_layout, read_settings, zero_stage
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.configuration import SUPPORTED, student_config
from megatron_vocagno.planning.comparison import Task, as_asked, compare
from megatron_vocagno.planning.cost import Cluster
from megatron_vocagno.planning.hardware import Assumptions, gpu
from megatron_vocagno.planning.memory import StudentUse, TeacherUse
from megatron_vocagno.planning.report import as_json, text
from megatron_vocagno.planning.sizes import given_config, read_config, sizes
from megatron_vocagno.run_file import load_run


@dataclass(frozen=True)
class Question:
    """A run on a cluster, as its files and the command line have it."""

    task: Task
    cluster: Cluster
    datasets: list[AlignedDataset]
    """None where one is not there yet."""
    notes: list[str]
    """What had to be assumed, and why the run could not start."""
    teachers: tuple[PretrainedConfig, ...]
    """All that the run asks, of their text alone; those of the task are none where one of them cannot be counted."""
    uncounted: str
    """Why bytes and FLOPs of a teacher are not known; empty where they are."""


def answer(options: argparse.Namespace) -> str:
    """The plan, as it is printed. Raises UserError."""
    question = ask(options)
    if question.uncounted:
        raise RunError(question.uncounted)
    task, cluster, notes = question.task, question.cluster, question.notes
    found, asked = compare(task, cluster), as_asked(task, cluster, zero_stage(task.settings))
    if not found:
        raise RunError(
            f"{task.rows} rows of a global batch cannot be dealt to {options.gpus} GPUs in any layout: change train_batch_size"
        )
    if options.json:
        return json.dumps(as_json(task, cluster, found, asked, notes), indent=2, default=str) + "\n"
    return text(task, cluster, found, asked, notes)


def ask(options: argparse.Namespace) -> Question:
    """Read all that the options name. Raises UserError."""
    run = load_run(options.run, options.set)
    settings = read_settings(options.deepspeed_config, run.parallel.pipeline_stages, "cuda")
    if options.gpus < 1 or options.gpus_per_node < 1:
        raise RunError(f"--gpus {options.gpus}, --gpus-per-node {options.gpus_per_node}: at least 1 of each")
    datasets = _datasets(run)
    assumed = _assumptions(options, run, datasets)
    cluster = Cluster(gpu(options.gpu), options.gpus, options.gpus_per_node, assumed)
    notes = []
    if not datasets:
        notes.append(
            f"note: no data at {run.data.train[0].path} yet: {assumed.teacher_tokens:.2f} teacher tokens for each student token, "
            f"{assumed.unmapped:.1%} of them unmapped, are assumed."
        )
    rows, problem = _rows(settings, options.gpus, run.parallel.pipeline_stages)
    if problem:
        notes.append(f"warning: as its files have it, the run does not start: {problem}")
    config = _student(run, options.student_config, datasets)
    teachers = tuple(_teacher_configs(run, options))
    uncounted = next((why for config in teachers if (why := _uncounted(config, "teacher"))), "")
    counted = () if uncounted else teachers
    student = StudentUse(config, sizes(config), run.data.row_length)
    task = _task(run, settings, options, datasets, assumed, rows, student, counted)
    return Question(task, cluster, datasets, notes, teachers, uncounted)


def _datasets(run: Run) -> list[AlignedDataset]:
    """All of the run's, or none where one is not there yet."""
    paths = [source.path for source in run.data.train]
    return [AlignedDataset.open(path) for path in paths] if all((path / DATASET).is_file() for path in paths) else []


def _assumptions(options: argparse.Namespace, run: Run, datasets: Sequence[AlignedDataset]) -> Assumptions:
    """The defaults, what the datasets know, and what the command line says, the later before the earlier."""
    known = {}
    if datasets:
        weights = [source.weight / sum(each.weight for each in run.data.train) for source in run.data.train]
        shares = list(zip(weights, (data.totals for data in datasets), strict=True))
        known["teacher_tokens"] = sum(weight * each.teacher_tokens / each.student_tokens for weight, each in shares)
        known["unmapped"] = sum(weight * each.span_widths[0] / each.student_tokens for weight, each in shares)
    given = {field.name: value for field in fields(Assumptions) if (value := getattr(options, field.name)) is not None}
    for name, value in given.items():
        most = 100 if name in ("teacher_tokens", "reread") else 1
        if not 0 < value <= most:
            raise RunError(f"--{name.replace('_', '-')} {value:g}: a number above 0 and up to {most} expected")
    return replace(Assumptions(), **(known | given))


def _rows(settings: DeepSpeedConfig, gpus: int, stages: int) -> tuple[int, str]:
    """Rows of a global batch; and why the run cannot start on so many GPUs as it is, if it cannot."""
    try:
        return batch_layout(settings, gpus, stages).rows, ""
    except RunError as error:
        if "train_batch_size" not in settings or "train_micro_batch_size_per_gpu" not in settings:
            raise
        return int(settings["train_batch_size"]), str(error)


def _task(
    run: Run,
    settings: DeepSpeedConfig,
    options: argparse.Namespace,
    datasets: Sequence[AlignedDataset],
    assumed: Assumptions,
    rows: int,
    student: StudentUse,
    teachers: Sequence[PretrainedConfig],
) -> Task:
    tokens_per_row = run.data.row_length - SLACK - _front(run.student.bos, run.student.pretrained, datasets, "student")
    tokens = options.tokens or run.training.tokens or (run.training.steps or 0) * rows * tokens_per_row
    uses = tuple(
        _use(teacher, found, run, assumed, _front(teacher.bos, teacher.path, datasets, "teacher"))
        for teacher, found in zip(run.teacher, teachers, strict=False)
    )
    scored = sum(data.totals.teacher_tokens for data in datasets) or tokens * assumed.teacher_tokens
    return Task(
        run,
        settings,
        student,
        uses,
        rows,
        settings["train_micro_batch_size_per_gpu"],
        tokens_per_row,
        tokens,
        scored,
    )


def _student(run: Run, given: Path | None, datasets: Sequence[AlignedDataset]) -> PretrainedConfig:
    if given is not None:
        config = given_config(given, "--student-config")
    elif run.student.config is not None:
        own = datasets[0].student_tokenizer if datasets else None
        return student_config(run.student.config, own.vocab_size if own else None, own.rows if own else None)
    else:
        assert run.student.pretrained is not None
        config = read_config(run.student.pretrained, "student")
    if why := _uncounted(config, "student"):
        raise RunError(why)
    return config


def _teacher_configs(run: Run, options: argparse.Namespace) -> Iterator[PretrainedConfig]:
    """Of each teacher that the run asks."""
    asked = run.teacher if run.guidance.needs_teacher else ()
    for teacher, given in zip_longest(asked, options.teacher_config[: len(asked)]):
        if given is not None:
            yield given_config(given, "--teacher-config").get_text_config()
        elif teacher.path is not None:
            yield read_config(teacher.path, "teacher").get_text_config()
        else:
            raise RunError(
                "a cached teacher has no teacher.path here, and the plan counts what its scoring takes: give its config.json "
                "with --teacher-config, once for each teacher"
            )


def _front(asked: Bos, model: Path | None, datasets: Sequence[AlignedDataset], side: Literal["student", "teacher"]) -> int:
    """Positions of a row that are in front of text; 1 where no tokenizer is here that would say."""
    if asked == "none":
        return 0
    if asked != "auto":
        return 1
    folders = [model.expanduser()] if model is not None and model.expanduser().is_dir() else []
    folders += [data.path / "tokenizers" / side for data in datasets[:1]]
    return next((len(found) for folder in folders if (found := front_ids(folder)) is not None), 1)


def _use(teacher: Teacher, config: PretrainedConfig, run: Run, assumed: Assumptions, front: int) -> TeacherUse:
    row = min(math.ceil(run.data.row_length * assumed.teacher_tokens) + front, config.max_position_embeddings)
    dtype: torch.dtype = getattr(torch, teacher.dtype)
    return TeacherUse(config, sizes(config), dtype, teacher.weights != "as-is", teacher.tokens_per_batch, row)


def _uncounted(config: PretrainedConfig, whose: str) -> str:
    """Why bytes and FLOPs of a model are not known; empty where they are."""
    if config.model_type in SUPPORTED:
        return ""
    return f"plan cannot count a {whose} of type {config.model_type!r}; these it can: {', '.join(SUPPORTED)}"
