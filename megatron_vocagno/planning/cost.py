"""Seconds of a step and hours of a run: FLOPs over an assumed share of the peak, bytes over an assumed share of the bandwidth.

Nothing overlaps but what DeepSpeed hides with overlap_comm, and the gathers of a sharded teacher. The optimizer's own pass over
memory, loading, checkpoints and evaluation are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_vocagno.config import Guidance
from megatron_vocagno.planning.hardware import GPU, Assumptions
from megatron_vocagno.planning.layouts import Candidate, Stage
from megatron_vocagno.planning.memory import StudentUse, TeacherUse, element_bytes, travel_bytes
from megatron_vocagno.planning.sizes import Sizes


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    gpus: int
    """W"""
    per_node: int
    assumed: Assumptions

    def bandwidth(self, ranks: int) -> float:
        """Bytes/s that each of so many neighbouring ranks sees in a ring; one ring for each GPU of a node leaves it."""
        between = min(self.gpu.link, self.gpu.network * self.per_node)
        return 1e9 * self.assumed.link_share * (self.gpu.link if ranks <= self.per_node else between)

    def point_to_point(self) -> float:
        """Bytes/s from a stage to the next, which is on another node wherever there are several."""
        return 1e9 * self.assumed.link_share * (self.gpu.link if self.gpus <= self.per_node else self.gpu.network)

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of so many bytes in all; an all-reduce is both."""
        return size * (ranks - 1) / ranks / self.bandwidth(ranks)

    def seconds(self, flops: float, share: float) -> float:
        return flops / (1e12 * self.gpu.flops * share)


@dataclass(frozen=True)
class Step:
    """Seconds, of the slowest rank."""

    teacher: float
    student: float
    """Forward and backward passes of all micro-batches, with what a pipeline waits."""
    bubble: float
    """Share of `student` in which a stage waits, on average."""
    communication: float
    """What of it is not hidden."""
    teacher_flops: float
    student_flops: float
    """Of all ranks."""

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.communication


def learned_share(guidance: Guidance, micro_batches: int, unmapped: float) -> float:
    """Of all tokens those that the head's backward computes on a GPU: docs/performance.md."""
    if not guidance.selects or (guidance.scope == "global" and micro_batches == 1):
        return 1.0
    included = unmapped if guidance.unmapped == "include" else 0.0
    return guidance.keep * (1 - unmapped) + included


def step(
    candidate: Candidate,
    split: list[Stage],
    student: StudentUse,
    settings: dict[str, Any],
    guidance: Guidance,
    teacher: TeacherUse | None,
    cluster: Cluster,
) -> Step:
    batch, assumed, sizes = candidate.batch, cluster.assumed, student.sizes
    learned = learned_share(guidance, batch.micro_batches, assumed.unmapped)
    tokens = batch.micro_batch_rows * student.row
    # a distance between distributions takes the head's products once more
    heads = 2 if guidance.distance else 1
    passes = [_passes(stage, sizes, tokens, student.row, heads, learned, candidate.recompute) for stage in split]
    if guidance.selects and guidance.scope == "global" and batch.micro_batches > 1:
        # the losses of the whole step must be known before its first backward pass
        passes = [(2 * forward, backward) for forward, backward in passes]
    travel = 2 * tokens * sizes.hidden * element_bytes(settings) / cluster.point_to_point() if len(split) > 1 else 0.0
    seconds = [cluster.seconds(sum(work), assumed.mfu) + travel for work in passes]
    learning = sum(seconds) + (batch.micro_batches - 1) * max(seconds)
    hidden = _overlaps(candidate, settings)
    communication = max(_communication(candidate, stage, sizes, settings, cluster) for stage in split)
    scoring = (0.0, 0.0) if teacher is None else _scoring(candidate, teacher, cluster)
    return Step(
        teacher=scoring[0],
        student=learning,
        bubble=1 - batch.micro_batches * sum(seconds) / len(split) / learning,
        communication=max(0.0, communication - learning) if hidden else communication,
        teacher_flops=scoring[1],
        student_flops=sum(map(sum, passes)) * batch.micro_batches * batch.data_parallel,
    )


def _passes(
    stage: Stage, sizes: Sizes, tokens: int, row: int, heads: int, learned: float, recompute: bool
) -> tuple[float, float]:
    """FLOPs of a micro-batch: forward, and backward with what it computes again."""
    decoders = stage.decoders * sizes.layer_flops(tokens, row)
    head = stage.head * heads * sizes.head_flops(tokens)
    return decoders + head, (2 + recompute) * decoders + 3 * learned * head


def _overlaps(candidate: Candidate, settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed 0.19.8 hides traffic behind computing: by default under ZeRO-3 alone, never in a pipeline."""
    asked = (settings.get("zero_optimization") or {}).get("overlap_comm")
    return not candidate.stages and (candidate.zero == 3 if asked is None else bool(asked) and candidate.zero > 1)


def _communication(candidate: Candidate, stage: Stage, sizes: Sizes, settings: dict[str, Any], cluster: Cluster) -> float:
    """Seconds of a step's collectives over the data-parallel ranks (DeepSpeed 0.19.8)."""
    ranks, micro_batches = candidate.batch.data_parallel, candidate.batch.micro_batches
    weights = cluster.gather(element_bytes(settings) * stage.parameters(sizes), ranks)
    gradients = cluster.gather(travel_bytes(settings) * stage.parameters(sizes), ranks)
    if candidate.zero == 3:
        return micro_batches * (2 * weights + gradients)
    # all-reduced once, or with every micro-batch
    return weights + 2 * gradients * (micro_batches if candidate.zero == 2 else 1)


def _scoring(candidate: Candidate, teacher: TeacherUse, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the teacher in a step, and FLOPs of all ranks. The ranks of a pipeline share its rows."""
    if candidate.placement not in ("replicated", "zero3"):
        return 0.0, 0.0
    batch, share = candidate.batch, cluster.assumed.teacher_mfu
    rows = batch.micro_batch_rows * batch.micro_batches
    mine = math.ceil(rows / candidate.pipe)
    flops = teacher.sizes.forward_flops(teacher.row, teacher.row)
    seconds = cluster.seconds(mine * flops, share)
    if candidate.placement == "zero3":
        # every rank calls it equally often; the next layer is gathered while this one computes
        forwards = math.ceil(mine / max(1, teacher.tokens_per_batch // teacher.row))
        seconds = max(seconds, forwards * cluster.gather(teacher.weight_bytes(), cluster.gpus))
    return seconds, rows * batch.data_parallel * flops


def scoring_hours(teacher: TeacherUse, teacher_tokens: float, cluster: Cluster) -> float:
    """GPU-hours of scoring so many teacher tokens once, in windows as long as a row."""
    flops = cluster.assumed.reread * teacher.sizes.forward_flops(teacher_tokens, teacher.row)
    return cluster.seconds(flops, cluster.assumed.teacher_mfu) / 3600
