"""What a run tells: TensorBoard, one line on the console, and metrics.jsonl, from the same numbers.

Names are grouped for TensorBoard (`loss/`, `guidance/`, `teacher/`, `throughput/`, `optimizer/`, `eval/`). A number that
does not exist in a step (the guide of kept tokens when none was mapped) is left out, never written as NaN.
metrics.jsonl holds one object a step with the same names and `step`; a resumed run drops the lines of steps that it is
about to repeat, so that each step stands there once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class Monitor:
    """The voice of one process; the others hold one that is silent (`output=None`)."""

    def __init__(self, output: Path | None, first_step: int, every: int, last_step: int) -> None:
        """output: the run's folder. first_step: steps already done. every: steps between console lines."""
        self.every, self.last_step = every, last_step
        self.console = Console(highlight=False, soft_wrap=True, quiet=output is None)
        self._metrics = self._board = None
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            path = output / METRICS_FILE
            _forget_after(path, first_step)
            self._metrics = path.open("ab")
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)

    def say(self, text: str) -> None:
        """One line for a person."""
        self.console.print(text, markup=False)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers after a step (counted from 1)."""
        self._write(step, numbers)
        if step % self.every == 0 or step in (1, self.last_step):
            self.say(_line(step, self.last_step, numbers))

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of an evaluation after a step (0: before the first)."""
        self._write(step, numbers)
        self.say(f"evaluation after step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._metrics is None or self._board is None:
            return
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        self._metrics.write(orjson.dumps({"step": step, **finite}, option=orjson.OPT_APPEND_NEWLINE))
        self._metrics.flush()

    def close(self) -> None:
        if self._metrics is not None and self._board is not None:
            self._metrics.close()
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(output: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl. Raises FileNotFoundError where the run wrote none."""
    return [orjson.loads(line) for line in (output / METRICS_FILE).read_bytes().splitlines()]


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
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept) if step else b"")
    temporary.replace(path)


def _line(step: int, last_step: int, numbers: Mapping[str, float]) -> str:
    """The console's line: what a person watches while it runs."""
    columns = [
        ("loss", "loss/train", "{:.4f}"),
        ("lr", "optimizer/learning_rate", "{:.2e}"),
        ("grad", "optimizer/grad_norm", "{:.2f}"),
        ("kept", "guidance/share_kept", "{:.1%}"),
        ("unmapped", "guidance/share_unmapped", "{:.1%}"),
        ("threshold", "guidance/threshold", "{:+.3f}"),
        ("tok/s", "throughput/student_tokens_per_second", "{:.0f}"),
        ("teacher", "teacher/share_of_time", "{:.0%}"),
    ]
    shown = [
        f"{title} {form.format(numbers[name])}" for title, name, form in columns if math.isfinite(numbers.get(name, math.nan))
    ]
    return f"step {step:>{len(str(last_step))}}/{last_step}  " + "  ".join(shown)
