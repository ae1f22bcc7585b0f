"""A run, checked before there is data, weights or a GPU: `pretrain_vocagno.py … --dry-run --gpus 32`.

It reads the run file, the DeepSpeed configuration and the two models' config.json; takes one micro-batch through both models on
the meta device; and plans the run as its files have it. Nothing is downloaded, and no process group is started.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_vocagno import hub
from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.config import Run, Teacher
from megatron_vocagno.corpus.manifest import DATASET
from megatron_vocagno.engine.cached import check_cached
from megatron_vocagno.engine.distilling import check_vocabularies
from megatron_vocagno.engine.settings import batch_layout, precision, zero_stage
from megatron_vocagno.engine.settings_file import check_sections, notes
from megatron_vocagno.errors import RunError, looked_for, nearest
from megatron_vocagno.model.configuration import check_row_length, student_config
from megatron_vocagno.model.folder import cached_snapshot
from megatron_vocagno.planning.comparison import Task, as_asked
from megatron_vocagno.planning.layouts import stages
from megatron_vocagno.planning.question import Question, ask
from megatron_vocagno.planning.report import table, text
from megatron_vocagno.planning.shapes import Passage, passage


def dry_run(options: argparse.Namespace) -> tuple[str, int]:
    """What the run resolves to, what passes through its models, its plan; and the exit code, 2 where it does not fit into memory.

    options: of `plan.add_question`. Raises UserError: what else would stop the run, as far as it can be known.
    """
    question = ask(options)
    task = question.task
    check_sections(options.deepspeed_config, task.settings)
    layout = batch_layout(task.settings, options.gpus, task.run.parallel.pipeline_stages)
    _check_models(question)
    parts = ["\n".join([*_resolved(question, layout), *_stages(task)]), _passages(task)]
    notes = [*question.notes, *_notes(question)]
    last, code = list(_longer_rows(question)), 0
    if question.uncounted:
        parts += [f"note: no plan: {question.uncounted}", *notes]
    else:
        asked = as_asked(task, question.cluster, zero_stage(task.settings))
        assert asked is not None  # the batch can be dealt
        parts.append(text(task, question.cluster, [asked], asked, notes).rstrip())
        if not asked.fits:
            last, code = [*last, "The dry run has found a fault: the run does not fit into memory, see above."], 2
    return "\n\n".join([*parts, *(last or ["The dry run has found no fault."])]) + "\n", code


def _check_models(question: Question) -> None:
    """Raises UserError: models, rows, vocabularies and cached losses that do not fit together."""
    task, config = question.task, question.task.student.config
    check_row_length(config, task.run.data.row_length)
    if task.run.student.config is not None:
        student_config(task.run.student.config, config.vocab_size)
    sides = [("student", config.vocab_size)] + [("teacher", teacher.vocab_size) for teacher in question.teachers[:1]]
    for data in question.datasets:
        for side, rows in sides:
            tokens = (data.student_tokenizer if side == "student" else data.teacher_tokenizer).rows
            if rows < tokens:
                raise RunError(
                    f"{data.path}: its {side} tokenizer has {tokens:,} tokens, the {side} has {rows:,}: "
                    "the dataset was aligned for another one"
                )
        check_vocabularies(task.run, data)
    check_cached(task.run, question.datasets)


def _resolved(question: Question, layout: Layout) -> Iterator[str]:
    """The run in short."""
    task, run = question.task, question.task.run
    guidance, parallel, schedule = run.guidance, run.parallel, run.training.schedule
    how = f", keep {guidance.keep:g} of a {guidance.scope}, unmapped tokens: {guidance.unmapped}" if guidance.selects else ""
    yield f"objective: {guidance.objective}" + (f" ({guidance.aggregate})" if guidance.objective == "guided" else "") + how
    yield f"output: {run.output}"
    for source in run.data.train:
        there = (source.path / DATASET).is_file()
        yield f"data: {source.path}{'' if there else f', not there yet{looked_for(source.path)}'}"
    yield f"student: {_whereabouts(run.student.pretrained) if run.student.pretrained else 'from nothing'}"
    for teacher in _read_teachers(run):
        if teacher.placement == "cached":
            yield f"teacher: its cached losses alone{f', of {hub.short_name(teacher.path)}' if teacher.path else ''}"
        else:
            yield f"teacher: {_whereabouts(teacher.path)}, {teacher.dtype}, {teacher.placement}"
    tokens = layout.rows * run.data.row_length
    stages = f" x {parallel.pipeline_stages} stages" if parallel.pipeline_stages else ""
    yield (
        f"step: {layout.rows:,} rows of {run.data.row_length:,} = {tokens:,} tokens: {layout.micro_batch_rows} rows x "
        f"{layout.micro_batches} micro-batches x {layout.data_parallel} data-parallel ranks{stages}, "
        f"ZeRO-{zero_stage(task.settings)}"
    )
    optimizer = task.settings["optimizer"]
    peak = optimizer.get("params", {}).get("lr", "its default")
    yield (
        f"training: {task.steps:,} steps, {optimizer['type']}, learning rate {peak}, {schedule.kind} to {schedule.final:g} of it "
        f"after {schedule.warmup_steps:,} steps of warm-up, {precision(task.settings)}, seed {run.training.seed}"
    )


def _notes(question: Question) -> Iterator[str]:
    """What is no fault as far as can be known here, and may be one."""
    task, run = question.task, question.task.run
    if run.student.pretrained:
        yield from _absent("student.pretrained", run.student.pretrained)
    for teacher in _read_teachers(run):
        if teacher.placement != "cached" and teacher.path:
            yield from _absent("teacher.path", teacher.path)
    yield from notes(task.settings)
    yield from run.guidance.notes()
    yield from run.training.schedule.notes(task.steps)
    student = task.student.config.vocab_size
    # the data would say more, see _check_models; a student from nothing takes its vocabulary from there
    known = run.student.config is None or "vocab_size" in run.student.config
    if run.guidance.distance == "kld" and known and not question.datasets:
        for teacher in (each.vocab_size for each in question.teachers):
            if teacher != student:
                yield (
                    "note: guidance.objective = 'kld' needs one tokenizer for both models. Their vocab_size differ, "
                    f"the student has {student:,} and the teacher {teacher:,}: the run starts only where that is padding alone."
                )


def _absent(field: str, path: Path) -> Iterator[str]:
    """Why a model that is not on this machine is looked for where it is looked for."""
    if hub.is_id(path):
        if not cached_snapshot(path):
            yield f"note: {field}: nothing at {path} here, nor in the Hub's cache. {hub.taken_for_id(path)}{nearest(path)}"
    elif not path.expanduser().exists():
        yield f"note: {field}: nothing at {path} here. {hub.taken_for_path(path)}{looked_for(path)}"


def _read_teachers(run: Run) -> tuple[Teacher, ...]:
    return run.teacher if run.guidance.needs_teacher else ()


def _whereabouts(path: Path | None) -> str:
    assert path is not None, "the configuration lets none but cached teachers through without"
    if not hub.is_id(path):
        return f"{path}{'' if path.expanduser().exists() else ', not there yet'}"
    return f"{path}, in the Hub's cache" if cached_snapshot(path) else f"{path}, to be downloaded from the Hub"


def _stages(task: Task) -> Iterator[str]:
    """A line for each stage of a pipeline. Raises RunError: a partition that is not this model's."""
    parallel = task.run.parallel
    if not parallel.pipeline_stages:
        return
    if parallel.pipeline_stages > task.student.sizes.layers:
        raise RunError(
            f"parallel.pipeline_stages is {parallel.pipeline_stages}, the student has {task.student.sizes.layers} decoder layers"
        )
    for i, stage in enumerate(stages(task.student.sizes, parallel.pipeline_stages, parallel.partition)):
        ends = ["embedding"] * stage.embedding + [f"{stage.decoders} decoder layers"] + ["norm, head"] * stage.head
        yield f"stage {i}: {', '.join(ends)}; {stage.parameters(task.student.sizes) / 1e6:,.0f} M parameters"


def _passages(task: Task) -> str:
    """Shapes of one micro-batch in the student, and of one forward of each teacher."""
    width = torch.float32 if precision(task.settings) == "fp32" else torch.bfloat16
    found = [("student", passage(task.student.config, task.micro_batch_rows, task.student.row, width))]
    for teacher in task.teachers:
        rows = max(1, teacher.tokens_per_batch // teacher.row)
        found.append(("teacher", passage(teacher.config, rows, teacher.row, teacher.dtype)))
    header = ["on the meta device", "ids", "hidden", "head", "loss"]
    return table(header, [[name, *_shapes(shapes)] for name, shapes in found], left=1)


def _shapes(shapes: Passage) -> list[str]:
    return [str(list(shape)) for shape in (shapes.ids, shapes.hidden, shapes.head, shapes.loss)]


def _longer_rows(question: Question) -> Iterator[str]:
    """What of a row a teacher cannot read, as it is expected."""
    run = question.task.run
    expected = math.ceil(run.data.row_length * question.cluster.assumed.teacher_tokens)
    for teacher in question.teachers:
        longest = getattr(teacher, "max_position_embeddings", None)
        if longest is not None and expected > longest and run.teacher[0].placement != "cached":
            yield (
                f"warning: rows have about {expected:,} teacher tokens, the teacher reads {longest:,}: tokens beyond them are "
                "unmapped. Use shorter rows, or cached losses."
            )
