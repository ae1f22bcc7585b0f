"""The training steps that `benchmarks.step` compares.

    guided   the project's step: teacher's losses, student's losses, selection, weighted loss, backward, AdamW
    cached   the same with given teacher losses
    naive    the teacher's dense logits and their cross-entropy, then `clm`
    clm      plain language modeling with dense logits: transformers' own model, F.cross_entropy, AdamW
    floor    not a training step, but the products that every such step must compute: both bodies, forward and (student's)
             backward, the head's products of all tokens forward and of the kept tokens again, the two products of the kept
             tokens' gradients, and AdamW. Products are written into preallocated memory, and no logit is processed

All arms have the same weights and read the same batches. Each function opens its models and returns its step. Step k uses batch
k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vocagno.batch.loader import IGNORE, Batch, Batches, Layout, TrainRows
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.model.folder import PretrainedWeights
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import Teacher, open_teacher
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens

KEEP = 0.4
TILE = 2048
"""Columns of the floor's products."""

Step: TypeAlias = Callable[[int], None]
M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Case:
    """Two models on disk, and the rows that they read."""

    student: Path
    teacher: Path
    dtype: torch.dtype
    """Dtype of the teacher. The student is float32."""
    dataset: Path
    rows: int
    """Rows per batch."""
    row_length: int
    steps: int


@dataclass(frozen=True)
class Inputs:
    """A batch as both models read it: B rows, S student positions, U teacher positions."""

    batch: Batch
    teacher_input_BU: Tensor
    teacher_target_BU: Tensor
    kept: int
    """Number of tokens that will have weight."""


def inputs_of(case: Case) -> list[Inputs]:
    rows = TrainRows(AlignedDataset.open(case.dataset), case.row_length, seed=0)
    batches = Batches(rows, Layout(case.rows, 1, 1), rank=0)
    return [_inputs(batches.step(k * case.rows)[0]) for k in range(case.steps)]


def _inputs(batch: Batch) -> Inputs:
    inputs, targets = ([torch.from_numpy(row).long() for row in rows] for rows in (batch.teacher_inputs, batch.teacher_targets))
    return Inputs(
        batch,
        pad_sequence(inputs, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORE),
        planned_kept(batch.row_mapped, batch.row_unmapped, Rule(keep=KEEP)),
    )


def _teacher(case: Case) -> Teacher:
    return _read(open_teacher(case.teacher, case.dtype, "cpu"))


def _read(model: M) -> M:
    """Read all weights, because only the pages of a mapped file that were read count as memory."""
    for weight in model.parameters():
        weight.detach().sum()
    return model


def _optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


# ---- guided steps


def guided(case: Case) -> Step:
    teacher = _teacher(case)
    learn = _learner(case)
    inputs = inputs_of(case)

    def step(k: int) -> None:
        learn(inputs[k], teacher.loss(inputs[k].teacher_input_BU, inputs[k].teacher_target_BU))

    return step


def cached(case: Case) -> Step:
    inputs = inputs_of(case)
    losses = _teacher_losses(_teacher(case), inputs)
    learn = _learner(case)
    return lambda k: learn(inputs[k], losses[k])


def _teacher_losses(teacher: Teacher, inputs: list[Inputs]) -> list[Tensor]:
    return [teacher.loss(x.teacher_input_BU, x.teacher_target_BU) for x in inputs]


def _student(case: Case) -> Student:
    student = Student(AutoConfig.from_pretrained(case.student, attn_implementation="sdpa"), seed=0)
    student.load(PretrainedWeights(case.student))
    return student


def _learner(case: Case) -> Callable[[Inputs, Tensor], None]:
    student = _student(case)
    optimizer = _optimizer(student)

    def learn(inputs: Inputs, teacher_loss_BU: Tensor) -> None:
        batch, selected = inputs.batch, SelectedTokens()
        loss_BS = student(batch.input_BS, batch.target_BS, selected)
        selection = select_tokens(
            loss_BS.detach(),
            teacher_loss_BU,
            batch.first_BS,
            batch.last_BS,
            batch.target_BS != IGNORE,
            Rule(keep=KEEP),
            capacity=inputs.kept,
        )
        selected.set(selection.tokens_C)
        optimizer.zero_grad()
        weighted_loss(loss_BS, selection.weight_BS, inputs.kept).backward()
        optimizer.step()

    return learn


# ---- dense logits


def naive(case: Case) -> Step:
    teacher = _hugging_face(case.teacher, case.dtype)
    learn = clm(case)
    inputs = inputs_of(case)

    def step(k: int) -> None:
        with torch.no_grad():
            logits_BUW = teacher(input_ids=inputs[k].teacher_input_BU, use_cache=False).logits
            _dense_loss(logits_BUW, inputs[k].teacher_target_BU, "none")
        del logits_BUW
        learn(k)

    return step


def clm(case: Case) -> Step:
    student = _hugging_face(case.student, torch.float32)
    optimizer = _optimizer(student)
    inputs = inputs_of(case)

    def step(k: int) -> None:
        batch = inputs[k].batch
        loss = _dense_loss(student(input_ids=batch.input_BS, use_cache=False).logits, batch.target_BS, "mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _dense_loss(logits_BSV: Tensor, target_BS: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), target_BS.flatten(), ignore_index=IGNORE, reduction=reduction)


def _hugging_face(folder: Path, dtype: torch.dtype) -> Any:
    return _read(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True))


# ---- the floor


def floor(case: Case) -> Step:
    teacher = _teacher(case)
    student = _student(case)
    optimizer = _optimizer(student)
    inputs = inputs_of(case)
    positions = max(max(x.batch.input_BS.numel(), x.teacher_input_BU.numel()) for x in inputs)
    scratch = torch.zeros(positions * TILE, dtype=case.dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out=scratch[: len(left) * right.shape[1]].view(len(left), -1))

    def step(k: int) -> None:
        with torch.no_grad():
            hidden_BUH = teacher.decoder(input_ids=inputs[k].teacher_input_BU, use_cache=False).last_hidden_state
            for head_TH in _slices(teacher.head.weight):
                product(hidden_BUH.flatten(0, 1), head_TH.T)
        *body, head = student.layers
        hidden_BSH = inputs[k].batch.input_BS
        for layer in body:
            hidden_BSH = layer(hidden_BSH)
        optimizer.zero_grad()
        with torch.no_grad():
            dhidden_BSH, head.weight.grad = _head_products(hidden_BSH, head.weight, inputs[k].kept, product)
        hidden_BSH.backward(dhidden_BSH)
        optimizer.step()

    return step


def _head_products(
    hidden_BSH: Tensor, head_VH: Tensor, kept: int, product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Tensors in the shapes of the gradients of hidden states and head. The first `kept` tokens stand for the kept tokens."""
    hidden_NH = hidden_BSH.flatten(0, 1)
    dhidden_NH, dhead_VH = torch.zeros_like(hidden_NH), torch.empty_like(head_VH)
    for head_TH in _slices(head_VH):
        product(hidden_NH, head_TH.T)
    for head_TH, dhead_TH in zip(_slices(head_VH), _slices(dhead_VH), strict=True):
        dlogits_RT = product(hidden_NH[:kept], head_TH.T)
        dhidden_NH[:kept].addmm_(dlogits_RT, head_TH)
        torch.mm(dlogits_RT.T, hidden_NH[:kept], out=dhead_TH)
    return dhidden_NH.view_as(hidden_BSH), dhead_VH


def _slices(head_VH: Tensor) -> Iterator[Tensor]:
    for begin in range(0, len(head_VH), TILE):
        yield head_VH[begin : begin + TILE]
