"""The training loop: read, score, select, learn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from megatron_vocagno.batch.loader import Batch
from megatron_vocagno.batch.text_losses import BatchTextLosses
from megatron_vocagno.config import Guidance, Run
from megatron_vocagno.engine.checkpoint import CheckpointManager
from megatron_vocagno.engine.collectives import ErrorCollector, all_reduce_max, run_on_all_ranks
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.manifest import Position
from megatron_vocagno.engine.processes import Processes, start, stop
from megatron_vocagno.engine.scoring import Scorer
from megatron_vocagno.engine.settings import DeepSpeedConfig, read_settings
from megatron_vocagno.engine.settings_file import check_sections
from megatron_vocagno.engine.step_counts import count_step
from megatron_vocagno.engine.text_losses import named_text_losses
from megatron_vocagno.errors import RunError, SharedError, UserError
from megatron_vocagno.training.consistency import facts_of_command, require_same_on_all_ranks
from megatron_vocagno.training.monitor import NON_FINITE_FILE, Monitor
from megatron_vocagno.training.nonfinite import NonFiniteGuard
from megatron_vocagno.training.pins import pin_models
from megatron_vocagno.training.setup import RunState, setup_run
from megatron_vocagno.training.step_numbers import Clock, Optimizer, step_numbers
from megatron_vocagno.training.stop_signal import StopSignal


def start_training(run: Run, settings_path: Path, stop_signal: StopSignal, quiet: bool = False) -> None:
    """Join the other processes, train, and leave them. quiet: see Monitor. Raises UserError."""
    processes = start()
    # the first collective, which share_error joins on other ranks
    stages, device = run.parallel.pipeline_stages, processes.device
    settings = run_on_all_ranks(lambda: _read_settings(settings_path, stages, device.type), RunError)
    require_same_on_all_ranks(facts_of_command(run, settings, processes.world))
    try:
        run = pin_models(run)
        train(run, settings, processes, stop_signal, quiet)
    except SharedError as error:
        # code that opens a model knows its path, but not the field of the run file that names it
        raise type(error)(with_fields(run, error), error.path) from error
    stop()


def _read_settings(path: Path, pipeline_stages: int, device: str) -> DeepSpeedConfig:
    settings = read_settings(path, pipeline_stages, device)
    check_sections(path, settings)
    return settings


def share_error(error: RunError) -> None:
    """Join the other processes, so that an error of this process ends all of them."""
    start()
    errors = ErrorCollector(RunError)
    errors.error = str(error)
    errors.failure()


def with_fields(run: Run, error: UserError) -> str:
    """The error's message, after the fields of the run file that name the model or dataset that is missing."""
    if error.path is None:
        return str(error)
    # several teachers are all cached, and none of them is read
    named = {"student.pretrained": run.student.pretrained, "teacher.path": run.teacher[0].path if run.teacher else None}
    fields = [field for field, path in named.items() if path and str(path.expanduser()) == error.path]
    datasets = [("data.train", source.path) for source in run.data.train] + [("data.valid", run.data.valid)]
    fields += [field for field, path in datasets if str(path) == error.path]
    return f"{' and '.join(fields)}: {error}" if fields else str(error)


def train(run: Run, settings: DeepSpeedConfig, processes: Processes, stop_signal: StopSignal, quiet: bool = False) -> None:
    """Train a run to its last step, from its newest complete checkpoint if there is one. Collective over the world.

    If a rank's `stop_signal` requests it, the run saves after its current step and returns.
    """
    state = setup_run(run, settings, processes, stop_signal, quiet)
    if state is None:
        return
    checkpoints, monitor, steps = state.checkpoints, state.monitor, state.steps
    guard = NonFiniteGuard(run.training.max_nonfinite_steps, state.engine.skipped_steps)
    position = state.position
    saved, due = position.step, False
    with closing(state.lock), monitor.writing(position.step):
        monitor.log_config(run, settings)
        if position.step == 0:
            state.evaluator.evaluate(0, monitor)
        while not (requested := all_reduce_max(stop_signal.requested, processes.device)) and position.step < steps:
            before, position = position, position.after(state.layout.rows)
            numbers, text_losses = take_step(state, run.guidance, before.rows, first=before == state.position)
            monitor.step(position.step, numbers | state.epochs(position.rows))
            if before == state.position:
                state.first_batch.report(position.step, text_losses, monitor)
            if outlier := state.engine.outlier:
                documents = state.documents(before.rows, position.rows)
                monitor.outlier_step(position.step, outlier, state.engine.outlier_steps, documents)
            if broken := guard.check(position.step, numbers):
                monitor.non_finite_step(broken, state.documents(before.rows, position.rows))
                guard.stop_at_limit(broken, run.output / NON_FINITE_FILE)
            if _due(position.step, run.eval.every, steps):
                state.evaluator.evaluate(position.step, monitor)
            due = due or _due(position.step, run.checkpoint.every, steps)
            # a checkpoint is postponed to the next healthy step: those of a diverging run would replace the good ones
            if due and broken is None:
                monitor.print(f"checkpoint: {checkpoints.save(position)}")
                saved, due = position.step, False
        if saved < position.step:
            save_last(state.engine, checkpoints, position, saved, monitor)
        monitor.log_exit(position.step, requested if position.step < steps else 0)


def take_step(state: RunState, guidance: Guidance, first_row: int, first: bool) -> tuple[dict[str, float], BatchTextLosses]:
    """One optimizer step on the rows from `first_row` on. Collective over the world.

    first    whether it is the first step of this process
    returns  its metrics, named as in docs/monitoring.md; the losses of both models over the text of the step
    """
    engine, processes = state.engine, state.processes
    clock = Clock(processes)
    # read
    micro_batches = state.batches.step(first_row)
    counts = count_step(micro_batches, guidance, engine.data_group, processes.device)
    # score
    clock.start_teacher()
    teacher_losses = _score(state.scorer, micro_batches, processes)
    measured_losses = teacher_losses if state.scorer is not None and guidance.needs_teacher else None
    if first and state.first_scorer is not None:
        measured_losses = state.first_scorer.score(micro_batches)
    sums_N = state.text_loss_meter.sums(micro_batches, measured_losses)
    # select, learn
    clock.start_student()
    learning_rate = engine.learning_rate  # read before the step, which advances the schedule
    loss = engine.train(micro_batches, teacher_losses, counts)
    seconds = clock.stop()
    stats, student_nats, sums_N = engine.objective.reduce_stats(sums_N)
    text_losses = named_text_losses(student_nats, sums_N)
    optimizer = Optimizer(learning_rate, engine.skipped_steps, engine.grad_norm)
    numbers = step_numbers(loss, stats, text_losses, counts, seconds, optimizer, guidance, state.scorer)
    if engine.outliers is not None:
        numbers["optimizer/outlier_steps"] = engine.outlier_steps
    return numbers | engine.reduce_metrics(counts), text_losses


def _score(scorer: Scorer | None, batches: Sequence[Batch], processes: Processes) -> list[Tensor]:
    """The teacher's losses, one [B, U] per batch; [B, 0] without a scorer."""
    if scorer is None:
        return [torch.empty(len(batch.target_BS), 0, device=processes.device) for batch in batches]
    return scorer.score(batches)


def save_last(engine: TrainEngine, checkpoints: CheckpointManager, position: Position, saved: int, monitor: Monitor) -> None:
    """Write a checkpoint at the end of the run, even if its last step was not finite. Collective over the world.

    saved: the step of the newest checkpoint. Raises SharedError if the weights are not finite.
    """
    if not engine.has_finite_weights():
        raise SharedError(
            f"after step {position.step} the student's weights are not finite, so no checkpoint was written. "
            f"The newest one is from step {saved}. Likely causes: too high a learning rate, or broken initial weights."
        )
    monitor.print(f"checkpoint: {checkpoints.save(position)}")


def _due(step: int, every: int | None, steps: int) -> bool:
    return step == steps or (every is not None and step % every == 0)
