"""The training loop: score, select, learn."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from megatron_vocagno.config import Run
from megatron_vocagno.engine.agreement import Watch, largest, together
from megatron_vocagno.engine.alike import facts_of_command, require_alike
from megatron_vocagno.engine.checkpoint import Keeper
from megatron_vocagno.engine.manifest import Position
from megatron_vocagno.engine.pins import pin_models
from megatron_vocagno.engine.processes import Processes, start, stop
from megatron_vocagno.engine.settings import Settings, read_settings
from megatron_vocagno.engine.settings_file import check_sections
from megatron_vocagno.engine.trainers import Engine
from megatron_vocagno.errors import RunError, SharedError
from megatron_vocagno.health import NonFiniteGuard, documents_of
from megatron_vocagno.monitor import BROKEN_STEPS_FILE, Monitor
from megatron_vocagno.opening import open_run
from megatron_vocagno.stopping import Stopper


def start_training(run: Run, settings_path: Path, stopper: Stopper, quiet: bool = False) -> None:
    """Join the other processes, train, and leave together. quiet: see Monitor. Raises UserError."""
    processes = start()
    # the first collective, here and in tell_others
    settings = together(lambda: _read(settings_path, run, processes), RunError)
    require_alike(facts_of_command(run, settings, processes.world))
    try:
        run = pin_models(run)
        train(run, settings, processes, stopper, quiet)
    except SharedError as error:
        # here alone: what looks for a model knows its path, and not which field has it
        raise type(error)(with_fields(run, str(error))) from error
    stop()


def _read(path: Path, run: Run, processes: Processes) -> Settings:
    settings = read_settings(path, run.parallel.pipeline_stages, processes.device.type)
    check_sections(path, settings)
    return settings


def tell_others(error: RunError) -> None:
    """Join the other processes, so that all of them leave for an error of this one."""
    start()
    watch = Watch(RunError)
    watch.error = str(error)
    watch.failure()


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
    opened = open_run(run, settings, processes, stopper, quiet)
    if opened is None:
        return
    rows, steps, keeper, monitor = opened.rows, opened.steps, opened.keeper, opened.monitor
    guard = NonFiniteGuard(run.training.max_nonfinite_steps, opened.engine.skipped_steps)
    position = opened.position
    saved, due = position.step, False
    with closing(opened.occupancy), monitor.writing(position.step):
        monitor.introduce(run, settings)
        if position.step == 0:
            opened.held_out.tell(0, monitor)
        while not (asked := largest(stopper.asked, processes.device)) and position.step < steps:
            before, position = position, position.after(opened.layout.rows)
            numbers = opened.stepper.step(before.rows)
            numbers |= {f"data/epochs/{path}": n for path, n in zip(opened.paths, rows.epochs(position.rows), strict=True)}
            monitor.step(position.step, numbers)
            if before == opened.position:
                opened.first_batch.tell(position.step, opened.stepper.heard, monitor)
            if broken := guard.check(position.step, numbers):
                documents = documents_of(rows, range(before.rows, position.rows))
                monitor.broken_step(broken, dict(zip(map(str, opened.paths), documents, strict=True)))
                guard.stop_at_limit(broken, run.output / BROKEN_STEPS_FILE)
            if _due(position.step, run.eval.every, steps):
                opened.held_out.tell(position.step, monitor)
            due = due or _due(position.step, run.checkpoint.every, steps)
            # after a broken step it waits for a healthy one: checkpoints of a run that goes wrong would push out the good ones
            if due and broken is None:
                monitor.say(f"checkpoint: {keeper.save(position)}")
                saved, due = position.step, False
        if saved < position.step:
            save_last(opened.engine, keeper, position, saved, monitor)
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
