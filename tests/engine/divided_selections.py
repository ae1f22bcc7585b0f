"""A program of four ranks: two groups of data-parallel ranks, in each of which two ranks share rows.

Argument: a folder. Each rank writes the losses, weights and gradients of its part of all CASES.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.config import Guidance
from megatron_vocagno.engine.loss import GuidedObjective, LossInputs
from megatron_vocagno.engine.processes import start, stop
from megatron_vocagno.engine.sequence import RowParts, divide_ranks
from megatron_vocagno.objective.linear_ce import SelectedTokens

GROUPS, SHARING, ROWS, WIDTH = 2, 2, 3, 24
CASES = [
    (scope, unit, weighting, unmapped, seed)
    for scope, unit, weighting, unmapped in itertools.product(
        ("sequence", "microbatch", "global"),
        ("token", "chunk"),
        ("top_k", "threshold", "control_variate"),
        ("include", "exclude"),
    )
    for seed in range(3)
]


class Rows(NamedTuple):
    """Of all data-parallel ranks."""

    loss_BS: Tensor
    inputs: LossInputs


def make_rows(seed: int) -> Rows:
    """Losses with few different values, so that many tie. Spans of two random tokenizations of one text."""
    random = np.random.default_rng(seed)
    total, text = GROUPS * ROWS, 3 * WIDTH
    teacher_width = 2 * WIDTH // 3
    first, last = np.zeros((total, WIDTH), np.int32), np.zeros((total, WIDTH), np.int32)
    for b in range(total):
        student, teacher = (np.sort(random.choice(np.arange(1, text), n - 1, False)) for n in (WIDTH, teacher_width))
        begin, end = np.append(0, student), np.append(student, text)
        first[b], last[b] = np.searchsorted(teacher, begin, "right"), np.searchsorted(teacher, end - 1, "right") + 1
        empty = random.random(WIDTH) < 0.1
        last[b, empty] = first[b, empty]
    levels = (2, 16, 10_000)[seed % 3]
    loss_BS, teacher_BU = (torch.from_numpy(random.integers(0, levels, (total, n)) / 8) for n in (WIDTH, teacher_width))
    teacher_BU[random.random(teacher_BU.shape) < 0.05] = torch.nan
    target_BS = torch.from_numpy(np.where(random.random((total, WIDTH)) < 0.1, IGNORE, 1))
    inputs = LossInputs(
        target_BS,
        teacher_BU.float(),
        torch.from_numpy(first),
        torch.from_numpy(last),
        torch.tensor([7.0]),
        torch.empty(total * WIDTH, 0),
        target_BS != IGNORE,
    )
    return Rows(loss_BS.float(), inputs)


def of_group(inputs: LossInputs, group: int) -> LossInputs:
    """The rows of one data-parallel rank."""
    rows = slice(group * ROWS, (group + 1) * ROWS)
    divided = {name: getattr(inputs, name)[rows] for name in ("target_BS", "teacher_loss_BU", "first_BS", "last_BS", "text_BS")}
    return inputs._replace(**divided)


def guidance(scope: Any, unit: Any, weighting: Any, unmapped: Any) -> Guidance:
    return Guidance(scope=scope, unit=unit, weighting=weighting, unmapped=unmapped)


def learn(objective: GuidedObjective, loss_BP: Tensor, inputs: LossInputs) -> dict[str, Tensor]:
    """The loss, its gradient, the tokens that the backward pass would compute, and the sums of the statistics."""
    leaf, selected = loss_BP.clone().requires_grad_(), SelectedTokens()
    loss = objective(leaf, inputs, selected)
    loss.backward()
    assert leaf.grad is not None and selected.tokens_R is not None
    return {"loss": loss.detach(), "gradient": leaf.grad, "tokens": selected.tokens_R, "stats": objective._stats.clone()}


def main(folder: Path) -> None:
    processes = start()
    parts, group = divide_ranks(SHARING)
    results = []
    for *rule, seed in CASES:
        rows, mine = make_rows(seed), processes.rank // SHARING
        objective = GuidedObjective(guidance(*rule), processes.device, group, parts=parts)
        inputs = of_group(rows.inputs, mine)
        loss_BP = parts.part(rows.loss_BS[mine * ROWS : (mine + 1) * ROWS])
        results.append(learn(objective, loss_BP, inputs))
        if rule[0] == "global":
            # a step of two micro-batches: the weights are those of one selection over both
            with objective.recording_losses() as recorded:
                learn_nothing(objective, loss_BP, parts)
            results[-1]["preselected"] = objective.preselect(recorded, [inputs])[0].weight_BS
    torch.save(results, folder / f"rank{processes.rank}.pt")
    stop()


def learn_nothing(objective: GuidedObjective, loss_BP: Tensor, parts: RowParts) -> None:
    objective(loss_BP, make_rows(0).inputs, SelectedTokens())
    assert objective._recorded is not None and objective._recorded[0].shape == (ROWS, WIDTH) and parts.ranks == SHARING


if __name__ == "__main__":
    main(Path(sys.argv[1]))
