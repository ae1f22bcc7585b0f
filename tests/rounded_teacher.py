"""The training command with the teacher's losses rounded to float16, as cached ones are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vocagno import pretrain
from megatron_vocagno.batch.loader import Batch
from megatron_vocagno.engine.scoring import ReplicatedScorer

score = ReplicatedScorer.score


def rounded_score(self: ReplicatedScorer, batches: Sequence[Batch]) -> list[Tensor]:
    return [loss_BU.to(torch.float16).float() for loss_BU in score(self, batches)]


if __name__ == "__main__":
    ReplicatedScorer.score = rounded_score  # type: ignore[method-assign]
    sys.exit(pretrain.main())
