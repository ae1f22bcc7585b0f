"""How a student and a batch are dealt to so many ranks: the layouts that are compared, and the stages of a pipeline."""

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
    """One way to run."""

    zero: int
    stages: int
    """0: no pipeline."""
    batch: Layout
    recompute: bool
    """Activation checkpointing."""
    placement: Placement | None
    """None: no teacher."""

    @property
    def name(self) -> str:
        return f"{self.stages} stage{'s' * (self.stages > 1)}" if self.stages else f"ZeRO-{self.zero}"

    @property
    def pipe(self) -> int:
        return max(1, self.stages)


@dataclass(frozen=True)
class Stage:
    """What one stage of a pipeline holds; without a pipeline, all."""

    decoders: int
    embedding: bool
    head: bool

    def parameters(self, sizes: Sizes) -> int:
        """A head that is tied to the embedding is a copy of it on another stage, and the same tensor on one."""
        copies = self.embedding + self.head - (self.embedding and self.head and sizes.tied)
        return self.decoders * sizes.decoder + copies * sizes.embedding + self.head * sizes.hidden  # the norm before the head


def batches(rows: int, ranks: int, largest: int) -> Iterator[Layout]:
    """A global batch of `rows` rows for so many data-parallel ranks: the asked-for micro-batch, then halves of it."""
    micro = largest
    while micro:
        if rows % (micro * ranks) == 0:
            yield Layout(micro, rows // (micro * ranks), ranks)
        if micro % 2:
            return
        micro //= 2


def stages(sizes: Sizes, count: int, partition: Partition = "parameters") -> list[Stage]:
    """What each of `count` stages holds. Raises RunError for a list that is not this model's."""
    if isinstance(partition, tuple):
        if len(partition) != count or sum(partition) != sizes.layers:
            raise RunError(
                f"parallel.partition names {len(partition)} stages with {sum(partition)} decoder layers together; "
                f"there are {count} stages, and {sizes.layers} layers"
            )
        return [Stage(n, i == 0, i == count - 1) for i, n in enumerate(partition)]
    # embedding, decoders, norm, head
    weights = (sizes.embedding, *[sizes.decoder] * sizes.layers, sizes.hidden, sizes.embedding)
    cuts = balanced(weights, count) if partition == "parameters" else equal(len(weights), count)
    last = len(weights) - 1
    return [Stage(len(range(max(1, begin), min(end, sizes.layers + 1))), begin == 0, end > last) for begin, end in pairwise(cuts)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Where to cut a list into `parts` neighbours that differ as little as they can: parts + 1 borders, as DeepSpeed cuts.

    parts: not more than weights.
    """
    sums = [0, *accumulate(weights)]

    @cache
    def best(end: int, left: int) -> tuple[int, int, tuple[int, ...]]:
        """Of the first `end` weights in `left` parts: the heaviest, the lightest, the borders."""
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
    """Where to cut so many items into parts of equal length; the first ones take what is left over."""
    size, left = divmod(items, parts)
    return [i * size + min(i, left) for i in range(parts + 1)]
