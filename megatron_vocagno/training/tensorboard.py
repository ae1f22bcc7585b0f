"""The TensorBoard files of a run: its curves, a page that groups the important ones, and its configuration.

The page is the tab "Custom Scalars". Its charts answer questions about the run, in the order in which a user has them.
docs/monitoring.md explains the curves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from megatron_vocagno.batch.pack import MappingStatus
from megatron_vocagno.batch.text_losses import teacher_names
from megatron_vocagno.config import Guidance, Run

Charts = dict[str, list[str]]
"""The names of the curves of each chart, by its title (with units)."""


class TensorBoardWriter:
    """The event files of a run, open for writing."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: steps already done. TensorBoard hides the values that earlier files contain for later steps."""
        self._first_step = first_step
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log_config(self, run: Run, settings: Mapping[str, Any]) -> None:
        """Write the page, and as text the resolved run and DeepSpeed configuration."""
        page = layout(run.guidance, len(run.teacher), run.data.valid is not None)
        multiline = {
            question: {title: ["Multiline", names] for title, names in charts.items()} for question, charts in page.items()
        }
        self._writer.add_custom_scalars(multiline)
        for title, content in (("run", run.model_dump(mode="json")), ("deepspeed_config", settings)):
            text = orjson.dumps(content, option=orjson.OPT_INDENT_2).decode()
            self._writer.add_text(f"configuration/{title}", f"```json\n{text}\n```", self._first_step)

    def text(self, title: str, content: str, step: int) -> None:
        self._writer.add_text(title, content, step)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: NDArray[np.float32]) -> None:
        self._writer.add_histogram(name, values, step)

    def close(self) -> None:
        self._writer.close()


def layout(guidance: Guidance, teachers: int, held_out: bool) -> dict[str, Charts]:
    """The page: questions, and the charts that answer them. Contains only curves that a run of this kind writes.

    teachers: number of teachers in the run file. held_out: whether the run has held-out text.
    """
    page: dict[str, Charts] = {"1. Is it learning?": _learning(guidance, teachers, held_out)}
    if guidance.selects:
        page["2. Does guidance do what it should?"] = _guidance(guidance)
    page["3. What does it cost?"] = _cost(guidance)
    page["4. Is it healthy?"] = {
        "gradient norm, before clipping": ["optimizer/grad_norm"],
        "learning rate": ["optimizer/learning_rate"],
        "not finite: tokens of a step, skipped steps so far": ["loss/nonfinite_tokens", "optimizer/skipped_steps"],
    }
    return page


def _learning(guidance: Guidance, teachers: int, held_out: bool) -> Charts:
    names = teacher_names(teachers) if guidance.objective == "guided" else []
    teacher_curves, suffix = [f"loss/{name}_all_tokens" for name in names], ", teacher" if names else ""
    charts = {
        f"training loss (nats): learned, all tokens{suffix}": ["loss/train", "loss/all_tokens", *teacher_curves],
        f"training text (bits per byte): student{suffix}": [
            "loss/bits_per_byte",
            *(f"loss/{name}_bits_per_byte" for name in names),
        ],
    }
    if held_out:
        charts["held-out text (bits per byte)"] = ["eval/bits_per_byte"]
    if guidance.distance:
        charts["distance from the teacher"] = ["distance/mean"]
        charts["targets whose distance is taken (share)"] = ["distance/share_compared"]
    return charts


def _guidance(guidance: Guidance) -> Charts:
    student = [f"guidance/student_loss_{group}" for group in ("kept", "dropped")]
    without = {MappingStatus.MAPPED} | (set() if guidance.unit == "chunk" else {MappingStatus.CUT_CHUNK})
    reasons = [f"guidance/unmapped_{reason.name.lower()}" for reason in MappingStatus if reason not in without]
    charts = {
        "share of mapped tokens kept": ["guidance/share_kept"],
        "share of tokens unmapped, by reason": ["guidance/share_unmapped", *reasons, "guidance/unmapped_nan"],
    }
    if not guidance.needs_teacher:
        return {"student's loss (nats): kept, dropped": student, **charts}
    return {
        "loss (nats): student and guide, kept and dropped": [*student, "guidance/guide_kept", "guidance/guide_dropped"],
        "mean weight": ["guidance/weight"],
        "likelihood ratio, share below the threshold": ["guidance/likelihood_ratio", "guidance/share_below"],
        "excess (nats): kept, dropped, threshold": ["guidance/excess_kept", "guidance/excess_dropped", "guidance/threshold"],
        **charts,
    }


def _cost(guidance: Guidance) -> Charts:
    seconds, rates = ["throughput/step_seconds", "throughput/student_seconds"], ["throughput/student_tokens_per_second"]
    if not (guidance.selects and guidance.needs_teacher):
        return {"seconds per step: total, student": seconds, "student tokens per second": rates}
    return {
        "seconds per step: total, student, teacher": [*seconds, "teacher/seconds"],
        "tokens per second: student, teacher": [*rates, "teacher/tokens_per_second"],
        "teacher's share of the time": ["teacher/share_of_time"],
    }
