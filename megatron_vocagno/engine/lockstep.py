"""A sharded teacher for ranks that work independently: each rank reads its own texts, and a forward gathers weights from all.

Before a forward, the ranks count those that have one. A rank without work runs an empty forward whenever another rank has one,
until no rank has work.
"""

from __future__ import annotations

import traceback

import torch
from deepspeed import comm as dist
from torch import Tensor

from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.engine.placement import ShardedTeacher


class LockstepTeacher:
    """Scores as the sharded teacher does. Each rank calls `loss` as often as it likes, and then `finish` once."""

    def __init__(self, teacher: ShardedTeacher, device: torch.device) -> None:
        self.teacher, self.device = teacher, device

    def loss(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        """[B, U] float32, nats: see model.teacher.Teacher.loss. Collective, together with the other ranks' `loss` or `finish`.

        Exits if the forward fails, for example because memory is full. The launcher then ends the other ranks.
        """
        self._working(1)
        try:
            return self.teacher.loss(input_BU, target_BU, segment_BU)
        except BaseException as error:
            traceback.print_exc()
            raise SystemExit(1) from error

    def finish(self) -> None:
        """Take part in the forwards of other ranks until all have called this."""
        nothing_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        while self._working(0):
            self.teacher.loss(nothing_11, torch.full_like(nothing_11, IGNORE))

    def _working(self, mine: int) -> int:
        """The number of ranks that have a forward now."""
        working = torch.tensor(mine, device=self.device)
        dist.all_reduce(working)
        return int(working)
