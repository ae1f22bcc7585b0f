"""Compare all layouts of a run and order them, best first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_vocagno.config import Guidance, Parallel
from megatron_vocagno.engine.settings import DeepSpeedConfig, precision
from megatron_vocagno.planning.cost import Cluster, Step, learned_share, scoring_hours, step
from megatron_vocagno.planning.layouts import Candidate, Partition, Placement, Stage, batches, stages
from megatron_vocagno.planning.memory import Memory, StudentSpec, TeacherSpec, memory


@dataclass(frozen=True)
class Workload:
    """The parts of a run that determine its memory, FLOPs and time."""

    guidance: Guidance
    parallel: Parallel
    settings: DeepSpeedConfig
    """The DeepSpeed configuration."""
    student: StudentSpec
    teachers: tuple[TeacherSpec, ...]
    placement: Placement | None
    """The placement in the run file. None: no teacher."""
    rows: int
    """Rows of a global batch."""
    micro_batch_rows: int
    tokens_per_row: int
    """Student tokens with a target, per row."""
    tokens: float
    """Student tokens of the whole run."""
    teacher_tokens: float
    """Tokens to score once if losses are cached, per teacher."""
    sequences: tuple[int, ...] = ()
    """Numbers of ranks, above 1, that can share the student's rows."""

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.rows * self.tokens_per_row))

    @property
    def timed(self) -> bool:
        """Whether times can be estimated: the rates of the GPUs hold for 16-bit products. Bytes can always be counted."""
        return precision(self.settings) != "fp32"


@dataclass(frozen=True)
class Estimate:
    """A candidate with its memory, time and cost."""

    candidate: Candidate
    memory: Memory
    step: Step
    hours: float
    """Hours of training."""
    scoring: float
    """GPU-hours to score the data beforehand; 0 unless losses are cached."""
    gpus: int
    capacity: float
    """Bytes of a GPU's memory that tensors may use."""
    tokens_per_second: float
    """Student tokens per second and GPU."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of scoring and training."""
        return self.hours * self.gpus + self.scoring


def compare(workload: Workload, cluster: Cluster) -> list[Estimate]:
    """One estimate per layout and placement of the teacher, each with the smallest change of the run's files that fits.

    The micro-batch is halved if the run's does not divide the global batch or does not fit. Activations are recomputed if the run
    file requests it, or if a smaller micro-batch is not enough. If nothing fits, the variant with the least memory is returned.

    Order: estimates that fit come first, then the cheapest (if times are known), then the simplest.
    """
    found = list(_compared(workload, cluster, layouts(workload, cluster.gpus)))
    if not any(estimate.fits for estimate in found):
        found += _compared(workload, cluster, ((zero, 0, n) for n in workload.sequences for zero in (1, 2, 3)))
    simplest = (None, "replicated", "cached", "zero3")

    def order(estimate: Estimate) -> tuple[bool, int, int, int, int]:
        candidate = estimate.candidate
        cost = round(estimate.gpu_hours) if workload.timed else 0
        return not estimate.fits, cost, candidate.together, candidate.zero, simplest.index(candidate.placement)

    return sorted(found, key=order)


def _compared(workload: Workload, cluster: Cluster, wanted: Iterable[tuple[int, int, int]]) -> Iterator[Estimate]:
    for zero, count, sequence in wanted:
        for placement in placements(workload):
            variants = list(_variants(workload, cluster, zero, count, sequence, placement))
            if variants:
                fitting = (variant for variant in variants if variant.fits)
                yield next(fitting, min(variants, key=lambda variant: variant.memory.total))


def configured_layout(workload: Workload, cluster: Cluster, zero: int) -> Estimate | None:
    """The run exactly as its files describe it. None if its micro-batch does not divide the global batch on this many GPUs."""
    parallel = workload.parallel
    variants = _variants(workload, cluster, zero, parallel.pipeline_stages, parallel.sequence, workload.placement)
    first = next(variants, None)
    return first if first and first.candidate.batch.micro_batch_rows == workload.micro_batch_rows else None


def layouts(workload: Workload, gpus: int) -> Iterator[tuple[int, int, int]]:
    """(ZeRO stage, pipeline stages, ranks that share each row) to compare. The run's own numbers are included."""
    for sequence in sorted({1, workload.parallel.sequence}):
        yield from ((zero, 0, sequence) for zero in (1, 2, 3))
    if workload.guidance.distance:  # not supported in a pipeline
        return
    for count in sorted({2, 4, 8, workload.parallel.pipeline_stages} - {0}):
        if gpus % count == 0 and count <= workload.student.sizes.layers:
            yield 1, count, 1


def placements(workload: Workload) -> tuple[Placement | None, ...]:
    """Placements of the teacher to compare."""
    if not workload.teachers:
        return (None,)
    if workload.guidance.distance:
        return ("replicated",)
    return ("replicated", "zero3", "cached") if len(workload.teachers) == 1 else ("cached",)


def _variants(
    workload: Workload, cluster: Cluster, zero: int, count: int, sequence: int, placement: Placement | None
) -> Iterator[Estimate]:
    """Ways to run one layout, the smallest change of the run's files first."""
    together = max(1, count) * sequence
    if cluster.gpus % together:
        return
    recomputes = (True,) if workload.parallel.activation_checkpointing else (False, True)
    for batch in batches(workload.rows, cluster.gpus // together, workload.micro_batch_rows, sequence):
        for recompute in recomputes:
            yield estimate(workload, cluster, Candidate(zero, count, batch, recompute, placement))


def estimate(workload: Workload, cluster: Cluster, candidate: Candidate) -> Estimate:
    guidance, student = workload.guidance, workload.student
    split: list[Stage] = (
        stages(student.sizes, candidate.stages, _partition(workload.parallel, candidate.stages))
        if candidate.stages
        else [Stage(student.sizes.layers, embedding=True, head=True)]
    )
    teacher = workload.teachers[0] if workload.teachers else None
    settings = {**workload.settings, "zero_optimization": {**workload.settings["zero_optimization"], "stage": candidate.zero}}
    learned = learned_share(guidance, candidate.batch.micro_batches, cluster.assumed.unmapped)
    taken = step(candidate, split, student, settings, guidance, teacher, cluster)
    cached = candidate.placement == "cached"
    return Estimate(
        candidate,
        memory(candidate, split, student, settings, learned, teacher, guidance.distance),
        taken,
        hours=workload.steps * taken.total / 3600,
        scoring=sum(scoring_hours(each, workload.teacher_tokens, cluster) for each in workload.teachers) if cached else 0.0,
        gpus=cluster.gpus,
        tokens_per_second=workload.rows * workload.tokens_per_row / taken.total / cluster.gpus,
        capacity=1e9 * cluster.gpu.memory * cluster.assumed.memory_share,
    )


def _partition(parallel: Parallel, count: int) -> Partition:
    """The run's partition, unless it lists the layers of another number of stages."""
    listed = isinstance(parallel.partition, tuple)
    return "parameters" if listed and count != parallel.pipeline_stages else parallel.partition
