"""What a run opens before its first step: data, models, engine, and where it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_vocagno.batch.blend import BlendedRows, Mixture
from megatron_vocagno.batch.loader import Batches, Layout
from megatron_vocagno.config import Run, Source
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.identity import not_compared
from megatron_vocagno.engine.agreement import together
from megatron_vocagno.engine.alike import facts_of_files, require_alike
from megatron_vocagno.engine.build import build_engine, check_precision
from megatron_vocagno.engine.cached import is_cached, training_rows
from megatron_vocagno.engine.checkpoint import Keeper
from megatron_vocagno.engine.distilling import open_distiller
from megatron_vocagno.engine.fronts import open_fronts, reading
from megatron_vocagno.engine.hearing import Hearing
from megatron_vocagno.engine.manifest import Position
from megatron_vocagno.engine.occupancy import Occupancy, check_output
from megatron_vocagno.engine.pins import from_the_hub
from megatron_vocagno.engine.placement import check_teacher, first_scorer, load_teacher, place_teacher
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.samples import open_samples
from megatron_vocagno.engine.settings import Settings, batch_layout, precision
from megatron_vocagno.engine.settings_file import notes
from megatron_vocagno.engine.stages import check_stages
from megatron_vocagno.engine.trainers import Engine
from megatron_vocagno.errors import RunError, UserError
from megatron_vocagno.evaluation import HeldOut
from megatron_vocagno.first_batch import Facts, FirstBatch, teacher_facts
from megatron_vocagno.model.attention import resolve_attention
from megatron_vocagno.model.configuration import check_row_length, student_config
from megatron_vocagno.model.folder import PretrainedWeights, parameters
from megatron_vocagno.model.teacher import teacher_folder
from megatron_vocagno.monitor import Monitor
from megatron_vocagno.step import Stepper
from megatron_vocagno.stopping import Stopper, reason


@dataclass(frozen=True)
class Opened:
    """A run that is ready for its next step. It holds the lock of its output folder."""

    paths: Sequence[Path]
    """Of the training datasets, as the run file names them."""
    rows: BlendedRows
    layout: Layout
    steps: int
    """The last one."""
    position: Position
    """After the newest whole checkpoint, or at the start."""
    engine: Engine
    stepper: Stepper
    first_batch: FirstBatch
    held_out: HeldOut
    keeper: Keeper
    occupancy: Occupancy
    monitor: Monitor


def open_run(run: Run, settings: Settings, processes: Processes, stopper: Stopper, quiet: bool) -> Opened | None:
    """Everything that a run needs, and its first words. Collective over the world. Raises UserError.

    None where the run was asked to leave while it waited for its output folder.
    """
    layout = batch_layout(settings, processes.world, run.parallel.pipeline_stages)
    datasets, valid, config, weights = together(lambda: _open(run, settings, processes), UserError)
    require_alike(together(lambda: facts_of_files(run, datasets, valid, config), UserError, OSError))
    occupancy = Occupancy(run.output)
    if not _take(occupancy, processes, stopper):
        return None
    data = datasets[0]  # for what they have in common
    teacher = load_teacher(run, data, processes)
    longest = teacher.max_positions if teacher else None
    fronts = together(lambda: open_fronts(run, data, config, teacher.vocab_size if teacher else None), UserError)
    read = list(reading(run, data, fronts))
    require_alike({"tokenizers": "; ".join(read)})
    mixture = Mixture([source.weight for source in run.data.train])
    rows = BlendedRows(together(lambda: training_rows(run, datasets, longest, fronts), UserError), mixture)
    samples = together(lambda: open_samples(run, datasets, valid, longest, fronts), UserError)
    steps = run.training.steps or math.ceil((run.training.tokens or 0) / (layout.rows * rows.tokens_per_row))

    monitor = Monitor(run.output if processes.is_first else None, run.logging.every, steps, quiet)
    distiller = open_distiller(teacher, run, data, config.vocab_size, processes.device)
    engine = build_engine(run, settings, config, weights, layout, steps, processes, distiller)
    scorer = place_teacher(teacher, run, engine, processes)
    once = first_scorer(teacher, run, engine, processes)
    hearing = Hearing(data.student_byte_lengths, data.teacher_byte_lengths, engine.speaks, processes.device)
    stepper = Stepper(Batches(rows, layout, engine.data_rank), scorer, hearing, engine, run.guidance, processes, once)
    student = Facts(data.student_tokenizer.vocab_size, parameters(config), trained=weights is not None)
    first_batch = FirstBatch(student, teacher_facts(run, data, teacher.parameters_count if teacher else None))
    held_out = HeldOut(engine, run, valid, samples, scorer, processes, stopper, fronts[0])
    fingerprint = mixture.fingerprint([ds.fingerprint for ds in datasets])
    keeper = Keeper(engine, run, config, settings, fingerprint, data.student_tokenizer.path, fronts[0])
    position = keeper.resume(monitor.say)
    if samples is not None:
        samples.begin(position.step, monitor.say)
    lines = [_opening(run, layout, steps, position), *notes(settings), *run.guidance.notes(), *run.training.schedule.notes(steps)]
    lines += _not_compared(run, data)
    for line in (*lines, *read, *from_the_hub(run), *_sources(datasets, rows, layout)):
        monitor.say(line)
    paths = [source.path for source in run.data.train]
    return Opened(paths, rows, layout, steps, position, engine, stepper, first_batch, held_out, keeper, occupancy, monitor)


def _take(occupancy: Occupancy, processes: Processes, stopper: Stopper) -> bool:
    """Whether the output folder is this run's now: before the minutes in which a teacher is read."""

    def say(text: str) -> None:
        if processes.is_first:
            print(text, flush=True)

    if asked := occupancy.take(say, lambda: stopper.asked):
        say(f"stopped while it waited for {occupancy.output}: {reason(asked)}; nothing was begun")
    return not asked


def _open(
    run: Run, settings: Settings, processes: Processes
) -> tuple[list[AlignedDataset], AlignedDataset | None, PretrainedConfig, PretrainedWeights | None]:
    """Training data, validation data and the student's files; nothing here waits for another rank.

    What can be refused is refused here, before the minutes in which a teacher is read.
    """
    check_precision(settings, processes.device)
    datasets = open_data(run.data.train)
    check_teacher(run, datasets[0])
    valid = _open_valid(run, datasets[0])
    config, weights = _open_student(run, datasets[0], settings, processes)
    check_output(run.output)
    return datasets, valid, config, weights


def open_data(sources: Sequence[Source]) -> list[AlignedDataset]:
    """The datasets of a blend. Raises DatasetError, or RunError for one that is named twice."""
    datasets = [AlignedDataset.open(source.path) for source in sources]
    for i, data in enumerate(datasets):
        data.require_tokenizers_of(datasets[0])
        for other in datasets[:i]:
            if data.fingerprint == other.fingerprint:
                raise RunError(f"{data.path} and {other.path} in data.train are one dataset: name it once, with both weights")
    return datasets


def _open_valid(run: Run, data: AlignedDataset) -> AlignedDataset | None:
    if run.data.valid is None:
        return None
    valid = AlignedDataset.open(run.data.valid)
    valid.require_tokenizers_of(data)
    return valid


def _open_student(
    run: Run, data: AlignedDataset, settings: Settings, processes: Processes
) -> tuple[PretrainedConfig, PretrainedWeights | None]:
    weights = PretrainedWeights(run.student.pretrained) if run.student.pretrained is not None else None
    source = weights.folder if weights is not None else run.student.config
    assert source is not None
    config = student_config(source, data.student_tokenizer.vocab_size, data.student_tokenizer.rows)
    if weights is not None:
        data.require_tokenizer("student", weights.folder)
    check_row_length(config, run.data.row_length)
    check_stages(run.parallel, config.num_hidden_layers)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision(settings)]
    config._attn_implementation = resolve_attention(config, run.student.attention, dtype, processes.device)
    return config, weights


def _not_compared(run: Run, data: AlignedDataset) -> Iterator[str]:
    """A line for each model that has no tokenizer of its own: whether the data suit it was not checked."""
    in_memory = run.guidance.needs_teacher and not is_cached(run)
    for side, path in (("student", run.student.pretrained), ("teacher", run.teacher[0].path if in_memory else None)):
        if path is not None and (note := not_compared(data.path, side, teacher_folder(path))) is not None:
            yield f"note: {note}"


def _opening(run: Run, layout: Layout, steps: int, position: Position) -> str:
    start_or_resume = f"resuming after step {position.step}" if position.step else "starting"
    return (
        f"{start_or_resume}: {run.guidance.objective}, {steps} steps of {layout.rows} rows of {run.data.row_length} tokens "
        f"({layout.data_parallel} data-parallel x {max(1, run.parallel.pipeline_stages)} stages, "
        f"{layout.micro_batches} micro-batches)"
    )


def _sources(datasets: Sequence[AlignedDataset], rows: BlendedRows, layout: Layout) -> Iterator[str]:
    """A line for each dataset: its share of the rows."""
    for data, part, share in zip(datasets, rows.parts, rows.mixture.shares, strict=True):
        epoch = f"{len(data)} documents make {part.rows_in_epoch} rows an epoch"
        yield f"{float(100 * share):.3g} % of the rows from {data.path}: {epoch}"
        if part.rows_in_epoch < layout.rows * share:
            yield f"note: a step reads {float(layout.rows * share):.0f} of its rows: every step repeats its text"
