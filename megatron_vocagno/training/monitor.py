"""What a run reports: one line on the console, metrics.jsonl and TensorBoard, from the same numbers.

Names are grouped: `loss/`, `guidance/`, `distance/`, `teacher/`, `throughput/`, `optimizer/`, `data/`, `eval/`, `samples/`.
docs/monitoring.md explains each number. A number that does not exist in a step is left out, for example the guide of kept tokens
if no token was mapped. A number that is NaN or infinite is shown, and is null in metrics.jsonl, because JSON has no such numbers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import orjson

from megatron_vocagno.command import duration
from megatron_vocagno.config import Run
from megatron_vocagno.errors import RunError
from megatron_vocagno.files import make_folder, remove_leftovers, write_durably
from megatron_vocagno.training import sample_files
from megatron_vocagno.training.nonfinite import BrokenStep, described
from megatron_vocagno.training.sample_files import SampleRows, SampleStep
from megatron_vocagno.training.stop_signal import reason
from megatron_vocagno.training.tensorboard import TensorBoardWriter

METRICS_FILE = "metrics.jsonl"
BROKEN_STEPS_FILE = "not_finite.jsonl"
FINISHED_FILE, STOPPED_FILE = "finished", "stopped"
RECENT_STEPS = 50
"""The time that remains is told from so many steps: a run that changes its pace is believed soon, and one slow step is not."""


class Monitor:
    """The voice of one process; the others hold one that is silent (`output=None`)."""

    def __init__(self, output: Path | None, every: int, last_step: int, quiet: bool = False) -> None:
        """output: the run's folder, made when writing begins. every: steps between console lines. quiet: only what is wrong, and
        the last word, are said."""
        self.output, self.every, self.last_step, self.quiet = output, every, last_step, quiet
        self._metrics: IO[bytes] | None = None
        self._tensorboard: TensorBoardWriter | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def print(self, text: str, always: bool = False) -> None:
        """One line for a person. always: though asked to be quiet."""
        if self.output is not None and (always or not self.quiet):
            print(text, flush=True)

    @contextmanager
    def writing(self, first_step: int) -> Iterator[None]:
        """Keep the files open for the steps after `first_step`, the steps already done."""
        if self.output is None:
            yield
            return
        with _disk(self.output):
            make_folder(self.output)
            for name in (FINISHED_FILE, STOPPED_FILE):
                (self.output / name).unlink(missing_ok=True)
            for name in (METRICS_FILE, BROKEN_STEPS_FILE):
                _forget_after(self.output / name, first_step)
            self._tensorboard = TensorBoardWriter(self.output / "tensorboard", first_step)
            self._metrics = (self.output / METRICS_FILE).open("ab")
        try:
            yield
        finally:
            for file in (self._metrics, self._tensorboard):
                # every line has been written by now; TensorBoard alone may lose its last ones to a full disk
                with suppress(OSError):
                    file.close()
            self._metrics = self._tensorboard = None

    def log_config(self, run: Run, settings: Mapping[str, Any]) -> None:
        """What the run was asked to do, for its TensorBoard. settings: the DeepSpeed configuration."""
        if self.output is None or self._tensorboard is None:
            return
        with _disk(self.output):
            self._tensorboard.log_config(run, settings)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers after a step (counted from 1)."""
        self._write(step, numbers)
        if seconds := numbers.get("throughput/step_seconds"):
            self._seconds.append(seconds)
        if step % self.every == 0 or step in (1, self.last_step):
            self.print(_line(step, self.last_step, numbers, self._remaining(self.last_step - step)))

    def first_batch(self, step: int, line: str, warnings: Sequence[str]) -> None:
        """What both models know of the first batch of this start, and what seems wrong."""
        self.print(line)
        for warning in warnings:
            self.print(warning, always=True)
        if self.output is None or self._tensorboard is None:
            return
        with _disk(self.output):
            self._tensorboard.text("first_batch", "\n\n".join([line, *warnings]), step)

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of an evaluation after a step (0: before the first); none where the run was asked to leave meanwhile."""
        if not numbers:
            self.print(f"evaluation after step {step} was left: the run is asked to stop")
            return
        self._write(step, numbers)
        self.print(f"evaluation after step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

    def sample(self, rows: SampleRows, step: SampleStep) -> None:
        """What an evaluation saw of the sample rows: a file, and its distributions for TensorBoard."""
        if self.output is None or self._tensorboard is None:
            return
        with _disk(self.output / sample_files.FOLDER):
            sample_files.write_step(self.output, step)
            for name, values in sample_files.distributions(rows, step).items():
                self._tensorboard.histogram(step.step, name, values)

    def broken_step(self, broken: BrokenStep, documents: Mapping[str, Sequence[int]]) -> None:
        """A step that was not finite, and what it read: document numbers by dataset."""
        if self.output is None:
            return
        with _disk(self.output), (self.output / BROKEN_STEPS_FILE).open("ab") as file:
            file.write(orjson.dumps(asdict(broken) | {"documents": documents}, option=orjson.OPT_APPEND_NEWLINE))
        self.print(described(broken, documents), always=True)

    def log_exit(self, step: int, asked: int) -> None:
        """The last line of a run that ends without an error. asked: the signal of StopSignal, or 0 if the last step is done."""
        if self.output is None:
            return
        if asked:
            self._write(step, {"run/stopped_by": asked})
        with _disk(self.output):
            name, text = (STOPPED_FILE, f"{step} {reason(asked)}\n") if asked else (FINISHED_FILE, f"{step}\n")
            (self.output / name).write_text(text, encoding="utf-8")
        last_word = f"stopped after step {step}: {reason(asked)}" if asked else f"finished: step {step} was the last one"
        self.print(last_word, always=True)

    def _remaining(self, steps: int) -> float | None:
        """Seconds that so many steps will take; None while no step was timed. Evaluations and checkpoints are not in it."""
        return steps * sum(self._seconds) / len(self._seconds) if self._seconds else None

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._metrics is None or self._tensorboard is None:
            return
        with _disk(self._metrics.name):
            self._tensorboard.scalars(step, numbers)
            self._metrics.write(orjson.dumps({"step": step, **numbers}, option=orjson.OPT_APPEND_NEWLINE))
            self._metrics.flush()


@contextmanager
def _disk(place: object) -> Iterator[None]:
    """Only the first rank writes here; where it cannot, it says so, and its launcher ends the others."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {place}: {error}") from None


def read_metrics(output: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl, null as NaN. Raises FileNotFoundError where the run wrote none."""
    lines = [orjson.loads(line) for line in (output / METRICS_FILE).read_bytes().splitlines()]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a killed run left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or orjson.loads(line)["step"] > step:
            continue
        kept.append(line)
    # nothing of step 0 is kept when a run starts over: its first evaluation comes again
    remove_leftovers(path)
    write_durably(path, b"".join(kept) if step else b"")


def _line(step: int, last_step: int, numbers: Mapping[str, float], remaining: float | None) -> str:
    """The console's line: what a person watches while it runs, in 120 columns. remaining: seconds."""
    columns = [
        ("loss", "loss/train", "{:.4f}"),
        ("lr", "optimizer/learning_rate", "{:.1e}"),
        ("grad", "optimizer/grad_norm", "{:.3g}"),
        ("kept", "guidance/share_kept", "{:.0%}"),
        ("unmapped", "guidance/share_unmapped", "{:.1%}"),
        ("tok/s", "throughput/student_tokens_per_second", "{:.0f}"),
        ("teacher", "teacher/share_of_time", "{:.0%}"),
    ]
    shown = [f"{title} {form.format(numbers[name])}" for title, name, form in columns if name in numbers]
    if remaining:
        shown.append(f"eta {duration(remaining)}")
    if broken := numbers.get("loss/nonfinite_tokens"):
        shown.append(f"NOT FINITE {broken:.0f} tokens")
    return f"step {step:>{len(str(last_step))}}/{last_step}  " + "  ".join(shown)
