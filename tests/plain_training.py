"""Guided training without an engine: torch alone, one process, the same model, data and selection.

The second road for tests of layouts. In 16 bits: the model in bfloat16, its gradients added up in float32 over the micro-batches,
clipped, and AdamW on float32 masters, from which the model is rounded again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import TeacherIds
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.build import share_of_peak
from megatron_vocagno.engine.scoring import ReplicatedScorer
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.objective.guidance import weighted_loss
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept, select_tokens
from megatron_vocagno.run_file import load_run
from tests import tokenizers_for_tests as real


def train_plainly(path: Path, overrides: Sequence[str], settings_path: Path, half: bool) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step. half: the student in bfloat16."""
    run, settings = load_run(path, overrides), json.loads(settings_path.read_text())
    data = AlignedDataset.open(run.data.train[0].path)
    assert run.teacher[0].path is not None and run.student.config is not None and run.training.steps is not None
    cpu = torch.device("cpu")
    teacher = open_teacher(run.teacher[0].path, torch.float32, cpu)
    source = TeacherIds(data, teacher.max_positions)
    rows = TrainRows(data, run.data.row_length, run.training.seed, source, Front((real.MISTRAL_BOS,)))
    layout = Layout(settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"] // 2, 1)
    batches, scorer = Batches(rows, layout, 0), ReplicatedScorer(teacher, None, run.teacher[0].tokens_per_batch, cpu)
    g = run.guidance
    rule = Rule(g.keep, g.aggregate, g.scope, g.unmapped)

    student = Student(student_config(run.student.config, data.student_tokenizer.vocab_size), run.training.seed)
    if half:
        student.to(torch.bfloat16)
    parameters = list(student.parameters())
    masters = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = adamw(masters, settings["optimizer"]["params"])

    steps = []
    for step in range(run.training.steps):
        micro_batches = batches.step(step * layout.rows)
        kept = sum(planned_kept(b.row_mapped, b.row_unmapped, rule) for b in micro_batches)
        total = 0.0
        for master in masters:
            master.grad = torch.zeros_like(master)
        for batch, teacher_loss_BU in zip(micro_batches, scorer.score(micro_batches), strict=True):
            loss_BS = student(batch.input_BS, batch.target_BS, SelectedTokens())
            selection = select_tokens(
                loss_BS.detach(),
                teacher_loss_BU,
                batch.first_BS,
                batch.last_BS,
                batch.target_BS != IGNORE,
                rule,
            )
            loss = weighted_loss(loss_BS, selection.weight_BS, kept)
            loss.backward()
            total += loss.item()
            for master, parameter in zip(masters, parameters, strict=True):
                assert master.grad is not None and parameter.grad is not None
                master.grad += parameter.grad.float()
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters, settings["gradient_clipping"])
        for group in optimizer.param_groups:
            group["lr"] = settings["optimizer"]["params"]["lr"] * share_of_peak(run.training.schedule, run.training.steps, step)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)
        steps.append((total, norm.item()))
    return steps


def adamw(masters: Sequence[torch.Tensor], params: Mapping[str, Any]) -> torch.optim.AdamW:
    """What is no matrix does not decay."""
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": params["weight_decay"]},
        {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=params["lr"], betas=params["betas"])
