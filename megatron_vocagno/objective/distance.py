"""Distance between a student's and a teacher's distribution, per token. The baselines `uld` and `kld` add it to the loss.

    uld    sum_r |sort(p_S)_r - sort(p_T)_r|    the shorter one padded with zeros, for any two vocabularies. Between 0 and 2
    kld    sum_v p_T[v] log(p_T[v] / p_S[v])    for one vocabulary, nats

Distributions are float32 (float64 if the inputs are float64). They are computed for a tile of tokens at a time, so [N, V] and [N,
W] are never stored. The backward pass computes each tile again. No gradient reaches the teacher.

N tokens, V and W the two vocabularies, H the hidden size of the respective model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["uld", "kld"]

CPU_TILE_BYTES, GPU_TILE_BYTES = 40 * 2**20, 256 * 2**20
"""Size of a tile's logits, of both models together. The computation takes a few times as much. A smaller tile reads both heads,
and adds to the gradient of the student's head, more often.
"""


def compared(first_BS: Tensor, last_BS: Tensor) -> Tensor:
    """Which student targets are compared with a teacher distribution, that of the first teacher token of their range.

    first_BS, last_BS  [B, S] int, teacher targets of the row, half-open. first == last if unmapped
    returns            [B, S] bool

    Both models must predict from the same text. If the first teacher token of a target's range also belongs to an earlier target,
    the teacher's prediction starts before the target does, and the target is not compared. Earlier tokens that are unmapped or
    are not targets of the row are unknown here. At most the first mapped target of a row is compared for this reason although it
    should not be.

    Student [sel][ection], teacher [select][ion]: `ection` starts inside a teacher token.

    >>> compared(torch.tensor([[0, 0]]), torch.tensor([[1, 2]]))
    tensor([[ True, False]])
    """
    reached_BS = last_BS.cummax(1).values.roll(1, 1)
    reached_BS[:, :1] = 0
    return (first_BS < last_BS) & (first_BS >= reached_BS)


@dataclass(frozen=True)
class Reference:
    """Predictions of a teacher at N of a student's targets."""

    kind: Kind
    tokens_N: Tensor
    """[N] int64, positions b * S + s, each at most once."""
    hidden_NH: Tensor
    """[N, H], the teacher's hidden states that predict the targets."""
    head_WH: Tensor
    """[W, H], the part of the teacher's head for the ids of its tokenizer. A model's head may be larger."""
    softcap: float | None
    """c, if the teacher's logits are c * tanh(logits / c)."""
    vocabulary: int
    """V, the number of ids of the student's tokenizer. For `kld`, V == W."""


def distance(hidden_NH: Tensor, head_VH: Tensor, softcap: float | None, reference: Reference, tile: int | None = None) -> Tensor:
    """Distance between the student's and the teacher's distribution for each token (docs/method.md, Distances between
    distributions).

    hidden_NH, head_VH  [N, H], [V or more, H], of one dtype: the student's, in the order of reference.tokens_N
    softcap             c, if the student's logits are c * tanh(logits / c)
    tile                tokens per tile. By default as many as fit into CPU_TILE_BYTES or GPU_TILE_BYTES. It affects rounding only
    returns             [N] float32 (float64 if the inputs are float64). In nats for kld. N may be 0

    Raises ValueError: `kld` of two vocabularies, or a student's head that is smaller than its tokenizer's vocabulary.

    >>> teacher = Reference("uld", torch.tensor([0]), torch.tensor([[1.0]]), torch.tensor([[9.0], [-9.0]]), None, vocabulary=2)
    >>> distance(torch.tensor([[1.0]]), torch.tensor([[0.0], [0.0]]), None, teacher)
    tensor([1.])
    """
    V, W = reference.vocabulary, len(reference.head_WH)
    if len(head_VH) < V:
        raise ValueError(f"distance: the tokenizer has {V:,} ids, the student's head {len(head_VH):,}: do they belong together?")
    if reference.kind == "kld" and V != W:
        raise ValueError(f"distance: kld needs one vocabulary, the student has {V:,} ids, the teacher {W:,}: use uld")
    if tile is None:
        budget = CPU_TILE_BYTES if hidden_NH.device.type == "cpu" else GPU_TILE_BYTES
        tile = max(1, budget // (4 * (V + W)))
    distance_N: Tensor = _Distance.apply(hidden_NH, head_VH, softcap, reference, tile)  # type: ignore[no-untyped-call]
    return distance_N


def uld(student_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """[N, V], [N, W] logits -> [N], 0 to 2: compares probabilities by rank, independently of the tokens (Boizard et al., arXiv
    2402.12030).

    Probabilities of two thirds and one third, in either order, against certainty:

    >>> student_NV = torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]).log()
    >>> uld(student_NV, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).log())
    tensor([0.6667, 0.6667])
    """
    student_NV, teacher_NW = (logits.softmax(1).sort(1, descending=True).values for logits in (student_NV, teacher_NW))
    longer = max(student_NV.shape[1], teacher_NW.shape[1])
    student_NR, teacher_NR = (F.pad(sorted_, (0, longer - sorted_.shape[1])) for sorted_ in (student_NV, teacher_NW))
    return (student_NR - teacher_NR).abs().sum(1)


def kld(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """[N, V] logits twice -> [N], nats: KL(p_T || p_S).

    >>> kld(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1308])
    """
    student_NV, teacher_NV = student_NV.log_softmax(1), teacher_NV.log_softmax(1)
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(1)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, softcap: float | None, reference: Reference, tile: int) -> Tensor:
        # the whole head: a slice would keep memory alive that ZeRO-3 frees between the two passes
        ctx.save_for_backward(hidden_NH, head_VH)
        ctx.options = softcap, reference, tile
        distance_N = hidden_NH.new_empty(len(hidden_NH), dtype=_exact(hidden_NH))
        for part, student_TV, teacher_TW in _tiles(hidden_NH, head_VH, reference, tile):
            distance_N[part] = _between(student_TV, teacher_TW, softcap, reference)
        return distance_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, head_VH = ctx.saved_tensors
        softcap, reference, tile = ctx.options
        dhidden_NH = torch.empty_like(hidden_NH)
        # added up over tiles: in 16 bits, the contributions of later tiles would be lost
        dhead_VH = torch.zeros_like(head_VH, dtype=_exact(head_VH))
        for part, student_TV, teacher_TW in _tiles(hidden_NH, head_VH, reference, tile):
            student_TV.requires_grad_()
            with torch.enable_grad():
                distance_T = _between(student_TV, teacher_TW, softcap, reference)
            dlogits_TV = torch.autograd.grad(distance_T, student_TV, gradients[0][part])[0].to(head_VH.dtype)
            dhidden_NH[part] = _product(dlogits_TV, head_VH[: reference.vocabulary]).to(hidden_NH.dtype)
            dhead_VH[: reference.vocabulary] += _product(dlogits_TV.T, hidden_NH[part])
        return dhidden_NH, dhead_VH.to(head_VH.dtype), None, None, None


def _between(student_TV: Tensor, teacher_TW: Tensor, softcap: float | None, reference: Reference) -> Tensor:
    """[T], from logits before the softcap."""
    measure = uld if reference.kind == "uld" else kld
    return measure(_capped(student_TV, softcap), _capped(teacher_TW, reference.softcap))


def _tiles(hidden_NH: Tensor, head_VH: Tensor, reference: Reference, tile: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(tokens, the student's logits [T, V], the teacher's [T, W]). The last tile may be shorter."""
    head_HV, head_HW = head_VH[: reference.vocabulary].T, reference.head_WH.T
    for begin in range(0, len(hidden_NH), tile):
        part = slice(begin, begin + tile)
        yield part, _product(hidden_NH[part], head_HV), _product(reference.hidden_NH[part], head_HW)


def _capped(logits_TV: Tensor, softcap: float | None) -> Tensor:
    return logits_TV if softcap is None else softcap * (logits_TV / softcap).tanh()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, or in float64 if the factors are float64. The caller rounds the result once."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == _exact(a):
            return a @ b
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
