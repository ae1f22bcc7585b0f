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
from megatron_vocagno.engine.build import build_engine, check_precision
from megatron_vocagno.engine.cached import is_cached, training_rows
from megatron_vocagno.engine.checkpoint import CheckpointManager
from megatron_vocagno.engine.collectives import run_on_all_ranks
from megatron_vocagno.engine.distilling import open_distiller
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.manifest import Position
from megatron_vocagno.engine.pipeline import check_stages
from megatron_vocagno.engine.placement import check_teacher, load_teacher, make_first_scorer, make_scorer
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.engine.settings import DeepSpeedConfig, batch_layout, precision
from megatron_vocagno.engine.settings_file import notes
from megatron_vocagno.engine.text_losses import TextLossMeter
from megatron_vocagno.errors import RunError, UserError
from megatron_vocagno.model.attention import resolve_attention
from megatron_vocagno.model.configuration import check_row_length, student_config
from megatron_vocagno.model.folder import PretrainedWeights, parameters
from megatron_vocagno.model.teacher import teacher_folder
from megatron_vocagno.training.consistency import facts_of_files, require_same_on_all_ranks
from megatron_vocagno.training.evaluation import Evaluator
from megatron_vocagno.training.first_batch import Facts, FirstBatch, teacher_facts
from megatron_vocagno.training.fronts import open_fronts, reading
from megatron_vocagno.training.monitor import Monitor
from megatron_vocagno.training.pins import from_the_hub
from megatron_vocagno.training.run_lock import RunLock, check_output
from megatron_vocagno.training.samples import open_samples
from megatron_vocagno.training.stop_signal import StopSignal, reason


@dataclass(frozen=True)
class RunState:
    """A run that is ready for its next step. It holds the lock of its output folder."""

    paths: Sequence[Path]
    """Of the training datasets, as the run file names them."""
    rows: BlendedRows
    layout: Layout
    steps: int
    """The last one."""
    position: Position
    """After the newest whole checkpoint, or at the start."""
    engine: TrainEngine
    processes: Processes
    batches: Batches
    scorer: Scorer | None
    """None if no teacher is read."""
    first_scorer: Scorer | None
    """For the first step only, if the teacher gives distributions and no losses."""
    text_loss_meter: TextLossMeter
    first_batch: FirstBatch
    evaluator: Evaluator
    checkpoints: CheckpointManager
    lock: RunLock
    monitor: Monitor

    def epochs(self, rows_done: int) -> dict[str, float]:
        """How often each dataset has been read, after so many rows of the blend."""
        epochs = zip(self.paths, self.rows.epochs(rows_done), strict=True)
        return {f"data/epochs/{path}": n for path, n in epochs}


def setup_run(run: Run, settings: DeepSpeedConfig, processes: Processes, stop_signal: StopSignal, quiet: bool) -> RunState | None:
    """Open everything that a run needs, and print its first lines. Collective over the world. Raises UserError.

    None if the run was asked to stop while it waited for its output folder.
    """
    layout = batch_layout(settings, processes.world, run.parallel.pipeline_stages)
    datasets, valid, config, weights = run_on_all_ranks(lambda: _open(run, settings, processes), UserError)
    require_same_on_all_ranks(run_on_all_ranks(lambda: facts_of_files(run, datasets, valid, config), UserError, OSError))
    lock = RunLock(run.output)
    if not _take(lock, processes, stop_signal):
        return None
    data = datasets[0]  # for what they have in common
    teacher = load_teacher(run, data, processes)
    longest = teacher.max_positions if teacher else None
    fronts = run_on_all_ranks(lambda: open_fronts(run, data, config, teacher.vocab_size if teacher else None), UserError)
    read = list(reading(run, data, fronts))
    require_same_on_all_ranks({"tokenizers": "; ".join(read)})
    mixture = Mixture([source.weight for source in run.data.train])
    rows = BlendedRows(run_on_all_ranks(lambda: training_rows(run, datasets, longest, fronts), UserError), mixture)
    samples = run_on_all_ranks(lambda: open_samples(run, datasets, valid, longest, fronts), UserError)
    steps = run.training.steps or math.ceil((run.training.tokens or 0) / (layout.rows * rows.tokens_per_row))

    monitor = Monitor(run.output if processes.is_first else None, run.logging.every, steps, quiet)
    distiller = open_distiller(teacher, run, data, config.vocab_size, processes.device)
    engine = build_engine(run, settings, config, weights, layout, steps, processes, distiller)
    scorer = make_scorer(teacher, run, engine, processes)
    text_loss_meter = TextLossMeter(data.student_byte_lengths, data.teacher_byte_lengths, engine.speaks, processes.device)
    student = Facts(data.student_tokenizer.vocab_size, parameters(config), trained=weights is not None)
    first_batch = FirstBatch(student, teacher_facts(run, data, teacher.parameters_count if teacher else None))
    evaluator = Evaluator(engine, run, valid, samples, scorer, processes, stop_signal, fronts[0])
    fingerprint = mixture.fingerprint([ds.fingerprint for ds in datasets])
    checkpoints = CheckpointManager(engine, run, config, settings, fingerprint, data.student_tokenizer.path, fronts[0])
    position = checkpoints.resume(monitor.print)
    if samples is not None:
        samples.begin(position.step, monitor.print)
    lines = [_opening(run, layout, steps, position), *notes(settings), *run.notes(), *run.training.schedule.notes(steps)]
    lines += _not_compared(run, data)
    for line in (*lines, *read, *from_the_hub(run), *_sources(datasets, rows, layout)):
        monitor.print(line)
    paths = [source.path for source in run.data.train]
    return RunState(
        paths=paths,
        rows=rows,
        layout=layout,
        steps=steps,
        position=position,
        engine=engine,
        processes=processes,
        batches=Batches(rows, layout, engine.data_rank),
        scorer=scorer,
        first_scorer=make_first_scorer(teacher, run, engine, processes),
        text_loss_meter=text_loss_meter,
        first_batch=first_batch,
        evaluator=evaluator,
        checkpoints=checkpoints,
        lock=lock,
        monitor=monitor,
    )


def _take(lock: RunLock, processes: Processes, stop_signal: StopSignal) -> bool:
    """Whether the output folder is this run's now: before the minutes in which a teacher is read."""

    def say(text: str) -> None:
        if processes.is_first:
            print(text, flush=True)

    if requested := lock.acquire(say, lambda: stop_signal.requested):
        say(f"stopped while it waited for {lock.output}: {reason(requested)}; nothing was begun")
    return not requested


def _open(
    run: Run, settings: DeepSpeedConfig, processes: Processes
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
    run: Run, data: AlignedDataset, settings: DeepSpeedConfig, processes: Processes
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
