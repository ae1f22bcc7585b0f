"""Read the run's files and the command-line options of a plan, and make the plan."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from megatron_vocagno.batch.pack import SLACK
from megatron_vocagno.config import Bos, Data, Parallel, Run, Student, Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_ids
from megatron_vocagno.corpus.manifest import DATASET
from megatron_vocagno.engine.settings import DeepSpeedConfig, batch_layout, read_settings, zero_stage
from megatron_vocagno.errors import ModelError, RunError, missing_path_hint, tool
from megatron_vocagno.model.configuration import SUPPORTED, student_config
from megatron_vocagno.model.ulysses import check_ulysses
from megatron_vocagno.planning.comparison import Workload, compare, configured_layout
from megatron_vocagno.planning.cost import Cluster
from megatron_vocagno.planning.hardware import Assumptions, gpu
from megatron_vocagno.planning.memory import StudentSpec, TeacherSpec
from megatron_vocagno.planning.model_config import given_config, read_config
from megatron_vocagno.planning.report import as_json, select, text
from megatron_vocagno.planning.sizes import sizes
from megatron_vocagno.run_file import load_run


@dataclass(frozen=True)
class PlanRequest:
    """A run on a cluster, read from its files and the command line."""

    run: Run
    workload: Workload
    """Without teachers if one of them cannot be counted."""
    cluster: Cluster
    datasets: list[AlignedDataset]
    """Empty unless all of them exist."""
    notes: list[str]
    """Assumed values, and the reason if the run cannot start."""
    teachers: tuple[PretrainedConfig, ...]
    """Text configurations of all teachers that the run uses."""
    uncounted: str
    """The reason if memory and FLOPs of a teacher cannot be counted, else empty."""


def plan(options: argparse.Namespace) -> str:
    """The plan as it is printed. Raises UserError."""
    request = read_request(options)
    if request.uncounted:
        raise RunError(request.uncounted)
    workload, cluster, notes = request.workload, request.cluster, request.notes
    found, asked = compare(workload, cluster), configured_layout(workload, cluster, zero_stage(workload.settings))
    if not found:
        raise RunError(
            f"no layout divides a global batch of {workload.rows} rows over {options.gpus} GPUs: "
            "change train_batch_size or --gpus"
        )
    if options.json:
        return json.dumps(as_json(workload, cluster, found, asked, notes), indent=2, default=str) + "\n"
    return text(workload, cluster, found, asked, notes, found if options.all else select(found, asked))


def read_request(options: argparse.Namespace) -> PlanRequest:
    """Read the files that the options name. Raises UserError."""
    run = load_run(options.run, options.set)
    settings = read_settings(options.deepspeed_config, run.parallel.pipeline_stages, "cuda")
    if options.gpus < 1 or options.gpus_per_node < 1:
        raise RunError(f"--gpus is {options.gpus} and --gpus-per-node is {options.gpus_per_node}: both must be at least 1")
    datasets = _datasets(run.data)
    assumed = _assumptions(options, run.data, datasets)
    cluster = Cluster(gpu(options.gpu), options.gpus, options.gpus_per_node, assumed)
    notes = []
    if not datasets:
        notes.append(
            f"note: no data at {run.data.train[0].path} yet. Assumed: {assumed.teacher_tokens:.2f} teacher tokens per student "
            f"token, {assumed.unmapped:.1%} of student tokens unmapped."
        )
    rows, problem = _global_batch(settings, options.gpus, run.parallel)
    if problem:
        notes.append(f"warning: the run cannot start with its current files: {problem}")
    config = _student_config(run.student, options.student_config, datasets, run.data)
    teachers = tuple(_teacher_configs(run.teacher if run.guidance.needs_teacher else (), options.teacher_config))
    uncounted = next((why for teacher in teachers if (why := _uncounted(teacher, "teacher"))), "")
    specs = () if uncounted else tuple(_teacher_specs(run.teacher, teachers, run.data.row_length, datasets, assumed))
    front = _front(run.student.bos, run.student.pretrained, datasets, "student")
    tokens_per_row = run.data.row_length - SLACK - front
    tokens = options.tokens or run.training.tokens or (run.training.steps or 0) * rows * tokens_per_row
    workload = Workload(
        run.guidance,
        run.parallel,
        settings,
        StudentSpec(config, sizes(config), run.data.row_length),
        specs,
        run.teacher[0].placement if specs else None,
        rows,
        settings["train_micro_batch_size_per_gpu"],
        tokens_per_row,
        tokens,
        teacher_tokens=sum(data.totals.teacher_tokens for data in datasets) or tokens * assumed.teacher_tokens,
        sequences=tuple(_sequences(run, config)),
    )
    return PlanRequest(run, workload, cluster, datasets, notes, teachers, uncounted)


def _sequences(run: Run, config: PretrainedConfig) -> Iterator[int]:
    """See Workload.sequences. config: the student's."""
    for ranks in (2, 4, 8):
        if run.data.by_document or run.guidance.distance or run.data.row_length % ranks or ranks == run.parallel.sequence:
            continue
        with suppress(ModelError):
            check_ulysses(config, ranks, run.data.row_length)
            yield ranks


def _datasets(data: Data) -> list[AlignedDataset]:
    """All training datasets, or none if one of them does not exist yet.

    Raises RunError if a path is a file, and DatasetError if the held-out dataset has other tokenizers.
    """
    for field, path in data.paths():
        if path.is_file():
            raise RunError(
                f"{field}: {path} is a file, not a dataset. Build a dataset with: {tool('preprocess.build_dataset')} …"
            )
    paths = [source.path for source in data.train]
    datasets = [AlignedDataset.open(path) for path in paths] if all((path / DATASET).is_file() for path in paths) else []
    if datasets and data.valid is not None and (data.valid / DATASET).is_file():
        AlignedDataset.open(data.valid).require_tokenizers_of(datasets[0])
    return datasets


def _assumptions(options: argparse.Namespace, data: Data, datasets: Sequence[AlignedDataset]) -> Assumptions:
    """The assumed values. The command line overrides the datasets, and the datasets override the defaults."""
    known = {}
    if datasets:
        weights = [source.weight / sum(each.weight for each in data.train) for source in data.train]
        shares = list(zip(weights, (dataset.totals for dataset in datasets), strict=True))
        known["teacher_tokens"] = sum(weight * each.teacher_tokens / each.student_tokens for weight, each in shares)
        known["unmapped"] = sum(weight * each.span_widths[0] / each.student_tokens for weight, each in shares)
    given = {field.name: value for field in fields(Assumptions) if (value := getattr(options, field.name)) is not None}
    for name, value in given.items():
        most = 100 if name in ("teacher_tokens", "reread") else 1
        if not 0 < value <= most:
            raise RunError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0 and at most {most}")
    return replace(Assumptions(), **(known | given))


def _global_batch(settings: DeepSpeedConfig, gpus: int, parallel: Parallel) -> tuple[int, str]:
    """Rows of a global batch, and the reason if the run cannot start on this many GPUs."""
    try:
        return batch_layout(settings, gpus, parallel.pipeline_stages, parallel.sequence, "--gpus").rows, ""
    except RunError as error:
        if "train_batch_size" not in settings or "train_micro_batch_size_per_gpu" not in settings:
            raise
        return int(settings["train_batch_size"]), str(error)


def _student_config(student: Student, given: Path | None, datasets: Sequence[AlignedDataset], data: Data) -> PretrainedConfig:
    """datasets: all of `data`, or none if one of them does not exist yet."""
    if given is not None:
        config = given_config(given, "--student-config")
    elif student.config is not None:
        if not datasets and "vocab_size" not in student.config:
            train = next(source.path for source in data.train if not (source.path / DATASET).is_file())
            raise RunError(
                "student.config has no vocab_size, and it cannot be taken from the dataset: data.train does not exist yet: "
                f"{train}{missing_path_hint(train)}"
            )
        own = datasets[0].student_tokenizer if datasets else None
        return student_config(student.config, own.vocab_size if own else None, own.rows if own else None)
    else:
        assert student.pretrained is not None
        config = read_config(student.pretrained, "student")
    if why := _uncounted(config, "student"):
        raise RunError(why)
    return config


def _teacher_configs(teachers: Sequence[Teacher], given: Sequence[Path]) -> Iterator[PretrainedConfig]:
    """One text configuration per teacher. given: the paths of --teacher-config, which come before those of the run file."""
    for teacher, path in zip_longest(teachers, given[: len(teachers)]):
        if path is not None:
            yield given_config(path, "--teacher-config").get_text_config()
        elif teacher.path is not None:
            yield read_config(teacher.path, "teacher").get_text_config()
        else:
            raise RunError(
                "a cached teacher has no teacher.path, and the plan includes the cost of scoring: give its config.json with "
                "--teacher-config, once per teacher"
            )


def _teacher_specs(
    teachers: Sequence[Teacher],
    configs: Sequence[PretrainedConfig],
    row_length: int,
    datasets: Sequence[AlignedDataset],
    assumed: Assumptions,
) -> Iterator[TeacherSpec]:
    """row_length: student tokens per row."""
    for teacher, config in zip(teachers, configs, strict=False):
        front = _front(teacher.bos, teacher.path, datasets, "teacher")
        longest = math.ceil(row_length * assumed.teacher_tokens) + front
        dtype: torch.dtype = getattr(torch, teacher.dtype)
        yield TeacherSpec(
            config,
            sizes(config),
            dtype,
            quantized=teacher.quantization != "none",
            tokens_per_batch=teacher.tokens_per_batch,
            row_length=min(longest, config.max_position_embeddings),
        )


def _front(asked: Bos, model: Path | None, datasets: Sequence[AlignedDataset], side: Literal["student", "teacher"]) -> int:
    """Number of prefix tokens (BOS) per row. 1 if no tokenizer is available to find out."""
    if asked == "none":
        return 0
    if asked != "auto":
        return 1
    folders = [model.expanduser()] if model is not None and model.expanduser().is_dir() else []
    folders += [data.path / "tokenizers" / side for data in datasets[:1]]
    return next((len(found) for folder in folders if (found := front_ids(folder)) is not None), 1)


def _uncounted(config: PretrainedConfig, whose: str) -> str:
    """The reason if memory and FLOPs of a model cannot be counted, else empty."""
    if config.model_type in SUPPORTED:
        return ""
    return f"cannot plan a {whose} of type {config.model_type!r}. Supported types: {', '.join(SUPPORTED)}"
