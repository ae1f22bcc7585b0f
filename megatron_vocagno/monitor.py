"""What a run tells: TensorBoard, one line on the console, and metrics.jsonl, from the same numbers.

Names are grouped for TensorBoard (`loss/`, `guidance/`, `teacher/`, `throughput/`, `optimizer/`, `eval/`). A number that
does not exist in a step (the guide of kept tokens when none was mapped) is not there; one that is NaN or infinite is shown, and
null in metrics.jsonl, since JSON has no such numbers.
metrics.jsonl holds one object a step, and one an evaluation, with the same names and `step`; a resumed run drops the lines of
steps that it is about to repeat, so that each stands there once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

import orjson
from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class Monitor:
    """The voice of one process; the others hold one that is silent (`output=None`)."""

    def __init__(self, output: Path | None, every: int, last_step: int) -> None:
        """output: the run's folder, made when writing begins. every: steps between console lines."""
        self.output, self.every, self.last_step = output, every, last_step
        self._metrics: BinaryIO | None = None
        self._board: SummaryWriter | None = None

    def say(self, text: str) -> None:
        """One line for a person."""
        if self.output is not None:
            print(text, flush=True)

    @contextmanager
    def writing(self, first_step: int) -> Iterator[None]:
        """Keep the files open for the steps after `first_step`, the steps already done."""
        if self.output is None:
            yield
            return
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / METRICS_FILE
        _forget_after(path, first_step)
        board = SummaryWriter(str(self.output / "tensorboard"), purge_step=first_step + 1)
        with path.open("ab") as self._metrics, closing(board) as self._board:
            yield
        self._metrics = self._board = None

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
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._metrics.write(orjson.dumps({"step": step, **numbers}, option=orjson.OPT_APPEND_NEWLINE))
        self._metrics.flush()


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
    shown = [f"{title} {form.format(numbers[name])}" for title, name, form in columns if name in numbers]
    if broken := numbers.get("loss/nonfinite_tokens"):
        shown.append(f"NOT FINITE {broken:.0f} tokens")
    return f"step {step:>{len(str(last_step))}}/{last_step}  " + "  ".join(shown)
