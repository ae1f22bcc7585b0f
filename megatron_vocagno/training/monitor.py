"""Report the metrics of a run in three places: on the console, in metrics.jsonl and in TensorBoard.

Names are grouped: `loss/`, `guidance/`, `distance/`, `teacher/`, `throughput/`, `optimizer/`, `data/`, `eval/`, `samples/`.
docs/monitoring.md explains each metric. A metric that does not exist in a step is left out, for example the guide of kept tokens
if no token was mapped. A metric that is NaN or infinite is printed as it is, and is null in metrics.jsonl, because JSON cannot
represent it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from megatron_vocagno.command import duration
from megatron_vocagno.config import Run
from megatron_vocagno.errors import RunError
from megatron_vocagno.files import make_folder, remove_leftovers, write_durably
from megatron_vocagno.training import sample_files
from megatron_vocagno.training.nonfinite import NonFiniteStep, describe, describe_outlier
from megatron_vocagno.training.sample_files import SampleRows, SampleStep
from megatron_vocagno.training.stop_signal import reason

if TYPE_CHECKING:
    from megatron_vocagno.engine.outliers import Outlier
    from megatron_vocagno.training.tensorboard import TensorBoardWriter

METRICS_FILE = "metrics.jsonl"
NON_FINITE_FILE, OUTLIERS_FILE = "not_finite.jsonl", "outliers.jsonl"
FINISHED_FILE, STOPPED_FILE = "finished", "stopped"
RECENT_STEPS = 50
"""The remaining time is estimated from this many recent steps. It follows a change of pace soon, and one slow step has little
effect."""


class Monitor:
    """Prints and writes the reports of the first rank. On the other ranks it does nothing (`output=None`)."""

    def __init__(self, output: Path | None, every: int, last_step: int, quiet: bool = False) -> None:
        """
        output     the run's folder, which is created when writing begins; None for a monitor that reports nothing
        every      steps between console lines
        last_step  the run's last step
        quiet      print only warnings and the last line
        """
        self.output, self.every, self.last_step, self.quiet = output, every, last_step, quiet
        self._metrics: IO[bytes] | None = None
        self._tensorboard: TensorBoardWriter | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def print(self, text: str, always: bool = False) -> None:
        """Print a line. always: even if the monitor is quiet."""
        if self.output is not None and (always or not self.quiet):
            print(text, flush=True)

    @contextmanager
    def writing(self, first_step: int) -> Iterator[None]:
        """A context in which the files are open. first_step: steps already done. Lines of later steps are removed."""
        if self.output is None:
            yield
            return
        with _writing_to(self.output):
            make_folder(self.output)
            for name in (FINISHED_FILE, STOPPED_FILE):
                (self.output / name).unlink(missing_ok=True)
            for name in (METRICS_FILE, NON_FINITE_FILE, OUTLIERS_FILE):
                _remove_after(self.output / name, first_step)
            from megatron_vocagno.training.tensorboard import TensorBoardWriter  # imports torch

            self._tensorboard = TensorBoardWriter(self.output / "tensorboard", first_step)
            self._metrics = (self.output / METRICS_FILE).open("ab")
        try:
            yield
        finally:
            for file in (self._metrics, self._tensorboard):
                # metrics.jsonl is flushed after every line; if the disk is full, only TensorBoard loses its last lines
                with suppress(OSError):
                    file.close()
            self._metrics = self._tensorboard = None

    def log_config(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Write the configuration to TensorBoard. settings: the DeepSpeed configuration."""
        if self.output is None or self._tensorboard is None:
            return
        with _writing_to(self.output):
            self._tensorboard.log_config(run, settings)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report the metrics of a step (counted from 1)."""
        self._write(step, numbers)
        if seconds := numbers.get("throughput/step_seconds"):
            self._seconds.append(seconds)
        if step % self.every == 0 or step in (1, self.last_step):
            self.print(_line(step, self.last_step, numbers, self._remaining(self.last_step - step)))

    def first_batch(self, step: int, line: str, warnings: Sequence[str]) -> None:
        """Report the losses of both models on the first batch after this start, and warnings about them."""
        self.print(line)
        for warning in warnings:
            self.print(warning, always=True)
        if self.output is None or self._tensorboard is None:
            return
        with _writing_to(self.output):
            self._tensorboard.text("first_batch", "\n\n".join([line, *warnings]), step)

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report the metrics of an evaluation after a step (0: before the first). Empty if a stop was requested during it."""
        if not numbers:
            self.print(f"evaluation after step {step} skipped: stop requested")
            return
        self._write(step, numbers)
        self.print(f"evaluation after step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

    def sample(self, rows: SampleRows, step: SampleStep) -> None:
        """Write the sample rows of an evaluation to a file, and their distributions to TensorBoard."""
        if self.output is None or self._tensorboard is None:
            return
        with _writing_to(self.output / sample_files.FOLDER):
            sample_files.write_step(self.output, step)
            for name, values in sample_files.distributions(rows, step).items():
                self._tensorboard.histogram(step.step, name, values)

    def non_finite_step(self, broken: NonFiniteStep, documents: Mapping[str, Sequence[int]]) -> None:
        """Report a step that was not finite. documents: the numbers of the documents that it read, by dataset."""
        self._append(NON_FINITE_FILE, asdict(broken) | {"documents": documents})
        self.print(describe(broken, documents), always=True)

    def outlier_step(self, step: int, outlier: Outlier, count: int, documents: Mapping[str, Sequence[int]]) -> None:
        """Report a step that was skipped because it was an outlier. count: outliers so far. documents: see non_finite_step."""
        self._append(OUTLIERS_FILE, {"step": step} | asdict(outlier) | {"documents": documents})
        self.print(describe_outlier(step, outlier, count, documents), always=True)

    def _append(self, name: str, fields: Mapping[str, Any]) -> None:
        """Append a line to a file of the run."""
        if self.output is None:
            return
        with _writing_to(self.output), (self.output / name).open("ab") as file:
            file.write(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))

    def log_exit(self, step: int, requested: int) -> None:
        """Report that the run ends without an error. requested: see StopSignal; 0 if the run reached its last step."""
        if self.output is None:
            return
        if requested:
            self._write(step, {"run/stopped_by": requested})
        with _writing_to(self.output):
            name, text = (STOPPED_FILE, f"{step} {reason(requested)}\n") if requested else (FINISHED_FILE, f"{step}\n")
            (self.output / name).write_text(text, encoding="utf-8")
        last_line = f"stopped after step {step}: {reason(requested)}" if requested else f"finished: step {step} was the last one"
        self.print(last_line, always=True)

    def _remaining(self, steps: int) -> float | None:
        """Estimated seconds for `steps` steps, without evaluations and checkpoints. None before the first timed step."""
        return steps * sum(self._seconds) / len(self._seconds) if self._seconds else None

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._metrics is None or self._tensorboard is None:
            return
        with _writing_to(self._metrics.name):
            self._tensorboard.scalars(step, numbers)
            self._metrics.write(orjson.dumps({"step": step, **numbers}, option=orjson.OPT_APPEND_NEWLINE))
            self._metrics.flush()


@contextmanager
def _writing_to(place: object) -> Iterator[None]:
    """Turn an OSError into a RunError. Only the first rank writes here. If it raises, the launcher ends the other ranks."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {place}: {error}") from None


def read_metrics(output: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl, with null as NaN. Raises FileNotFoundError if the run has not written the file."""
    lines = [orjson.loads(line) for line in (output / METRICS_FILE).read_bytes().splitlines()]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def _remove_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and a last line that a killed run left incomplete."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or orjson.loads(line)["step"] > step:
            continue
        kept.append(line)
    # a run that starts over evaluates before its first step again, so the lines of step 0 are removed too
    remove_leftovers(path)
    write_durably(path, b"".join(kept) if step else b"")


def _line(step: int, last_step: int, numbers: Mapping[str, float], remaining: float | None) -> str:
    """The console line of a step, at most 120 columns. remaining: seconds."""
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
