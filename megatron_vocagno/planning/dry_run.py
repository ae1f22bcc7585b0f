"""Check a run before there is data, weights or a GPU: `pretrain_vocagno.py … --dry-run --gpus 32`.

Reads the run file, the DeepSpeed configuration and the config.json of both models, runs one micro-batch through both models on
the meta device, and plans the run as its files describe it. Downloads nothing and starts no process group.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_vocagno import hub
from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.config import Guidance, Parallel, Run, Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import DATASET
from megatron_vocagno.engine.cached import check_cached
from megatron_vocagno.engine.distilling import check_vocabularies
from megatron_vocagno.engine.settings import DeepSpeedConfig, batch_layout, precision, zero_stage
from megatron_vocagno.engine.settings_file import check_sections
from megatron_vocagno.engine.settings_file import notes as settings_notes
from megatron_vocagno.errors import RunError, missing_path_hint, nearest
from megatron_vocagno.model.configuration import check_row_length, student_config
from megatron_vocagno.model.folder import cached_snapshot, on_this_machine
from megatron_vocagno.model.gguf import naming_file, place_of_conversion
from megatron_vocagno.model.ulysses import check_ulysses
from megatron_vocagno.planning.comparison import Workload, configured_layout
from megatron_vocagno.planning.layouts import stages
from megatron_vocagno.planning.report import table, text
from megatron_vocagno.planning.request import PlanRequest, read_request
from megatron_vocagno.planning.shapes import ForwardShapes, forward_shapes
from megatron_vocagno.planning.sizes import Sizes


def dry_run(options: argparse.Namespace) -> tuple[str, int]:
    """Returns the report (resolved run, shapes, plan) and the exit code: 2 if the run does not fit into memory.

    options: of `planning.options.add_plan_options`. Raises UserError for anything else that would stop the run and can be known
    without data, weights or a GPU.
    """
    request = read_request(options)
    run, workload = request.run, request.workload
    check_sections(options.deepspeed_config, workload.settings)
    layout = batch_layout(workload.settings, options.gpus, run.parallel.pipeline_stages, run.parallel.sequence, "--gpus")
    compared = _check_models(request)
    resolved = [*_resolved(run, workload, layout), *_stages(run.parallel, workload.student.sizes)]
    parts = ["\n".join(resolved), _shapes(workload)]
    notes = [*request.notes, *compared, *_notes(request)]
    last, code = [*_misspelled(run), *_unread_tokens(request)], 0
    conclusion = f"The dry run found no errors{', but see the warning above' if last else ''}."
    if request.uncounted:
        parts += [f"note: no plan: {request.uncounted}", *notes]
    else:
        asked = configured_layout(workload, request.cluster, zero_stage(workload.settings))
        assert asked is not None  # batch_layout has succeeded
        parts.append(text(workload, request.cluster, [asked], asked, notes, [asked]).rstrip())
        if not asked.fits:
            conclusion, code = "The dry run found an error: the run does not fit into memory, see above.", 2
    return "\n\n".join([*parts, *last, conclusion]) + "\n", code


def _check_models(request: PlanRequest) -> list[str]:
    """Raises UserError if models, row length, tokenizers and cached losses do not fit together.

    Returns a note for each model whose tokenizer could not be compared with that of a dataset.
    """
    run, config = request.run, request.workload.student.config
    check_row_length(config, run.data.row_length)
    if run.parallel.sequence > 1:
        check_ulysses(config, run.parallel.sequence, run.data.row_length)
    if run.student.config is not None:
        student_config(run.student.config, config.vocab_size)
    sides = [("student", config.vocab_size)] + [("teacher", teacher.vocab_size) for teacher in request.teachers[:1]]
    for data in request.datasets:
        for side, rows in sides:
            tokens = (data.student_tokenizer if side == "student" else data.teacher_tokenizer).rows
            if rows < tokens:
                raise RunError(
                    f"{data.path}: the {side} tokenizer has {tokens:,} tokens, but the {side} has a vocab_size of {rows:,}. "
                    f"Was the dataset aligned for another {side}?"
                )
        check_vocabularies(run.guidance, data)
    check_cached(run.cached_teachers, request.datasets)
    compared = [_compare(data, field, path) for data in request.datasets for field, path in run.weights.items()]
    return [f"note: {note}" for note in compared if note]


def _compare(data: AlignedDataset, field: str, model: Path) -> str | None:
    """See AlignedDataset.require_tokenizer. field: of the run file, which names the model"""
    folder = _tokenizer_folder(model)
    if folder is None:
        return None
    with naming_file(model):
        return data.require_tokenizer("student" if field.startswith("student") else "teacher", folder)


def _tokenizer_folder(model: Path) -> Path | None:
    """The folder of a model on this machine; None if it is elsewhere, or a GGUF file that has not been converted yet."""
    folder = on_this_machine(model)
    if folder is not None and folder.suffix == ".gguf" and folder.is_file():
        folder = place_of_conversion(folder)
    return folder if folder is not None and folder.is_dir() else None


def _objective(guidance: Guidance) -> str:
    """The objective in a few words."""
    if not guidance.selects:
        return guidance.objective
    compared = guidance.aggregate if guidance.unit == "token" else guidance.unit
    weights = {
        "top_k": f"keep {guidance.keep:g} per {guidance.scope}",
        "threshold": f"threshold {guidance.threshold:g}",
        "control_variate": f"control variate of strength {guidance.strength:g} and clip {guidance.clip:g}",
    }[guidance.weighting]
    shown = f"{guidance.objective} ({compared})" if guidance.objective == "guided" else guidance.objective
    return f"{shown}, {weights}, unmapped tokens: {guidance.unmapped}"


def _resolved(run: Run, workload: Workload, layout: Layout) -> Iterator[str]:
    """A summary of the run."""
    guidance, schedule = run.guidance, run.training.schedule
    yield f"objective: {_objective(guidance)}"
    yield f"output: {run.output}"
    for source in run.data.train:
        hint = ", does not exist" if nearest(source.path) else f", does not exist yet{missing_path_hint(source.path)}"
        yield f"data: {source.path}{'' if (source.path / DATASET).is_file() else hint}"
    yield f"student: {_location(run.student.pretrained) if run.student.pretrained else 'from scratch'}"
    for teacher in run.teacher if guidance.needs_teacher else ():
        yield f"teacher: {_teacher(teacher)}"
    count = run.parallel.pipeline_stages
    yield (
        f"step: {layout.rows:,} rows of up to {run.data.row_length:,} tokens "
        f"(about {layout.rows * workload.tokens_per_row:,} of text): {layout.micro_batch_rows} rows x "
        f"{layout.micro_batches} micro-batches x {layout.data_parallel} data-parallel ranks"
        f"{f' x {count} stages' if count else ''}"
        f"{f' x {layout.sequence} ranks per row' if layout.sequence > 1 else ''}, ZeRO-{zero_stage(workload.settings)}"
    )
    yield (
        f"training: {workload.steps:,} steps, {_optimizer(workload.settings)}, {schedule.kind} to "
        f"{schedule.min_lr_ratio:g} of it after {schedule.warmup_steps:,} steps of warm-up, "
        f"{precision(workload.settings)}, seed {run.training.seed}"
    )


def _teacher(teacher: Teacher) -> str:
    if teacher.placement == "cached":
        return f"only its cached losses{f', of {hub.short_name(teacher.path)}' if teacher.path else ''}"
    return f"{_location(teacher.path)}, {teacher.dtype}, {teacher.placement}"


def _optimizer(settings: DeepSpeedConfig) -> str:
    optimizer = settings["optimizer"]
    return f"{optimizer['type']}, learning rate {optimizer.get('params', {}).get('lr', 'at its default')}"


def _notes(request: PlanRequest) -> Iterator[str]:
    """Likely mistakes that cannot be proven without data."""
    run, steps = request.run, request.workload.steps
    if run.student.pretrained:
        yield from _absent("student.pretrained", run.student.pretrained)
    for teacher in run.teacher if run.guidance.needs_teacher else ():
        if teacher.placement != "cached" and teacher.path:
            yield from _absent("teacher.path", teacher.path)
    yield from settings_notes(request.workload.settings)
    yield from run.notes()
    yield from run.training.schedule.notes(steps)
    # with data, _check_models compares the tokenizers. A student from scratch may take its vocabulary from the data.
    known = run.student.config is None or "vocab_size" in run.student.config
    if run.guidance.distance == "kld" and known and not request.datasets:
        yield from _other_vocabularies(request.workload.student.config.vocab_size, request.teachers)


def _other_vocabularies(student: int, teachers: Sequence[PretrainedConfig]) -> Iterator[str]:
    for teacher in teachers:
        if teacher.vocab_size != student:
            yield (
                "note: guidance.objective = 'kld' needs the same tokenizer for both models, but their vocab_size differ: "
                f"{student:,} for the student, {teacher.vocab_size:,} for the teacher. "
                "The run starts only if the difference is padding."
            )


def _absent(field: str, path: Path) -> Iterator[str]:
    """A note for a model that is neither on disk nor in the Hub cache."""
    if hub.is_id(path):
        if not cached_snapshot(path):
            yield f"note: {field}: {path} is neither on disk nor in the Hub cache. {hub.why_id(path)}{nearest(path)}"
    elif not path.expanduser().exists():
        yield f"note: {field}: {path} does not exist. {hub.why_path(path)}{missing_path_hint(path)}"


def _location(path: Path | None) -> str:
    assert path is not None, "the run file requires a path unless a teacher is cached"
    if not hub.is_id(path):
        return f"{path}{'' if path.expanduser().exists() else ', does not exist yet'}"
    return f"{path}, in the Hub cache" if cached_snapshot(path) else f"{path}, to be downloaded from the Hub"


def _stages(parallel: Parallel, sizes: Sizes) -> Iterator[str]:
    """One line per pipeline stage. Raises RunError if the partition does not match the model."""
    count = parallel.pipeline_stages
    if not count:
        return
    if count > sizes.layers:
        raise RunError(f"parallel.pipeline_stages is {count}, but the student has {sizes.layers} decoder layers")
    for i, stage in enumerate(stages(sizes, count, parallel.partition)):
        layers = ["embedding"] * stage.embedding + [f"{stage.decoders} decoder layers"] + ["norm, head"] * stage.head
        yield f"stage {i}: {', '.join(layers)}; {stage.parameters(sizes) / 1e6:,.0f} M parameters"


def _shapes(workload: Workload) -> str:
    """A table of the shapes of one micro-batch in the student, and of one forward pass of each teacher."""
    student = workload.student
    dtype = torch.float32 if precision(workload.settings) == "fp32" else torch.bfloat16
    positions = student.row_length // workload.parallel.sequence
    found = [("student", forward_shapes(student.config, workload.micro_batch_rows, positions, dtype))]
    for teacher in workload.teachers:
        shapes = forward_shapes(teacher.config, teacher.rows_per_batch, teacher.row_length, teacher.dtype)
        found.append(("teacher", shapes))
    header = ["on the meta device", "ids", "hidden", "head", "loss"]
    return table(header, [[name, *_cells(shapes)] for name, shapes in found], left=1)


def _cells(shapes: ForwardShapes) -> list[str]:
    return [str(list(shape)) for shape in (shapes.ids, shapes.hidden, shapes.head, shapes.loss)]


def _misspelled(run: Run) -> Iterator[str]:
    """A warning for each dataset that does not exist if a path with a similar name does."""
    for field, path in run.data.paths():
        if near := nearest(path):
            yield f"warning: {field} does not exist: {path}.{near}"


def _unread_tokens(request: PlanRequest) -> Iterator[str]:
    """A warning for each teacher whose rows are expected to be longer than it can read."""
    expected = math.ceil(request.run.data.row_length * request.cluster.assumed.teacher_tokens)
    for teacher in request.teachers:
        longest = getattr(teacher, "max_position_embeddings", None)
        if longest is not None and expected > longest and request.run.teacher[0].placement != "cached":
            yield (
                f"warning: rows have about {expected:,} teacher tokens, but the teacher reads at most {longest:,}. Tokens beyond "
                "that are unmapped. Use shorter rows or cached losses."
            )
