"""FLOPs and bytes of the head's loss, counted from the algorithms. docs/performance/appendix.md has them for two heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.gpu.timing import Work
from megatron_vocagno.objective.linear_ce import GPU_TILE_BYTES


@dataclass(frozen=True)
class Head:
    name: str
    tokens: int
    size: int
    vocabulary: int

    @property
    def product(self) -> float:
        """FLOPs of hidden @ head^T."""
        return 2.0 * self.tokens * self.size * self.vocabulary

    def __str__(self) -> str:
        return f"{self.name}: N {self.tokens:,}, H {self.size:,}, V {self.vocabulary:,}"


TINYLLAMA = Head("TinyLlama", 16_384, 2048, 32_000)
QWEN_7B = Head("Qwen2.5-Math-7B", 16_384, 3584, 152_064)


def tiles_work(head: Head, kept: float | None, itemsize: int = 2) -> Work:
    """Work of this project's tiles. `kept` is the share of tokens in the backward, or None for a forward only.

    Forward: one product. Its float32 tiles are written and read once, and it reads all hidden states for each tile.

    Backward, for the kept tokens: the same product again, then the gradient of each tile, which is written once and read by two
    products. The gradient of the head is written once. The gradient of the hidden states is a float32 product per tile: it is
    written, and read again to be added to the sum, which is read and written.
    """
    n, h, v = head.tokens, head.size, head.vocabulary
    forward = _tiles(n, v) * itemsize * n * h + itemsize * v * h + 8 * n * v
    if kept is None:
        return Work(head.product, forward)
    rows = kept * n
    backward = _tiles(rows, v) * (2 * itemsize + 4 * 4) * rows * h + 3 * itemsize * v * h + (8 + 3 * itemsize) * rows * v
    return Work((1 + 3 * kept) * head.product, forward + backward)


def _tiles(rows: float, vocabulary: int) -> int:
    return math.ceil(vocabulary * rows * 4 / GPU_TILE_BYTES)


def dense_work(head: Head, learns: bool, itemsize: int = 2) -> Work:
    """Work of dense logits: 16-bit and float32 logits, their log-softmax, and in the backward a gradient of each of the three."""
    n, h, v = head.tokens, head.size, head.vocabulary
    forward = itemsize * (n + v) * h + (2 * itemsize + 3 * 4) * n * v
    if not learns:
        return Work(head.product, forward)
    return Work(3 * head.product, forward + (5 * 4 + 3 * itemsize) * n * v + itemsize * (2 * n + 2 * v) * h)
