"""Guided steps of a student in the shape of TinyLlama-1.1B, with cached losses, and plain steps in the same process.

A step is 8 rows of 2,048 tokens: forward and backward in bfloat16 through the project's `Student`, gradients that add up in
float32, clipping, and AdamW on a float32 copy of the weights, as DeepSpeed's bfloat16 mode does it. If a micro-batch of 8 rows
does not fit, it is halved.

    guided        the paper's selection, from losses that are already on the device, as a cached teacher's are
    plain, tiles  all tokens, through `token_loss`
    plain, dense  all tokens, with dense logits that are upcast to float32

MFU counts 6 FLOPs per token for each parameter (apart from the input embedding), and 6 * layers * H * S per token for causal
attention. It is the same for all arms, although a guided step computes less.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from benchmarks import selection_arms
from benchmarks.gpu.record import Task
from benchmarks.gpu.timing import OUT_OF_MEMORY, Arm, Rates, Result, contest, reason
from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.model.student import Student
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens

TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TINY = TINYLLAMA | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
ROUNDS = 10
NEAR = 1e-2
"""Largest difference of the loss between tiles and dense logits, nats. Dense logits are rounded to bfloat16."""


@dataclass(frozen=True)
class Batch:
    """Rows of random tokens, with the spans and the teacher's losses of `selection_arms.inputs`."""

    input_BS: Tensor
    target_BS: Tensor
    teacher_loss_BU: Tensor
    first_BS: Tensor
    last_BS: Tensor

    @staticmethod
    def make(vocabulary: int, rows: int, width: int, device: torch.device) -> Batch:
        x = selection_arms.inputs()
        ids_BS = torch.randint(0, vocabulary, (rows, width + 1), generator=torch.Generator().manual_seed(0))
        target_BS = ids_BS[:, 1:].where(x.valid_BS[:rows, :width], IGNORE)
        tensors = ids_BS[:, :-1], target_BS, x.teacher_BU[:rows], x.first_BS[:rows, :width], x.last_BS[:rows, :width]
        return Batch(*(tensor.to(device) for tensor in tensors))

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of `rows` rows."""
        return [Batch(*parts) for parts in zip(*(tensor.split(rows) for tensor in vars(self).values()), strict=True)]

    def unguided(self) -> Batch:
        """The same without a teacher: every range is empty, and all tokens are included."""
        nowhere_BS = torch.zeros_like(self.first_BS)
        return Batch(self.input_BS, self.target_BS, self.teacher_loss_BU[:, :0], nowhere_BS, nowhere_BS)

    def planned(self) -> int:
        """The number of tokens that will have weight. Training computes it on the host."""
        valid_BS = self.target_BS != IGNORE
        mapped_BS = valid_BS & (self.first_BS < self.last_BS)
        return planned_kept(mapped_BS.sum(1).tolist(), (valid_BS & ~mapped_BS).sum(1).tolist())


Loss = Callable[[Student, Batch, int, int], Tensor]
"""(student, micro-batch, its planned tokens, those of the step) -> the loss of a micro-batch, scalar, nats."""


def selected_loss(student: Student, batch: Batch, planned: int, planned_of_step: int) -> Tensor:
    """The loss as training computes it."""
    selected = SelectedTokens()
    loss_BS = student(batch.input_BS, batch.target_BS, selected)
    selection = select_tokens(
        loss_BS.detach(),
        batch.teacher_loss_BU,
        batch.first_BS,
        batch.last_BS,
        batch.target_BS != IGNORE,
        Rule(),
        capacity=planned,
    )
    selected.set(selection.tokens_C)
    return weighted_loss(loss_BS, selection.weight_BS, planned_of_step)


def dense_loss(student: Student, batch: Batch, planned: int, planned_of_step: int) -> Tensor:
    """Plain language modeling as transformers' models compute it."""
    *body, head = student.layers
    hidden_BSH: Any = batch.input_BS
    for layer in body:
        hidden_BSH = layer(hidden_BSH)
    logits_NV = (hidden_BSH @ head.weight.T).float().flatten(0, 1)
    return F.cross_entropy(logits_NV, batch.target_BS.flatten(), ignore_index=IGNORE, reduction="sum") / planned_of_step


class Trainer:
    """A bfloat16 student, and AdamW on float32 weights."""

    def __init__(self, config: Any, device: torch.device) -> None:
        self.student = Student(config, seed=0).to(device)
        # the student gets other tensors when it is cast
        self.weights = [weight.detach() for weight in self.student.parameters()]
        self.student.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-5, fused=device.type == "cuda")

    def flops(self, tokens: int, length: int) -> float:
        """Model FLOPs of a step."""
        config = self.student.config
        embedding = config.vocab_size * config.hidden_size
        parameters = sum(weight.numel() for weight in self.weights) - embedding
        return float(tokens * (6 * parameters + 6 * config.num_hidden_layers * config.hidden_size * length))

    def step(self, loss: Loss, micro_batches: list[Batch], planned: list[int], attention: str) -> Tensor:
        """Take a step; returns the loss, on the device."""
        self.student.config._attn_implementation = attention
        total = torch.zeros((), device=self.weights[0].device)
        for batch, kept in zip(micro_batches, planned, strict=True):
            part = loss(self.student, batch, kept, sum(planned))
            part.backward()  # type: ignore[no-untyped-call]
            total += part.detach()
            self._add_gradients()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, exact in zip(self.student.parameters(), self.weights, strict=True):
                weight.copy_(exact)
        return total

    def _add_gradients(self) -> None:
        for weight, exact in zip(self.student.parameters(), self.weights, strict=True):
            assert weight.grad is not None
            exact.grad = weight.grad.float() if exact.grad is None else exact.grad.add_(weight.grad)
            weight.grad = None


def run(task: Task) -> None:
    device = torch.device(task.device)
    config = AutoConfig.for_model("llama", **(TINY if task.rehearse else TINYLLAMA))
    rows, width = (2, 32) if task.rehearse else (selection_arms.ROWS, selection_arms.WIDTH)
    batch = Batch.make(config.vocab_size, rows, width, device)
    try:
        trainer = Trainer(config, device)
    except torch.OutOfMemoryError as error:
        task.add(_case(task, rows, width), "weights", result=reason(error))
        return
    arms, sizes = [], {}
    for name, loss, x, attention in _arms(task, batch):
        found = _fitting(trainer, loss, x, attention)
        if isinstance(found, str):
            task.add(_case(task, rows, width), name, result=found, failed=found != OUT_OF_MEMORY)
            continue
        arms.append(Arm(name, found[1]))
        sizes[name] = found[0]
    _check_losses(task, trainer, batch)
    results = contest(arms, device, 1 if task.rehearse else ROUNDS, 0.7 * task.left)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    for name, result in results.items():
        _report(task, trainer, name, result, sizes[name], (rows, width), held)


def _case(task: Task, rows: int, width: int) -> str:
    return f"step of {rows} x {width:,} tokens, {'a tiny student' if task.rehearse else 'TinyLlama-1.1B'}"


def _arms(task: Task, batch: Batch) -> list[tuple[str, Loss, Batch, str]]:
    arms: list[tuple[str, Loss, Batch]] = [
        ("guided", selected_loss, batch),
        ("plain, tiles", selected_loss, batch.unguided()),
        ("plain, dense", dense_loss, batch.unguided()),
    ]
    attentions = ["sdpa"]
    if task.rehearse:
        task.note("flash-attn does not run on a CPU, so its arms are left out.")
    elif importlib.util.find_spec("flash_attn") is None:
        task.note("flash-attn is not installed, so its arms are left out.")
    else:
        attentions.append("flash_attention_2")
    return [(f"{name}, {attention}", loss, x, attention) for attention in attentions for name, loss, x in arms]


def _fitting(trainer: Trainer, loss: Loss, batch: Batch, attention: str) -> tuple[int, Callable[[], object]] | str:
    """The largest micro-batch, in rows, with which a step fits, and that step; or the reason why no step runs."""
    rows = len(batch.input_BS)
    while True:
        micro_batches = batch.split(rows)
        step = partial(trainer.step, loss, micro_batches, [x.planned() for x in micro_batches], attention)
        try:
            step()
            return rows, step
        except Exception as error:
            why = reason(error)
        # after the block: until then, the error holds the tensors of the step
        for weight in (*trainer.student.parameters(), *trainer.weights):
            weight.grad = None
        if why != OUT_OF_MEMORY or rows == 1:
            return why
        torch.cuda.empty_cache()
        rows //= 2


@torch.no_grad()
def _check_losses(task: Task, trainer: Trainer, batch: Batch) -> None:
    """Tiles and dense logits give the same plain loss of a row."""
    row = batch.unguided().split(1)[0]
    trainer.student.config._attn_implementation = "sdpa"
    tiles, dense = (float(loss(trainer.student, row, row.planned(), row.planned())) for loss in (selected_loss, dense_loss))
    apart = abs(tiles - dense)
    numbers = {"nats": tiles, "difference": apart, "tolerance": NEAR}
    task.check("plain loss of a row, by tiles and by dense logits", apart <= NEAR and tiles > 0, numbers)


def _report(
    task: Task, trainer: Trainer, name: str, result: Result | str, micro_rows: int, shape: tuple[int, int], held: int
) -> None:
    rows, width = shape
    if isinstance(result, str):
        task.add(_case(task, rows, width), name, result=result, failed=result != OUT_OF_MEMORY)
        return
    seconds, tokens = result.milliseconds / 1000, rows * width
    numbers = {"ms": result.milliseconds, "tokens/s": tokens / seconds, "rows per micro-batch": micro_rows}
    if task.device != "cpu":
        numbers["GiB"] = (held + result.memory) / 2**30
    task.add(_case(task, rows, width), name, numbers | Rates.of(task).mfu(trainer.flops(tokens, width) / seconds))
