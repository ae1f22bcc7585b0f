"""Bytes on the fullest rank of a layout. docs/clusters.md has the formulas, tests/planning holds them to what is measured.

P parameters of the stage, D data-parallel ranks, W ranks, N tokens of a micro-batch, R of them learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_vocagno.objective.distance import Kind
from megatron_vocagno.objective.linear_ce import GPU_TILE_BYTES
from megatron_vocagno.planning.layouts import Candidate, Stage
from megatron_vocagno.planning.sizes import Sizes
from megatron_vocagno.planning.trace import Held, student_layer, teacher_layer

ADAM_BYTES = 12
"""Of a parameter: its float32 copy and two moments (DeepSpeed 0.19.8 with AdamW, any ZeRO stage)."""
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""Elements: DeepSpeed 0.19.8's defaults of reduce_bucket_size and stage3_max_live_parameters."""


@dataclass(frozen=True)
class Memory:
    """Bytes. The first six last as long as a step; of the others the largest counts, as they follow each other."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """DeepSpeed's buckets for gradients, and under ZeRO-3 the parameters that it holds gathered."""
    teacher: int
    activations: int
    """Kept for the backward pass, of all micro-batches on their way."""
    layer: int
    """While a decoder layer's backward pass runs."""
    head: int
    """While the loss and its backward pass run: tiles of logits, and gradients of hidden states and head."""
    scoring: int
    """While the teacher runs; nothing of the student's activations is there then."""
    reduction: int
    """While gradients travel after the last backward pass."""

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer + self.buffers + self.teacher
        return states + max(self.activations + max(self.layer, self.head), self.scoring, self.reduction)


def fullest(memories: list[Memory]) -> Memory:
    return max(memories, key=lambda memory: memory.total)


# ---- parameters, gradients, optimizer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    reduction: int


def states(parameters: int, largest: int, zero: int, ranks: int, settings: dict[str, Any]) -> States:
    """What DeepSpeed holds of so many parameters.

    largest   parameters of the largest tensor: one that no bucket takes travels by itself
    ranks     data-parallel ones, D
    settings  the DeepSpeed configuration
    """
    width, sums = element_bytes(settings), accumulation_bytes(settings)
    options = settings.get("zero_optimization") or {}
    share = -(-parameters // ranks)
    elements = int(options.get("reduce_bucket_size", REDUCE_BUCKET))
    bucket = width * (elements + (largest if largest > elements else 0))
    optimizer = ADAM_BYTES * share
    if zero == 1 and sums > width:
        # 16-bit gradients of a micro-batch beside their float32 sums, which are rounded once more to travel
        copies = 0 if travel_bytes(settings) == sums else travel_bytes(settings) * parameters
        return States(width * parameters, (width + sums) * parameters, optimizer, 0, copies)
    if zero == 1:
        return States(width * parameters, width * parameters, optimizer, bucket, 0)
    if zero == 2:
        return States(width * parameters, sums * share, optimizer, bucket * (2 if options.get("overlap_comm") else 1), 0)
    live = width * min(parameters, int(options.get("stage3_max_live_parameters", LIVE_PARAMETERS)))
    return States(width * share, sums * share, optimizer, bucket + live, 0)


def element_bytes(settings: dict[str, Any]) -> int:
    """Of a weight while it computes."""
    halves = ("bf16", "bfloat16", "fp16")
    return 2 if any((settings.get(key) or {}).get("enabled") for key in halves) else 4


def accumulation_bytes(settings: dict[str, Any]) -> int:
    """Of a gradient that adds up over micro-batches."""
    dtype = (settings.get("data_types") or {}).get("grad_accum_dtype")
    return 4 if dtype == "fp32" else element_bytes(settings)


def travel_bytes(settings: dict[str, Any]) -> int:
    """Of a gradient between ranks."""
    return 4 if settings.get("communication_data_type") == "fp32" else element_bytes(settings)


# ---- activations ---------------------------------------------------------------------------------------------------


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at most: one forward, one backward (1F1B)."""
    return min(stages - stage, micro_batches)


def kept_activations(held: Held, hidden: int, decoders: int, flying: int, piped: bool, recompute: bool) -> tuple[int, int]:
    """Bytes that are kept, and bytes that a layer's backward pass takes beside them.

    hidden  bytes of one micro-batch's hidden states
    """
    kept = flying * decoders * (hidden if recompute else held.saved)
    if piped:
        # what came in and what went out, for each micro-batch on its way, and the gradient that arrives
        kept += (2 * flying + 1) * hidden
    return kept, held.peak if recompute else held.peak - held.saved


def head_bytes(tokens: int, learned: int, sizes: Sizes, width: int) -> int:
    """At most at once from the final norm to the gradient of the head. width: bytes of an element."""
    hidden = tokens * sizes.hidden * width
    # the norm: a float32 copy, its result before and after the weight, a number a token; the loss: target, peak and sum
    kept = 4 * tokens * sizes.hidden + 2 * hidden + (4 + 16) * tokens
    forward = _tile(tokens, sizes.vocabulary)
    # beside the tile its gradient in 16 bits; the learned hidden states, their float32 gradient, a product that is added to it
    tile = _tile(learned, sizes.vocabulary)
    backward = tile + (tile // 2 if width == 2 else 0) + learned * sizes.hidden * (width + 8)
    return kept + max(forward, backward) + width * sizes.embedding


TILES_AT_ONCE = {"uld": 6.5, "kld": 4.5}
"""Of both models' logits, while a distance and its gradient are computed: at most so many, as an allocator had it."""


def distance_bytes(kind: Kind, tokens: int, student: Sizes, teacher: Sizes, width: int) -> int:
    """At most at once beside the loss, where distributions are compared: objective.distance. width: bytes of an element."""
    hidden = tokens * width * (2 * student.hidden + teacher.hidden)
    # the head's gradient adds up in float32, and so does what a tile brings
    heads = 2 * 4 * student.embedding
    logits = 4 * (student.vocabulary + teacher.vocabulary)
    return hidden + heads + round(TILES_AT_ONCE[kind] * min(max(GPU_TILE_BYTES, logits), tokens * logits))


def _tile(rows: int, vocabulary: int) -> int:
    """Bytes of a tile of float32 logits, as objective.linear_ce cuts it."""
    columns = max(GPU_TILE_BYTES // 4 // max(rows, 1) // 128 * 128, 128)
    return 4 * rows * min(columns, vocabulary)


# ---- the two models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StudentUse:
    """The model that learns, and the rows it reads."""

    config: PretrainedConfig
    sizes: Sizes
    row: int
    """Tokens of a row."""


@dataclass(frozen=True, eq=False)
class TeacherUse:
    """A frozen model, and how it reads."""

    config: PretrainedConfig
    sizes: Sizes
    dtype: torch.dtype
    quantised: bool
    """Matrices of the decoder have one byte."""
    tokens_per_batch: int
    row: int
    """Teacher tokens of a row."""

    def weight_bytes(self) -> int:
        quantised = self.quantised * self.sizes.layers * self.sizes.matrices
        return (self.sizes.parameters - quantised) * self.dtype.itemsize + quantised

    def resident(self, candidate: Candidate) -> int:
        """Bytes of it on each rank."""
        if candidate.placement == "replicated":
            return self.weight_bytes()
        if candidate.placement != "zero3":
            return 0
        live = min(self.sizes.parameters, LIVE_PARAMETERS) * self.dtype.itemsize
        return -(-self.weight_bytes() // (candidate.batch.data_parallel * candidate.pipe)) + live

    def scoring(self) -> int:
        """Bytes while it runs."""
        rows = max(1, self.tokens_per_batch // self.row)
        tokens = rows * self.row
        head = tokens * self.sizes.hidden * self.dtype.itemsize + _tile(tokens, self.sizes.vocabulary)
        return max(_reading(self, rows), head)


@cache
def _reading(teacher: TeacherUse, rows: int) -> int:
    return teacher_layer(teacher.config, rows, teacher.row, teacher.dtype)


@cache
def _learning(student: StudentUse, rows: int, dtype: torch.dtype) -> Held:
    return student_layer(student.config, rows, student.row, dtype)


# ---- all of it -----------------------------------------------------------------------------------------------------


def memory(
    candidate: Candidate,
    split: list[Stage],
    student: StudentUse,
    settings: dict[str, Any],
    learned: float,
    teacher: TeacherUse | None,
    kind: Kind | None = None,
) -> Memory:
    """Of the rank that needs most.

    learned  share of the tokens whose head gradient is computed
    kind     of the distance that is learned besides the loss
    """
    width, batch = element_bytes(settings), candidate.batch
    dtype = torch.bfloat16 if width == 2 else torch.float32
    held, sizes = _learning(student, batch.micro_batch_rows, dtype), student.sizes
    tokens = batch.micro_batch_rows * student.row
    mine = teacher if candidate.placement in ("replicated", "zero3") else None
    distance = distance_bytes(kind, tokens, sizes, mine.sizes, width) if kind and mine else 0
    memories = []
    for place, stage in enumerate(split):
        state = states(stage.parameters(sizes), sizes.embedding, candidate.zero, batch.data_parallel, settings)
        kept, layer = kept_activations(
            held,
            tokens * sizes.hidden * width,
            stage.decoders,
            in_flight(place, len(split), batch.micro_batches),
            len(split) > 1,
            candidate.recompute,
        )
        memories.append(
            Memory(
                weights=state.weights,
                gradients=state.gradients,
                optimizer=state.optimizer,
                buffers=state.buffers,
                teacher=mine.resident(candidate) if mine else 0,
                activations=kept,
                layer=layer,
                head=head_bytes(tokens, round(learned * tokens), sizes, width) + distance if stage.head else 0,
                scoring=mine.scoring() if mine else 0,
                reduction=state.reduction,
            )
        )
    return fullest(memories)
