"""Chunks: the shortest stretches of text that both tokenizers cut alike. The losses of both models over a chunk can be compared.

    text       u n b e l i e v a b l y ␣ s o
    student    [un][believ][ably][ so]
    teacher    [unbelievably][ so]
    chunks     0   0       0      1

    L_S(c) = sum of l_S[i] over the student tokens of the chunk      -log p_S of its text
    L_T(c) = sum of l_T[j] over its teacher tokens                   -log p_T of the same text
    D(c)   = L_S(c) - L_T(c)                                         the excess, -log of p_S / p_T

A mapped token opens a chunk if its first teacher token is its own: first[i] >= last of the mapped token before it. A chunk has
the teacher tokens from the first of its first token to the last of its last token. A token without text (first == last) belongs
to no chunk and ends none.

A chunk is compared only if all of it is known. It is unmapped if one of its tokens is not valid, or if one of its teacher losses
is NaN. If a row's edge cuts a chunk, its tokens must be unmapped in the ranges (`batch.whole_chunks` does this): the losses that
are missing cannot be seen here.

Sums are per chunk, in float64, and rounded once. They are never differences of a sum over the row. B rows, S student positions, U
teacher positions. `selection_triton` computes the same on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """The chunks of B rows."""

    chunk_BS: Tensor
    """[B, S] int64, the chunk of a token, counted over all rows. -1 if the token is unmapped."""
    first_C: Tensor
    last_C: Tensor
    """[C] int64, the teacher positions of each chunk, half-open."""
    opens_BS: Tensor
    """[B, S] bool, whether a token is the first one of its chunk."""


def find_chunks(first_BS: Tensor, last_BS: Tensor) -> Chunks:
    """first_BS, last_BS: [B, S] int, teacher positions, half-open. Raises ValueError if the ranges of a row are not ascending.

    The student's second and third token share a teacher token. The fourth one has no text:

    >>> chunks = find_chunks(torch.tensor([[0, 1, 1, 0, 2]]), torch.tensor([[1, 2, 2, 0, 3]]))
    >>> chunks.chunk_BS, chunks.last_C
    (tensor([[ 0,  1,  1, -1,  2]]), tensor([1, 2, 3]))
    """
    mapped_BS = first_BS < last_BS
    reach_BS = last_BS.long().where(mapped_BS, torch.iinfo(torch.int64).min)
    before_BS = torch.cat([torch.full_like(reach_BS[:, :1], torch.iinfo(torch.int64).min), reach_BS.cummax(1).values[:, :-1]], 1)
    begin_BS = first_BS.long().where(mapped_BS, torch.iinfo(torch.int64).min)
    if bool(((begin_BS < begin_BS.cummax(1).values) | (reach_BS < before_BS)).logical_and_(mapped_BS).any()):
        raise ValueError("find_chunks: expected ascending ranges in a row, but a range begins or ends before an earlier one")
    opens_BS = mapped_BS & (first_BS >= before_BS)
    chunk_BS = (opens_BS.flatten().cumsum(0) - 1).view_as(opens_BS).masked_fill(~mapped_BS, -1)
    first_C = first_BS[opens_BS].long()
    last_C = torch.zeros_like(first_C)
    last_C.scatter_reduce_(0, chunk_BS[mapped_BS], last_BS[mapped_BS].long(), "amax")
    return Chunks(chunk_BS, first_C, last_C, opens_BS)


def compare_chunks(
    student_BS: Tensor, teacher_BU: Tensor, first_BS: Tensor, last_BS: Tensor, valid_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The excess of each token's chunk, the guide of each token, and which tokens open a chunk. All [B, S].

    student_BS  [B, S] float32, nats
    teacher_BU  [B, U] float, nats
    returns     excess, float32: NaN if a token has no chunk or a loss of the chunk is NaN. guide, float32, as in Selection.
                opens, bool

    A chunk in which the student has a NaN is mapped, but has no excess.

    >>> student_BS, teacher_BU = torch.tensor([[0.5, 0.5, 1.5]]), torch.tensor([[1.0, 4.0]])
    >>> compare_chunks(student_BS, teacher_BU, torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2, 2]]), student_BS > 0)[:2]
    (tensor([[-0.5000, -2.0000, -2.0000]]), tensor([[1., 2., 2.]]))
    """
    chunks = find_chunks(first_BS, last_BS)
    mapped_BS, count = chunks.chunk_BS >= 0, len(chunks.first_C)
    if not count:
        nothing_BS = torch.full_like(student_BS, torch.nan)
        return nothing_BS, nothing_BS.clone(), chunks.opens_BS
    of_token_M = chunks.chunk_BS[mapped_BS]

    def total(values_M: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=values_M.device).index_add_(0, of_token_M, values_M.double())

    student_C, tokens_C = total(student_BS[mapped_BS]), total(torch.ones_like(student_BS[mapped_BS]))
    invalid_C = total((~valid_BS)[mapped_BS].float()) > 0
    row_C = torch.arange(len(first_BS), device=first_BS.device).repeat_interleave(chunks.opens_BS.sum(1))
    teacher_C = _range_sums(teacher_BU, row_C, chunks.first_C, chunks.last_C).masked_fill_(invalid_C, torch.nan)
    excess_C = student_C.float() - teacher_C.float()
    guide_C = teacher_C.float() / tokens_C.float()

    def spread(values_C: Tensor) -> Tensor:
        return torch.full_like(student_BS, torch.nan).masked_scatter_(mapped_BS, values_C[of_token_M])

    return spread(excess_C), spread(guide_C), chunks.opens_BS


def _range_sums(loss_BU: Tensor, row_C: Tensor, first_C: Tensor, last_C: Tensor) -> Tensor:
    """[C] float64: the sum of loss_BU[row, first:last] for each chunk. The ranges do not overlap."""
    width_C = last_C - first_C
    of_loss_L = torch.arange(len(width_C), device=width_C.device).repeat_interleave(width_C)
    begin_C = width_C.cumsum(0) - width_C
    position_L = torch.arange(len(of_loss_L), device=width_C.device) - (begin_C - first_C)[of_loss_L]
    sums_C = torch.zeros(len(width_C), dtype=torch.float64, device=width_C.device)
    return sums_C.index_add_(0, of_loss_L, loss_BU[row_C[of_loss_L], position_L].double())
