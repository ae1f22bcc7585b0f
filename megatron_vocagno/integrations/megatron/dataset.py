"""Rows of an aligned dataset in the form of Megatron's GPTDataset, and with them the stored losses of the teacher.

    tokens, labels, position_ids   [S] int64, as in GPTDataset. labels[i] is the token after tokens[i]
    loss_mask                      [S] float32, 1 for a label, 0 for the prefix and the padding
    token_guide or chunk_guide     [S] float32, the teacher's losses of the row's units, in nats. The name is that of the unit
    first, last                    [S] int32, guide[first:last] is the unit of a label; first == last if the label is unmapped

A unit is a token or a chunk (docs/method.md). A row has at most as many units as labels, so all tensors have S elements, and
Megatron's collation and its fixed shapes hold. They are the arguments of `objective.select_tokens`, so every unit, weighting and
scope works with them.

Row i is a pure function of the dataset, the seed and i. Megatron's sequential sampler reads row i as sample i, so a restart
continues with the row after the last consumed sample, in any layout.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_vocagno.batch.cached import CachedLosses, CombinedGuides
from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, Batch, TrainRows, collate
from megatron_vocagno.batch.pack import TeacherSource
from megatron_vocagno.batch.whole_chunks import CombinedChunks, WholeChunks
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_ids
from megatron_vocagno.corpus.losses import require_unchanged, unscored
from megatron_vocagno.errors import RunError, tool
from megatron_vocagno.objective.rule import Rule, Unit


class AlignedGPTDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows without a teacher, to evaluate the student.

    >>> rows = AlignedGPTDataset("data/mine", seq_length=32, samples=8, vocabulary=32_000, seed=0)
    >>> row = rows[0]
    >>> list(row), int(row["loss_mask"].sum()), row["tokens"].tolist()[1:4] == row["labels"].tolist()[:3]
    (['tokens', 'labels', 'loss_mask', 'position_ids'], 14, False)
    """

    def __init__(self, path: str | Path, seq_length: int, samples: int, vocabulary: int, seed: int) -> None:
        """
        path        an aligned dataset
        seq_length  S, the positions of a row: Megatron's --seq-length
        samples     number of rows that the run reads. There is no end: each epoch has another order
        vocabulary  rows of the model's embedding: Megatron's padded vocabulary
        seed        of the order

        Each row begins with the ids that the student's tokenizer puts in front of a text.

        Raises DatasetError if there is no dataset, RunError if it does not fit the model or has no row.
        """
        self.data = AlignedDataset.open(path)
        self.seq_length, self.samples = seq_length, samples
        _require_vocabulary(self.data, vocabulary)
        front = Front(front_ids(self.data.student_tokenizer.path) or ())
        try:
            self.rows = TrainRows(self.data, seq_length, seed, self._teacher(), front)
        except ValueError as error:
            raise RunError(f"{path} gives no rows of {seq_length:,} positions: {error}") from None

    def _teacher(self) -> TeacherSource | None:
        return None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._row(collate([self.rows[index]], self.seq_length))

    def _row(self, batch: Batch) -> dict[str, Tensor]:
        target_S = batch.target_BS[0]
        valid_S = target_S != IGNORE
        return {
            "tokens": batch.input_BS[0],
            "labels": target_S.masked_fill(~valid_S, 0),
            "loss_mask": valid_S.float(),
            "position_ids": torch.arange(self.seq_length),
        }


class GuidedGPTDataset(AlignedGPTDataset):
    """Rows for training, with the stored losses of the dataset's teacher."""

    def __init__(self, path: str | Path, seq_length: int, samples: int, vocabulary: int, seed: int, rule: Rule) -> None:
        """rule: that of forward_step. Its `unit` and `aggregate` determine the guide. The others as for AlignedGPTDataset.

        Raises RunError also if the dataset has no losses of a teacher.
        """
        self.rule = rule
        super().__init__(path, seq_length, samples, vocabulary, seed)

    def _teacher(self) -> TeacherSource:
        _require_losses(self.data)
        losses = CachedLosses(self.data)
        if self.rule.unit == "chunk":
            return CombinedChunks([WholeChunks(losses, self.data)], "min")
        return CombinedGuides([losses], self.rule.aggregate, "min")

    def _row(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.teacher_losses is not None
        (losses,) = batch.teacher_losses
        guide_S = torch.zeros(self.seq_length)
        guide_S[: len(losses)] = torch.from_numpy(losses)
        teacher = {guide_of(self.rule.unit): guide_S, "first": batch.first_BS[0], "last": batch.last_BS[0]}
        return super()._row(batch) | teacher


def guide_of(unit: Unit) -> str:
    """The name of the guide's tensor. It differs by unit, so that rows of one unit are not read with the rule of another."""
    return f"{unit}_guide"


def _require_vocabulary(data: AlignedDataset, vocabulary: int) -> None:
    if data.student_tokenizer.rows > vocabulary:
        raise RunError(
            f"{data.path}: its student ids go up to {data.student_tokenizer.rows - 1:,}, the model's embedding has "
            f"{vocabulary:,} rows: was the dataset built for another student? --vocab-size and --make-vocab-size-divisible-by "
            "give the rows."
        )


def _require_losses(data: AlignedDataset) -> None:
    if data.scoring is None:
        missing, shards = unscored(data.path, data.manifest), data.manifest.shards
        raise RunError(
            f"{data.path} has no losses of its teacher, and in Megatron-LM a teacher must be cached: "
            f"{len(shards) - len(missing)} of {len(shards)} shards are scored.\n"
            f"  {tool('preprocess.score_teacher')} {data.path} --teacher TEACHER"
        )
    require_unchanged(data.path, data.manifest)
