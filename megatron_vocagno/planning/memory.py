"""Bytes on the fullest rank of a layout. docs/clusters.md has the formulas; tests/planning compares them with measurements.

P: parameters of the stage. D: ranks that have the same layers. W: all ranks. N: tokens of a micro-batch on one rank. R: tokens
with a head gradient.
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
from megatron_vocagno.planning.trace import LayerMemory, student_layer_memory, teacher_layer_peak

ADAM_BYTES = 12
"""Bytes per parameter: a float32 copy and two moments (DeepSpeed 0.19.8 with AdamW, any ZeRO stage)."""
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""Elements: the defaults of reduce_bucket_size and stage3_max_live_parameters in DeepSpeed 0.19.8."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The parts up to `teacher` are held during the complete step. `total` combines the others."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """DeepSpeed's gradient buckets. Under ZeRO-3 also the gathered parameters."""
    teacher: int
    activations: int
    """Saved for the backward pass, for all micro-batches in flight."""
    layer: int
    """Temporary memory of one decoder layer's backward pass."""
    head: int
    """Temporary memory of the loss and its backward pass: tiles of logits, gradients of the hidden states and of the head."""
    scoring: int
    """Temporary memory of the teacher's forward pass. The student's activations do not exist at that time."""
    reduction: int
    """Temporary memory of the gradient reduction after the last backward pass."""

    @property
    def total(self) -> int:
        """Bytes at the peak: the backward pass, scoring and the reduction follow each other, so the largest counts."""
        states = self.weights + self.gradients + self.optimizer + self.buffers + self.teacher
        return states + max(self.activations + max(self.layer, self.head), self.scoring, self.reduction)


def fullest(memories: list[Memory]) -> Memory:
    return max(memories, key=lambda memory: memory.total)


# ---- parameters, gradients, optimizer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """Bytes of one rank's model states."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    reduction: int


def states(parameters: int, largest: int, zero: int, ranks: int, settings: dict[str, Any]) -> States:
    """The model states that DeepSpeed holds on each rank.

    parameters  P, of the stage
    largest     elements of the largest tensor. A tensor that is larger than a bucket is sent on its own.
    zero        ZeRO stage
    ranks       D
    settings    the DeepSpeed configuration
    """
    width, sums = element_bytes(settings), accumulation_bytes(settings)
    options = settings.get("zero_optimization") or {}
    share = -(-parameters // ranks)
    elements = int(options.get("reduce_bucket_size", REDUCE_BUCKET))
    bucket = width * (elements + (largest if largest > elements else 0))
    optimizer = ADAM_BYTES * share
    if zero == 1 and sums > width:
        # 16-bit gradients of a micro-batch next to their float32 sums; the sums are copied to 16 bits before they are sent
        copies = 0 if travel_bytes(settings) == sums else travel_bytes(settings) * parameters
        return States(width * parameters, (width + sums) * parameters, optimizer, 0, copies)
    if zero == 1:
        return States(width * parameters, width * parameters, optimizer, bucket, 0)
    if zero == 2:
        return States(width * parameters, sums * share, optimizer, bucket * (2 if options.get("overlap_comm") else 1), 0)
    live = width * min(parameters, int(options.get("stage3_max_live_parameters", LIVE_PARAMETERS)))
    return States(width * share, sums * share, optimizer, bucket + live, 0)


def element_bytes(settings: dict[str, Any]) -> int:
    """Bytes per weight in the forward and backward passes."""
    halves = ("bf16", "bfloat16", "fp16")
    return 2 if any((settings.get(key) or {}).get("enabled") for key in halves) else 4


def accumulation_bytes(settings: dict[str, Any]) -> int:
    """Bytes per gradient that is accumulated over micro-batches."""
    dtype = (settings.get("data_types") or {}).get("grad_accum_dtype")
    return 4 if dtype == "fp32" else element_bytes(settings)


def travel_bytes(settings: dict[str, Any]) -> int:
    """Bytes per gradient that is sent between ranks."""
    return 4 if settings.get("communication_data_type") == "fp32" else element_bytes(settings)


# ---- activations ---------------------------------------------------------------------------------------------------


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """The most micro-batches whose activations a stage holds at once, in the 1F1B schedule. stage: its index."""
    return min(stages - stage, micro_batches)


def kept_activations(
    layer: LayerMemory, hidden: int, decoders: int, flying: int, piped: bool, recompute: bool
) -> tuple[int, int]:
    """Bytes of the saved activations, and temporary bytes of one layer's backward pass.

    hidden    bytes of the hidden states of one micro-batch
    decoders  decoder layers of the stage
    flying    micro-batches in flight
    piped     whether the stage is part of a pipeline
    """
    kept = flying * decoders * (hidden if recompute else layer.saved)
    if piped:
        # the input and the output of each micro-batch in flight, and the gradient that is received
        kept += (2 * flying + 1) * hidden
    return kept, layer.peak if recompute else layer.peak - layer.saved


def head_bytes(tokens: int, learned: int, sizes: Sizes, width: int) -> int:
    """The most bytes alive at once from the final norm to the gradient of the head. width: bytes per element."""
    hidden = tokens * sizes.hidden * width
    # the norm: a float32 copy, the result before and after the weight, one number per token
    # the loss, per token: target, maximum and sum
    kept = 4 * tokens * sizes.hidden + 2 * hidden + (4 + 16) * tokens
    forward = _tile(tokens, sizes.vocabulary)
    # the tile and its 16-bit gradient; the selected hidden states, their float32 gradient, and a product that is added to it
    tile = _tile(learned, sizes.vocabulary)
    backward = tile + (tile // 2 if width == 2 else 0) + learned * sizes.hidden * (width + 8)
    return kept + max(forward, backward) + width * sizes.embedding


TILES_AT_ONCE = {"uld": 6.5, "kld": 4.5}
"""The most tiles of both models' logits alive at once while a distance and its gradient are computed, as measured."""


def distance_bytes(kind: Kind, tokens: int, student: Sizes, teacher: Sizes, width: int) -> int:
    """The most bytes alive at once for a distance between distributions, in addition to the loss. width: bytes per element.

    See objective.distance.
    """
    hidden = tokens * width * (2 * student.hidden + teacher.hidden)
    # the head's gradient and the contribution of a tile, both in float32
    heads = 2 * 4 * student.embedding
    logits = 4 * (student.vocabulary + teacher.vocabulary)
    return hidden + heads + round(TILES_AT_ONCE[kind] * min(max(GPU_TILE_BYTES, logits), tokens * logits))


def _tile(rows: int, vocabulary: int) -> int:
    """Bytes of a tile of float32 logits in objective.linear_ce."""
    columns = max(GPU_TILE_BYTES // 4 // max(rows, 1) // 128 * 128, 128)
    return 4 * rows * min(columns, vocabulary)


# ---- the two models ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StudentSpec:
    """The student and the length of its rows."""

    config: PretrainedConfig
    sizes: Sizes
    row_length: int
    """Tokens per row."""


@dataclass(frozen=True, eq=False)
class TeacherSpec:
    """A teacher and how it runs."""

    config: PretrainedConfig
    sizes: Sizes
    dtype: torch.dtype
    quantized: bool
    """Whether the linear layers of the decoder take one byte per parameter."""
    tokens_per_batch: int
    """Tokens per forward pass."""
    row_length: int
    """Teacher tokens per row."""

    @property
    def rows_per_batch(self) -> int:
        """Rows per forward pass."""
        return max(1, self.tokens_per_batch // self.row_length)

    def weight_bytes(self) -> int:
        quantized = self.quantized * self.sizes.layers * self.sizes.matmul_params_per_layer
        return (self.sizes.parameters - quantized) * self.dtype.itemsize + quantized

    def resident(self, candidate: Candidate) -> int:
        """Bytes of the teacher's weights on each rank."""
        if candidate.placement == "replicated":
            return self.weight_bytes()
        if candidate.placement != "zero3":
            return 0
        live = min(self.sizes.parameters, LIVE_PARAMETERS) * self.dtype.itemsize
        return -(-self.weight_bytes() // (candidate.batch.data_parallel * candidate.together)) + live

    def scoring(self) -> int:
        """Temporary bytes of a forward pass."""
        tokens = self.rows_per_batch * self.row_length
        head = tokens * self.sizes.hidden * self.dtype.itemsize + _tile(tokens, self.sizes.vocabulary)
        return max(_teacher_peak(self), head)


@cache
def _teacher_peak(teacher: TeacherSpec) -> int:
    return teacher_layer_peak(teacher.config, teacher.rows_per_batch, teacher.row_length, teacher.dtype)


@cache
def _student_memory(student: StudentSpec, rows: int, dtype: torch.dtype, sequence: int) -> LayerMemory:
    return student_layer_memory(student.config, rows, student.row_length, dtype, sequence)


# ---- the sum ------------------------------------------------------------------------------------------------------


def memory(
    candidate: Candidate,
    split: list[Stage],
    student: StudentSpec,
    settings: dict[str, Any],
    learned: float,
    teacher: TeacherSpec | None,
    kind: Kind | None = None,
) -> Memory:
    """Memory of the fullest rank.

    split     the pipeline stages; one without a pipeline
    settings  the DeepSpeed configuration
    learned   share of tokens whose head gradient is computed
    kind      the distance that the student learns in addition to its loss, if any
    """
    width, batch = element_bytes(settings), candidate.batch
    dtype = torch.bfloat16 if width == 2 else torch.float32
    layer, sizes = _student_memory(student, batch.micro_batch_rows, dtype, batch.sequence), student.sizes
    tokens = batch.micro_batch_rows * student.row_length // batch.sequence
    online = teacher if candidate.placement in ("replicated", "zero3") else None
    distance = distance_bytes(kind, tokens, sizes, online.sizes, width) if kind and online else 0
    memories = []
    for place, stage in enumerate(split):
        state = states(stage.parameters(sizes), sizes.embedding, candidate.zero, candidate.replicas, settings)
        activations, temporary = kept_activations(
            layer,
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
                teacher=online.resident(candidate) if online else 0,
                activations=activations,
                layer=temporary,
                head=head_bytes(tokens, round(learned * tokens), sizes, width) + distance if stage.head else 0,
                scoring=online.scoring() if online else 0,
                reduction=state.reduction,
            )
        )
    return fullest(memories)
