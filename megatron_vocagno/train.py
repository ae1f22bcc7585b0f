"""The training loop: score, select, learn.

deepspeed examples/pretrain_vocagno.py RUN.toml --deepspeed_config ds_configs/X.json [--set a.b=c]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_vocagno.batch.blend import BlendedRows, Mixture
from megatron_vocagno.batch.loader import Batches, Layout
from megatron_vocagno.config import Run, RunError, SharedError, Source
from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.agreement import largest, together
from megatron_vocagno.engine.build import build_engine, check_precision
from megatron_vocagno.engine.cached import training_rows
from megatron_vocagno.engine.checkpoint import Keeper
from megatron_vocagno.engine.distilling import open_distiller
from megatron_vocagno.engine.manifest import Position
from megatron_vocagno.engine.occupancy import Occupancy, make_output
from megatron_vocagno.engine.pins import from_the_hub, pin_models
from megatron_vocagno.engine.placement import check_tokenizer, load_teacher, place_teacher
from megatron_vocagno.engine.processes import Processes, start, stop
from megatron_vocagno.engine.samples import open_samples
from megatron_vocagno.engine.settings import Settings, batch_layout, precision, read_settings
from megatron_vocagno.engine.stages import check_stages
from megatron_vocagno.engine.trainers import Engine
from megatron_vocagno.evaluation import HeldOut
from megatron_vocagno.health import NonFiniteGuard, documents_of
from megatron_vocagno.model.attention import resolve_attention
from megatron_vocagno.model.folder import ModelError, PretrainedWeights
from megatron_vocagno.model.student import check_row_length, student_config
from megatron_vocagno.monitor import BROKEN_STEPS_FILE, Monitor
from megatron_vocagno.step import Stepper
from megatron_vocagno.stopping import Stopper

USER_ERRORS = (RunError, CorpusError, ModelError)
"""What a user can mend; everything else is a fault of ours or of a machine."""


def start_training(run: Run, settings_path: Path, stopper: Stopper, quiet: bool = False) -> None:
    """Join the other processes, train, and leave together. quiet: see Monitor. Raises USER_ERRORS."""
    processes = start()
    settings = read_settings(settings_path, run.parallel.pipeline_stages, processes.device.type)
    try:
        run = pin_models(run)
        train(run, settings, processes, stopper, quiet)
    except SharedError as error:
        # here alone: what looks for a model knows its path, and not which field has it
        raise type(error)(with_fields(run, str(error))) from error
    stop()


def with_fields(run: Run, message: str) -> str:
    """The message, after the fields that name the model or the dataset which it says is missing."""
    # of several teachers, all cached, none is read
    models = {"student.pretrained": run.student.pretrained, "teacher.path": run.teacher[0].path if run.teacher else None}
    names = {field: path.expanduser() for field, path in models.items() if path}
    fields = [field for field, name in names.items() if message.startswith((f"no model at {name}: ", f"no weights in {name}: "))]
    datasets = [("data.train", source.path) for source in run.data.train] + [("data.valid", run.data.valid)]
    fields += [field for field, path in datasets if message.startswith(f"{path} is not a dataset: ")]
    return f"{' and '.join(fields)}: {message}" if fields else message


def train(run: Run, settings: Settings, processes: Processes, stopper: Stopper, quiet: bool = False) -> None:
    """Train a run to its last step, from its newest whole checkpoint where it has one. Collective over the world.

    Where any rank's `stopper` asks it to, the run saves after the step that it is in, and returns.
    """
    layout = batch_layout(settings, processes.world, run.parallel.pipeline_stages)
    datasets, valid, config, weights = together(lambda: _open(run, settings, processes), *USER_ERRORS)
    data, paths = datasets[0], [source.path for source in run.data.train]  # data: for what they have in common
    teacher = load_teacher(run, data, processes)
    longest = teacher.max_positions if teacher else None
    mixture = Mixture([source.weight for source in run.data.train])
    rows = BlendedRows(together(lambda: training_rows(run, datasets, longest), *USER_ERRORS), mixture)
    samples = together(lambda: open_samples(run, datasets, valid, longest), *USER_ERRORS)
    steps = run.training.steps or math.ceil((run.training.tokens or 0) / (layout.rows * rows.tokens_per_row))

    monitor = Monitor(run.output if processes.is_first else None, run.logging.every, steps, quiet)
    distiller = open_distiller(teacher, run, data, processes.device)
    engine = build_engine(run, settings, config, weights, layout, steps, processes, distiller)
    scorer = place_teacher(teacher, run, engine, processes)
    stepper = Stepper(Batches(rows, layout, engine.data_rank), scorer, engine, run.guidance, processes)
    fingerprint = mixture.fingerprint([ds.fingerprint for ds in datasets])
    keeper = Keeper(engine, run, config, settings, fingerprint, data.student_tokenizer.path)
    occupancy = Occupancy(run.output)
    occupancy.take(monitor.say)
    position = keeper.resume(monitor.say)
    if samples is not None:
        samples.begin(position.step, monitor.say)
    held_out = HeldOut(engine, run, valid, samples, scorer, processes, stopper)
    guard = NonFiniteGuard(run.training.max_nonfinite_steps, engine.skipped_steps)
    lines = [_opening(run, layout, steps, position), *run.guidance.notes(), *run.training.schedule.notes(steps)]
    for line in (*lines, *from_the_hub(run), *_sources(datasets, rows, layout)):
        monitor.say(line)
    saved, due = position.step, False
    with closing(occupancy), monitor.writing(position.step):
        if position.step == 0:
            held_out.tell(0, monitor)
        while not (asked := largest(stopper.asked, processes.device)) and position.step < steps:
            before, position = position, position.after(layout.rows)
            numbers = stepper.step(before.rows)
            numbers |= {f"data/epochs/{path}": n for path, n in zip(paths, rows.epochs(position.rows), strict=True)}
            monitor.step(position.step, numbers)
            if broken := guard.check(position.step, numbers):
                documents = documents_of(rows, range(before.rows, position.rows))
                monitor.broken_step(broken, dict(zip(map(str, paths), documents, strict=True)))
                guard.stop_at_limit(broken, run.output / BROKEN_STEPS_FILE)
            if _due(position.step, run.eval.every, steps):
                held_out.tell(position.step, monitor)
            due = due or _due(position.step, run.checkpoint.every, steps)
            # after a broken step it waits for a healthy one: checkpoints of a run that goes wrong would push out the good ones
            if due and broken is None:
                monitor.say(f"checkpoint: {keeper.save(position)}")
                saved, due = position.step, False
        if saved < position.step:
            save_last(engine, keeper, position, saved, monitor)
        monitor.leave(position.step, asked if position.step < steps else 0)


def save_last(engine: Engine, keeper: Keeper, position: Position, saved: int, monitor: Monitor) -> None:
    """A checkpoint of where the run ends, though its last step may not have been finite. Collective over the world.

    Raises SharedError: the weights are not finite.
    """
    if not engine.has_finite_weights():
        raise SharedError(
            f"after step {position.step} the student's weights are not finite, and no checkpoint was written of them; "
            f"the newest is of step {saved}. Likely causes: a learning rate too high, or broken weights at the start."
        )
    monitor.say(f"checkpoint: {keeper.save(position)}")


def _due(step: int, every: int | None, steps: int) -> bool:
    return step == steps or (every is not None and step % every == 0)


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


def _open(
    run: Run, settings: Settings, processes: Processes
) -> tuple[list[AlignedDataset], AlignedDataset | None, PretrainedConfig, PretrainedWeights | None]:
    """Training data, validation data and the student's files; nothing here waits for another rank.

    What can be refused is refused here, before the minutes in which a teacher is read.
    """
    check_precision(settings, processes.device)
    datasets = open_data(run.data.train)
    valid = _open_valid(run, datasets[0])
    config, weights = _open_student(run, datasets[0], settings, processes)
    make_output(run.output)
    return datasets, valid, config, weights


def open_data(sources: Sequence[Source]) -> list[AlignedDataset]:
    """The datasets of a blend. Raises TokenizerMismatch, or RunError for one that is named twice."""
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
    vocabulary = data.student_tokenizer.vocab_size
    weights = PretrainedWeights(run.student.pretrained) if run.student.pretrained is not None else None
    source = weights.folder if weights is not None else run.student.config
    assert source is not None
    config = student_config(source, vocabulary)
    if weights is not None:
        check_tokenizer(data, "student", weights.folder)
    check_row_length(config, run.data.row_length)
    check_stages(run.parallel, config.num_hidden_layers)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision(settings)]
    config._attn_implementation = resolve_attention(config, run.student.attention, dtype, processes.device)
    return config, weights
