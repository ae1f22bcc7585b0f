"""All layouts of a run beside each other, best first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vocagno.config import Run
from megatron_vocagno.engine.settings import precision
from megatron_vocagno.planning.cost import Cluster, Step, learned_share, scoring_hours, step
from megatron_vocagno.planning.layouts import Candidate, Placement, Stage, batches, stages
from megatron_vocagno.planning.memory import Memory, StudentUse, TeacherUse, memory


@dataclass(frozen=True)
class Task:
    """A run as far as it costs something."""

    run: Run
    settings: dict[str, Any]
    student: StudentUse
    teachers: tuple[TeacherUse, ...]
    rows: int
    """Of a global batch."""
    micro_batch_rows: int
    tokens_per_row: int
    tokens: float
    """Of the student, over the whole run."""
    teacher_tokens: float
    """To score once; each teacher reads as many."""

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.rows * self.tokens_per_row))

    @property
    def timed(self) -> bool:
        """Whether the rates of the GPUs, which are those of 16-bit products, are the run's; bytes are known without them."""
        return precision(self.settings) != "fp32"


@dataclass(frozen=True)
class Option:
    candidate: Candidate
    memory: Memory
    step: Step
    hours: float
    """Of training."""
    scoring: float
    """GPU-hours of scoring the data beforehand, where losses are cached."""
    gpus: int
    capacity: float
    """Bytes that may be taken of a GPU's memory."""
    tokens_per_second: float
    """Of the student, a GPU."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity

    @property
    def gpu_hours(self) -> float:
        """Of scoring and training."""
        return self.hours * self.gpus + self.scoring


def compare(task: Task, cluster: Cluster) -> list[Option]:
    """One option for each layout and placement of the teacher: the smallest change of the run's files that fits.

    Micro-batches are halved where the file's does not divide the batch or does not fit; activations are computed again where
    that is not enough, or where the run asks for it. Options that fit come first, then the cheapest where times are known, then
    the simplest.
    """
    found = []
    for zero, count in layouts(task.run, cluster.gpus, task.student.sizes.layers):
        for placement in placements(task):
            options = list(_changes(task, cluster, zero, count, placement))
            if options:
                found.append(next((option for option in options if option.fits), min(options, key=lambda o: o.memory.total)))
    simplest = (None, "replicated", "cached", "zero3")

    def order(option: Option) -> tuple[bool, int, int, int, int]:
        candidate = option.candidate
        cost = round(option.gpu_hours) if task.timed else 0
        return not option.fits, cost, candidate.pipe, candidate.zero, simplest.index(candidate.placement)

    return sorted(found, key=order)


def as_asked(task: Task, cluster: Cluster, zero: int) -> Option | None:
    """The run as its files have it; None where its micro-batch does not divide the batch on so many GPUs."""
    count = task.run.parallel.pipeline_stages
    placement = task.run.teacher[0].placement if task.teachers else None
    options = _changes(task, cluster, zero, count, placement)
    first = next(options, None)
    return first if first and first.candidate.batch.micro_batch_rows == task.micro_batch_rows else None


def layouts(run: Run, gpus: int, layers: int) -> Iterator[tuple[int, int]]:
    """(ZeRO stage, pipeline stages) to compare; the run's own stages are among them."""
    yield from ((1, 0), (2, 0), (3, 0))
    if run.guidance.distance:  # no pipeline
        return
    for count in sorted({2, 4, 8, run.parallel.pipeline_stages} - {0}):
        if gpus % count == 0 and count <= layers:
            yield 1, count


def placements(task: Task) -> tuple[Placement | None, ...]:
    if not task.teachers:
        return (None,)
    if task.run.guidance.distance:
        return ("replicated",)
    return ("replicated", "zero3", "cached") if len(task.teachers) == 1 else ("cached",)


def _changes(task: Task, cluster: Cluster, zero: int, count: int, placement: Placement | None) -> Iterator[Option]:
    """Ways to run one layout, the smallest change first."""
    pipe = max(1, count)
    if cluster.gpus % pipe:
        return
    recomputes = (True,) if task.run.parallel.activation_checkpointing else (False, True)
    for batch in batches(task.rows, cluster.gpus // pipe, task.micro_batch_rows):
        for recompute in recomputes:
            yield option(task, cluster, Candidate(zero, count, batch, recompute, placement))


def option(task: Task, cluster: Cluster, candidate: Candidate) -> Option:
    run = task.run
    split: list[Stage] = (
        stages(task.student.sizes, candidate.stages, _partition(run, candidate.stages))
        if candidate.stages
        else [Stage(task.student.sizes.layers, embedding=True, head=True)]
    )
    teacher = task.teachers[0] if task.teachers else None
    settings = {**task.settings, "zero_optimization": {**task.settings["zero_optimization"], "stage": candidate.zero}}
    learned = learned_share(run.guidance, candidate.batch.micro_batches, cluster.assumed.unmapped)
    taken = step(candidate, split, task.student, settings, run.guidance, teacher, cluster)
    cached = candidate.placement == "cached"
    return Option(
        candidate,
        memory(candidate, split, task.student, settings, learned, teacher, run.guidance.distance),
        taken,
        hours=task.steps * taken.total / 3600,
        scoring=sum(scoring_hours(each, task.teacher_tokens, cluster) for each in task.teachers) if cached else 0.0,
        gpus=cluster.gpus,
        tokens_per_second=task.rows * task.tokens_per_row / taken.total / cluster.gpus,
        capacity=1e9 * cluster.gpu.memory * cluster.assumed.memory_share,
    )


def _partition(run: Run, count: int) -> Any:
    """The run's own, where it is one for so many stages."""
    asked = run.parallel.partition
    return "parameters" if isinstance(asked, tuple) and count != run.parallel.pipeline_stages else asked
