"""Set up a run before its first step: data, models, engine, and the position from which it continues."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_vocagno.batch.blend import BlendedRows, Mixture
from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import Batches, Layout
from megatron_vocagno.config import Parallel, Run, Source, Student
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.identity import not_compared
from megatron_vocagno.engine.build import build_engine, check_precision
from megatron_vocagno.engine.cached import TeacherSources
from megatron_vocagno.engine.checkpoint import CheckpointManager, StoredFiles, engine_layout
from megatron_vocagno.engine.collectives import run_on_all_ranks
from megatron_vocagno.engine.decay_start import decay_start
from megatron_vocagno.engine.distilling import check_vocabularies, make_distiller
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.manifest import Position
from megatron_vocagno.engine.outliers import check_outliers
from megatron_vocagno.engine.pipeline import check_stages
from megatron_vocagno.engine.placement import check_teacher, load_teacher, make_first_scorer, make_scorer
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.engine.settings import DeepSpeedConfig, batch_layout, precision
from megatron_vocagno.engine.settings_file import notes
from megatron_vocagno.engine.text_losses import TextLossMeter
from megatron_vocagno.errors import RunError, UserError, counted
from megatron_vocagno.model.attention import ULYSSES, resolve_attention
from megatron_vocagno.model.configuration import check_row_length, student_config
from megatron_vocagno.model.folder import PretrainedWeights, parameters
from megatron_vocagno.model.teacher import teacher_folder
from megatron_vocagno.model.ulysses import check_ulysses
from megatron_vocagno.training.consistency import facts_of_files, require_same_on_all_ranks
from megatron_vocagno.training.evaluation import Evaluator, HeldOut
from megatron_vocagno.training.first_batch import FirstBatch, ModelFacts, teacher_facts
from megatron_vocagno.training.fronts import describe_fronts, student_front, teacher_front
from megatron_vocagno.training.monitor import Monitor
from megatron_vocagno.training.nonfinite import documents_of
from megatron_vocagno.training.pins import hub_notes
from megatron_vocagno.training.run_lock import RunLock, check_output
from megatron_vocagno.training.samples import Samples
from megatron_vocagno.training.stop_signal import StopSignal, reason


@dataclass(frozen=True)
class RunState:
    """A run that is ready for its next step. It holds the lock of its output folder."""

    paths: Sequence[Path]
    """Paths of the training datasets, as in the run file."""
    rows: BlendedRows
    layout: Layout
    steps: int
    """Number of the last step."""
    position: Position
    """Position of the newest complete checkpoint, or of a start."""
    engine: TrainEngine
    processes: Processes
    batches: Batches
    scorer: Scorer | None
    """Scores every step. None if the objective trains on every token."""
    first_scorer: Scorer | None
    """Scores the first step only, for objectives that read the teacher's distributions instead of its losses."""
    text_loss_meter: TextLossMeter
    first_batch: FirstBatch
    evaluator: Evaluator
    checkpoints: CheckpointManager
    lock: RunLock
    monitor: Monitor

    def epochs(self, rows_done: int) -> dict[str, float]:
        """Metrics: how often each dataset has been read after `rows_done` rows of the blend."""
        epochs = zip(self.paths, self.rows.epochs(rows_done), strict=True)
        return {f"data/epochs/{path}": n for path, n in epochs}

    def documents(self, first_row: int, end_row: int) -> dict[str, list[int]]:
        """The numbers of the documents in the rows `[first_row, end_row)`, by dataset."""
        return dict(zip(map(str, self.paths), documents_of(self.rows, range(first_row, end_row)), strict=True))


def setup_run(run: Run, settings: DeepSpeedConfig, processes: Processes, stop_signal: StopSignal, quiet: bool) -> RunState | None:
    """Set up a run, and print its first lines. Collective over the world. Raises UserError.

    None if a stop was requested while the run waited for its output folder.
    """
    layout = batch_layout(settings, processes.world, run.parallel.pipeline_stages, run.parallel.sequence)
    files = run_on_all_ranks(lambda: _open_files(run, settings, processes), UserError)
    opened = [*files.datasets, *([files.valid] if files.valid is not None else [])]
    facts = run_on_all_ranks(lambda: facts_of_files(opened, run.cached_teachers, files.config, run.weights), UserError, OSError)
    require_same_on_all_ranks(facts)
    lock = RunLock(run.output)
    if not _acquire(lock, processes, stop_signal):
        return None
    try:
        return _setup_locked(run, settings, processes, stop_signal, quiet, layout, files, lock)
    except BaseException:
        lock.close()
        raise


def _setup_locked(
    run: Run,
    settings: DeepSpeedConfig,
    processes: Processes,
    stop_signal: StopSignal,
    quiet: bool,
    layout: Layout,
    files: _Files,
    lock: RunLock,
) -> RunState:
    """The rest of setup_run, which needs the lock of the output folder."""
    datasets, valid, config = files.datasets, files.valid, files.config
    data = datasets[0]  # all datasets have the same tokenizers
    teacher = load_teacher(run.loaded_teacher, data, processes)
    by_document, vocab_size = run.data.by_document, teacher.vocab_size if teacher else 0
    front = run_on_all_ranks(lambda: student_front(run.student, data, config.vocab_size, by_document), UserError)
    front_of_teacher = run_on_all_ranks(lambda: teacher_front(run.loaded_teacher, data, vocab_size, by_document), UserError)
    front_lines = list(describe_fronts(run, data, front, front_of_teacher))
    require_same_on_all_ranks({"tokenizers": "; ".join(front_lines)})
    limit = teacher.max_positions if teacher else None
    sources = TeacherSources(run.guidance, run.training.seed, run.cached_teachers, limit, front_of_teacher)
    row_length, count = run.data.row_length, run.logging.samples
    parts = run_on_all_ranks(lambda: sources.training_rows(datasets, row_length, front), UserError)
    mixture = Mixture([source.weight for source in run.data.train])
    rows = BlendedRows(parts, mixture)
    samples = None
    if count is not None and valid is not None:
        samples = run_on_all_ranks(lambda: Samples(count, row_length, datasets, valid, sources, front), UserError)
    steps = run.training.steps or math.ceil((run.training.tokens or 0) / (layout.rows * rows.tokens_per_row))

    monitor = Monitor(run.output if processes.is_first else None, run.logging.every, steps, quiet)
    device = processes.device
    distiller = make_distiller(teacher, run.loaded_teacher, run.guidance, data, config.vocab_size, by_document, device)
    engine = build_engine(run, settings, config, files.weights, layout, steps, processes, distiller)
    scorer = make_scorer(teacher, run.loaded_teacher, engine, device)
    held_out = HeldOut(valid, row_length, run.eval.rows, front) if valid is not None else None
    stored = StoredFiles(run.model_dump_json(indent=2), config, data.student_tokenizer.path, run.student.pretrained)
    start = _start(mixture.fingerprint([ds.fingerprint for ds in datasets]), row_length, run.training.seed, front)
    stages = run.parallel.pipeline_stages
    checkpoints = CheckpointManager(engine, run.output, run.checkpoint, stored, start, engine_layout(settings, stages, config))
    position = checkpoints.resume(monitor.print, decay_start(run.training.schedule, steps))
    if samples is not None:
        samples.prepare(run.output, position.step, monitor.print)
    lines = [_first_line(run, layout, steps, position), *notes(settings), *run.notes(), *run.training.schedule.notes(steps)]
    lines += _not_compared(run.weights, data)
    for line in (*lines, *front_lines, *hub_notes(run.weights.values()), *_describe_sources(datasets, rows, layout)):
        monitor.print(line)
    return RunState(
        paths=[source.path for source in run.data.train],
        rows=rows,
        layout=layout,
        steps=steps,
        position=position,
        engine=engine,
        processes=processes,
        batches=Batches(rows, layout, engine.data_rank),
        scorer=scorer,
        first_scorer=make_first_scorer(teacher, run.loaded_teacher, engine, device),
        text_loss_meter=TextLossMeter(data.student_byte_lengths, data.teacher_byte_lengths, engine.counts_rows, device),
        first_batch=_first_batch(run, data, config, teacher.parameters_count if teacher else None),
        evaluator=Evaluator(engine, held_out, samples, scorer, processes, stop_signal),
        checkpoints=checkpoints,
        lock=lock,
        monitor=monitor,
    )


def _acquire(lock: RunLock, processes: Processes, stop_signal: StopSignal) -> bool:
    """Acquire the lock of the output folder, before a teacher is read. False if a stop was requested meanwhile."""

    def report(text: str) -> None:
        if processes.is_first:
            print(text, flush=True)

    if requested := lock.acquire(report, lambda: stop_signal.requested):
        report(f"stopped while it waited for {lock.output}: {reason(requested)}; nothing was written")
    return not requested


@dataclass(frozen=True)
class _Files:
    datasets: list[AlignedDataset]
    """Datasets of `data.train`."""
    valid: AlignedDataset | None
    config: PretrainedConfig
    """Configuration of the student."""
    weights: PretrainedWeights | None
    """Weights of a pretrained student."""


def _open_files(run: Run, settings: DeepSpeedConfig, processes: Processes) -> _Files:
    """Open the datasets and the student's files, and check them. Not collective.

    All checks that need no teacher's weights are here, because reading a teacher takes minutes. Raises UserError.
    """
    check_precision(settings, processes.device)
    check_outliers(run.training, settings)
    datasets = open_data(run.data.train)
    check_vocabularies(run.guidance, datasets[0])
    check_teacher(run.loaded_teacher, datasets[0])
    valid = _open_valid(run.data.valid, datasets[0])
    config, weights = _open_student(run.student, run.parallel, run.data.row_length, datasets[0])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision(settings)]
    attention = resolve_attention(config, run.student.attention, dtype, processes.device)
    config._attn_implementation = attention if run.parallel.sequence == 1 else ULYSSES
    check_output(run.output)
    return _Files(datasets, valid, config, weights)


def open_data(sources: Sequence[Source]) -> list[AlignedDataset]:
    """The datasets of a blend. Raises DatasetError, or RunError if a dataset is named twice."""
    datasets = [AlignedDataset.open(source.path) for source in sources]
    for i, data in enumerate(datasets):
        data.require_tokenizers_of(datasets[0])
        for other in datasets[:i]:
            if data.fingerprint == other.fingerprint:
                raise RunError(
                    f"{data.path} and {other.path} in data.train are the same dataset: use one, with the sum of weights"
                )
    return datasets


def _open_valid(path: Path | None, data: AlignedDataset) -> AlignedDataset | None:
    if path is None:
        return None
    valid = AlignedDataset.open(path)
    valid.require_tokenizers_of(data)
    return valid


def _open_student(
    student: Student, parallel: Parallel, row_length: int, data: AlignedDataset
) -> tuple[PretrainedConfig, PretrainedWeights | None]:
    weights = PretrainedWeights(student.pretrained) if student.pretrained is not None else None
    source = weights.folder if weights is not None else student.config
    assert source is not None
    config = student_config(source, data.student_tokenizer.vocab_size, data.student_tokenizer.rows)
    if weights is not None:
        data.require_tokenizer("student", weights.folder)
    check_row_length(config, row_length)
    check_stages(parallel, config.num_hidden_layers)
    if parallel.sequence > 1:
        check_ulysses(config, parallel.sequence, row_length)
    return config, weights


def _start(dataset: str, row_length: int, seed: int, front: Front) -> Position:
    """The position of a run before its first step. dataset: fingerprint of the training data. front: prefix of the student."""
    bos = " ".join(map(str, front.ids)) or "none"
    return Position(step=0, rows=0, dataset=dataset, row_length=row_length, seed=seed, bos=bos)


def _first_batch(run: Run, data: AlignedDataset, config: PretrainedConfig, teacher_parameters: int | None) -> FirstBatch:
    vocab_size, trained = data.student_tokenizer.vocab_size, run.student.pretrained is not None
    student = ModelFacts(vocab_size, parameters(config), trained)
    teachers = teacher_facts(data, run.cached_teachers[1:], teacher_parameters) if run.guidance.needs_teacher else []
    return FirstBatch(student, teachers)


def _not_compared(weights: Mapping[str, Path], data: AlignedDataset) -> Iterator[str]:
    """A note for each model without a tokenizer, because it cannot be compared with the dataset. weights: see Run.weights."""
    for field, path in weights.items():
        model, _, _ = field.partition(".")
        if (note := not_compared(data.path, model, teacher_folder(path))) is not None:
            yield f"note: {note}"


def _first_line(run: Run, layout: Layout, steps: int, position: Position) -> str:
    start_or_resume = f"resuming after step {position.step}" if position.step else "starting"
    return (
        f"{start_or_resume}: {run.guidance.objective}, {counted(steps, 'step')} of "
        f"{counted(layout.rows, 'row')} of {run.data.row_length:,} tokens "
        f"({layout.data_parallel} data-parallel x {_ranks_of_a_row(layout, run.parallel)}, "
        f"{counted(layout.micro_batches, 'micro-batch', 'micro-batches')})"
    )


def _ranks_of_a_row(layout: Layout, parallel: Parallel) -> str:
    return f"{layout.sequence} ranks per row" if layout.sequence > 1 else counted(max(1, parallel.pipeline_stages), "stage")


def _describe_sources(datasets: Sequence[AlignedDataset], rows: BlendedRows, layout: Layout) -> Iterator[str]:
    """A line per dataset: its share of the rows and the size of its epoch."""
    for data, part, share in zip(datasets, rows.parts, rows.mixture.shares, strict=True):
        makes = "makes" if len(data) == 1 else "make"
        epoch = f"{counted(len(data), 'document')} {makes} {counted(part.rows_in_epoch, 'row')} per epoch"
        yield f"{float(100 * share):.3g} % of the rows from {data.path}: {epoch}"
        if part.rows_in_epoch < layout.rows * share:
            yield f"note: a step reads {float(layout.rows * share):.0f} of its rows, so every step repeats its text"
