"""Estimate the seconds per step and the hours of a run.

Time is FLOPs divided by an assumed share of the peak rate, plus bytes divided by an assumed share of the bandwidth. Communication
overlaps with computation only if DeepSpeed's overlap_comm is on, and in the gathers of a sharded teacher. The optimizer's memory
traffic, loading, checkpoints and evaluation are not included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_vocagno.config import Guidance
from megatron_vocagno.planning.hardware import GPU, Assumptions
from megatron_vocagno.planning.layouts import Candidate, Stage
from megatron_vocagno.planning.memory import StudentSpec, TeacherSpec, element_bytes, travel_bytes
from megatron_vocagno.planning.sizes import Sizes


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    gpus: int
    """W, on all nodes."""
    per_node: int
    assumed: Assumptions

    def bandwidth(self, ranks: int) -> float:
        """Bytes/s of each rank in a ring of `ranks` neighbors. Each GPU of a node belongs to one ring that leaves the node."""
        between = min(self.gpu.link, self.gpu.network * self.per_node)
        return 1e9 * self.assumed.link_share * (self.gpu.link if ranks <= self.per_node else between)

    def point_to_point(self) -> float:
        """Bytes/s between two pipeline stages. If there are several nodes, the stages are on different nodes."""
        return 1e9 * self.assumed.link_share * (self.gpu.link if self.gpus <= self.per_node else self.gpu.network)

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes in total. An all-reduce takes twice as long."""
        return size * (ranks - 1) / ranks / self.bandwidth(ranks)

    def seconds(self, flops: float, share: float) -> float:
        """Seconds of `flops` on one GPU at this share of the peak rate."""
        return flops / (1e12 * self.gpu.flops * share)


@dataclass(frozen=True)
class Step:
    """The time of one step on the slowest rank, in seconds."""

    teacher: float
    student: float
    """Forward and backward passes of all micro-batches, including the waiting time of a pipeline."""
    bubble: float
    """Share of `student` in which a stage waits, averaged over the stages."""
    communication: float
    """Communication that does not overlap with computation."""
    teacher_flops: float
    """FLOPs of the teacher on all ranks."""
    student_flops: float
    """FLOPs of the student on all ranks."""

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.communication


def learned_share(guidance: Guidance, micro_batches: int, unmapped: float) -> float:
    """Share of tokens for which the head's backward pass is computed on a GPU: docs/performance.md."""
    if not guidance.ranks or (guidance.scope == "global" and micro_batches == 1):
        return 1.0
    included = unmapped if guidance.unmapped == "include" else 0.0
    return guidance.keep * (1 - unmapped) + included


def step(
    candidate: Candidate,
    split: list[Stage],
    student: StudentSpec,
    settings: dict[str, Any],
    guidance: Guidance,
    teacher: TeacherSpec | None,
    cluster: Cluster,
) -> Step:
    """Estimate one step of a candidate.

    split     the pipeline stages; one without a pipeline
    settings  the DeepSpeed configuration
    """
    batch, assumed, sizes = candidate.batch, cluster.assumed, student.sizes
    learned = learned_share(guidance, batch.micro_batches, assumed.unmapped)
    tokens = batch.micro_batch_rows * student.row_length // batch.sequence
    # a distance between distributions computes the head's products a second time
    heads = 2 if guidance.distance else 1
    passes = [_passes(stage, sizes, tokens, student.row_length, heads, learned, candidate.recompute) for stage in split]
    twice = guidance.selects and guidance.scope == "global" and batch.micro_batches > 1
    if twice:
        # the selection needs the losses of all micro-batches before the first backward pass, so each forward pass runs twice
        passes = [(2 * forward, backward) for forward, backward in passes]
    travel = 2 * tokens * sizes.hidden * element_bytes(settings) / cluster.point_to_point() if len(split) > 1 else 0.0
    seconds = [cluster.seconds(sum(work), assumed.mfu) + travel for work in passes]
    learning = sum(seconds) + (batch.micro_batches - 1) * max(seconds)
    exchanged = (2 + candidate.recompute + twice) * _exchange(tokens, sizes, batch.sequence, element_bytes(settings), cluster)
    overlapped = _overlaps(candidate, settings)
    communication = max(_communication(candidate, stage, sizes, settings, cluster) for stage in split)
    scoring = (0.0, 0.0) if teacher is None else _scoring(candidate, teacher, cluster)
    return Step(
        teacher=scoring[0],
        student=learning,
        bubble=1 - batch.micro_batches * sum(seconds) / len(split) / learning,
        communication=(max(0.0, communication - learning) if overlapped else communication) + batch.micro_batches * exchanged,
        teacher_flops=scoring[1],
        student_flops=sum(map(sum, passes)) * batch.micro_batches * candidate.replicas,
    )


def _passes(
    stage: Stage, sizes: Sizes, tokens: int, row_length: int, heads: int, learned: float, recompute: bool
) -> tuple[float, float]:
    """FLOPs of one micro-batch: forward, and backward including recomputation. heads: how often the logits are computed."""
    decoders = stage.decoders * sizes.layer_flops(tokens, row_length)
    head = stage.head * heads * sizes.head_flops(tokens)
    return decoders + head, (2 + recompute) * decoders + 3 * learned * head


def _exchange(tokens: int, sizes: Sizes, ranks: int, width: int, cluster: Cluster) -> float:
    """Seconds of the all-to-alls of one pass through all layers, for queries, keys, values and results. Nothing overlaps.

    tokens  of one rank
    ranks   number of those that share each row
    width   bytes per element
    """
    # if there are fewer key heads than ranks, they are copied
    copies = max(1, ranks * sizes.head_width // sizes.key_width)
    size = width * tokens * sizes.layers * 2 * (sizes.attention_width + copies * sizes.key_width)
    return size * (ranks - 1) / ranks / cluster.bandwidth(ranks)


def _overlaps(candidate: Candidate, settings: dict[str, Any]) -> bool:
    """Whether DeepSpeed 0.19.8 overlaps communication with computation: by default only under ZeRO-3, never in a pipeline."""
    asked = (settings.get("zero_optimization") or {}).get("overlap_comm")
    return not candidate.stages and (candidate.zero == 3 if asked is None else bool(asked) and candidate.zero > 1)


def _communication(candidate: Candidate, stage: Stage, sizes: Sizes, settings: dict[str, Any], cluster: Cluster) -> float:
    """Seconds per step of the collectives over the ranks that have the same layers (DeepSpeed 0.19.8).

    With W bytes of weights, G bytes of gradients and m micro-batches, a step sends W + 2 G under ZeRO-1 (all-reduce and gather),
    W + 2 m G under ZeRO-2 and m (2 W + G) under ZeRO-3 (gather for forward and for backward, then reduce-scatter).
    """
    ranks, micro_batches = candidate.replicas, candidate.batch.micro_batches
    weights = cluster.gather(element_bytes(settings) * stage.parameters(sizes), ranks)
    gradients = cluster.gather(travel_bytes(settings) * stage.parameters(sizes), ranks)
    if candidate.zero == 3:
        return micro_batches * (2 * weights + gradients)
    # gradients are all-reduced once, or under ZeRO-2 with every micro-batch
    return weights + 2 * gradients * (micro_batches if candidate.zero == 2 else 1)


def _scoring(candidate: Candidate, teacher: TeacherSpec, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the teacher per step, and its FLOPs on all ranks. The ranks that read the same rows divide them."""
    if candidate.placement not in ("replicated", "zero3"):
        return 0.0, 0.0
    batch, share = candidate.batch, cluster.assumed.teacher_mfu
    rows = batch.micro_batch_rows * batch.micro_batches
    rows_per_rank = math.ceil(rows / candidate.together)
    flops = teacher.sizes.forward_flops(teacher.row_length, teacher.row_length)
    seconds = cluster.seconds(rows_per_rank * flops, share)
    if candidate.placement == "zero3":
        # all ranks run the same number of forward passes; a layer is gathered while the one before it computes
        forwards = math.ceil(rows_per_rank / teacher.rows_per_batch)
        seconds = max(seconds, forwards * cluster.gather(teacher.weight_bytes(), cluster.gpus))
    return seconds, rows * batch.data_parallel * flops


def scoring_hours(teacher: TeacherSpec, teacher_tokens: float, cluster: Cluster) -> float:
    """GPU-hours to score `teacher_tokens` tokens once, in windows as long as a row."""
    flops = cluster.assumed.reread * teacher.sizes.forward_flops(teacher_tokens, teacher.row_length)
    return cluster.seconds(flops, cluster.assumed.teacher_mfu) / 3600
