"""The training command with the objective as one would write it from the paper: whole logits, and one token after the other."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vocagno import pretrain
from megatron_vocagno.engine import loss
from megatron_vocagno.model import student
from megatron_vocagno.objective.rule import Rule, Selection
from megatron_vocagno.objective.statistics import STATS
from tests.objective import plain


def token_loss(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, **_: object) -> Tensor:
    return F.cross_entropy(hidden_NH.float() @ head_VH.float().T, target_N, reduction="none", ignore_index=-100)


def select_tokens(
    student_BS: Tensor, teacher_BU: Tensor, first_BS: Tensor, last_BS: Tensor, valid_BS: Tensor, rule: Rule, *, capacity: int
) -> Selection:
    spans = [zip(*rows, strict=True) for rows in zip(first_BS.tolist(), last_BS.tolist(), strict=True)]
    guides = [
        [plain.guide(losses, first, last, rule.aggregate) for first, last in row]
        for losses, row in zip(teacher_BU.tolist(), spans, strict=True)
    ]
    assert rule.scope == "microbatch"
    weights, _ = plain.weights(student_BS.tolist(), guides, valid_BS.tolist(), str(rule.keep), "microbatch", rule.unmapped, False)
    weight_BS = torch.tensor(weights, dtype=torch.float32)
    nothing = torch.zeros(1, len(STATS), dtype=torch.float64)
    return Selection(weight_BS, torch.tensor(guides), weight_BS.flatten().nonzero().squeeze(1), nothing)


if __name__ == "__main__":
    loss.token_loss = student.token_loss = token_loss  # type: ignore[assignment]
    loss.select_tokens = select_tokens  # type: ignore[assignment]
    sys.exit(pretrain.main())
