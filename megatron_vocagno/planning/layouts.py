"""The layouts that a plan compares: how a student and a global batch are distributed over ranks and pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Literal

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.errors import RunError
from megatron_vocagno.planning.sizes import Sizes

Placement = Literal["replicated", "zero3", "cached"]
Partition = Literal["parameters", "uniform"] | tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """One way to run: a layout and a placement of the teacher."""

    zero: int
    """ZeRO stage."""
    stages: int
    """Number of pipeline stages. 0: no pipeline."""
    batch: Layout
    recompute: bool
    """Whether activations are recomputed in the backward pass (activation checkpointing)."""
    placement: Placement | None
    """None: no teacher."""

    @property
    def name(self) -> str:
        if self.stages:
            return f"{self.stages} stage{'s' * (self.stages > 1)}"
        return f"ZeRO-{self.zero}" + (f", {self.batch.sequence} per row" if self.batch.sequence > 1 else "")

    @property
    def together(self) -> int:
        """Ranks that read the same rows: those of a pipeline, or those that share rows."""
        return max(1, self.stages) * self.batch.sequence

    @property
    def replicas(self) -> int:
        """Ranks that have the same layers."""
        return self.batch.data_parallel * self.batch.sequence


@dataclass(frozen=True)
class Stage:
    """The layers of one pipeline stage. Without a pipeline, one stage has all layers."""

    decoders: int
    embedding: bool
    head: bool

    def parameters(self, sizes: Sizes) -> int:
        """Parameters of the stage. A tied head on another stage than the embedding is a copy, so it counts."""
        copies = self.embedding + self.head - (self.embedding and self.head and sizes.tied)
        final_norm = self.head * sizes.hidden
        return self.decoders * sizes.params_per_layer + copies * sizes.embedding + final_norm


def batches(rows: int, ranks: int, largest: int, sequence: int = 1) -> Iterator[Layout]:
    """Ways to split a global batch of `rows` rows over data-parallel ranks.

    ranks     number of those that read different rows
    largest   rows per micro-batch of the first result. It is halved for each further one as long as it is even, and sizes that do
              not divide the batch are skipped. For example, 512 rows on 256 ranks with largest = 4 give micro-batches of 2 and of
              1 row
    sequence  see Layout
    """
    micro = largest
    while micro:
        if rows % (micro * ranks) == 0:
            yield Layout(micro, rows // (micro * ranks), ranks, sequence)
        if micro % 2:
            return
        micro //= 2


def stages(sizes: Sizes, count: int, partition: Partition = "parameters") -> list[Stage]:
    """Distribute the layers over `count` stages. Raises RunError if a partition in numbers does not match the model."""
    if isinstance(partition, tuple):
        if len(partition) != count or sum(partition) != sizes.layers:
            raise RunError(
                f"parallel.partition lists {len(partition)} stages with {sum(partition)} decoder layers in total, "
                f"but there are {count} stages and {sizes.layers} layers"
            )
        return [Stage(n, i == 0, i == count - 1) for i, n in enumerate(partition)]
    # embedding, decoder layers, norm, head
    weights = (sizes.embedding, *[sizes.params_per_layer] * sizes.layers, sizes.hidden, sizes.embedding)
    cuts = balanced(weights, count) if partition == "parameters" else equal(len(weights), count)
    last = len(weights) - 1
    return [Stage(len(range(max(1, begin), min(end, sizes.layers + 1))), begin == 0, end > last) for begin, end in pairwise(cuts)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Cut a list into contiguous parts whose sums differ as little as possible, as DeepSpeed does.

    Returns parts + 1 borders. For example, [1, 1, 2] in 2 parts gives [0, 2, 3]. parts must not exceed the number of weights.
    """
    sums = [0, *accumulate(weights)]

    @cache
    def best(end: int, left: int) -> tuple[int, int, tuple[int, ...]]:
        """The first `end` weights in `left` parts: the largest sum, the smallest sum, the borders."""
        if left == 1:
            return sums[end], sums[end], (0, end)
        options = []
        for begin in range(end - 1, left - 2, -1):
            heaviest, lightest, borders = best(begin, left - 1)
            part = sums[end] - sums[begin]
            options.append((max(heaviest, part), min(lightest, part), (*borders, end)))
        return min(options, key=lambda option: option[0] - option[1])

    return list(best(len(weights), parts)[2])


def equal(items: int, parts: int) -> list[int]:
    """Borders of parts with equally many items. If the division leaves a remainder, the first parts have one item more."""
    size, left = divmod(items, parts)
    return [i * size + min(i, left) for i in range(parts + 1)]
