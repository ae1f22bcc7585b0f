"""The losses of invented teachers: one without errors, for known noise, and one that knows nothing.

With arms/oracle.toml, the first one keeps all clean tokens. The second one has the same loss on each of its tokens. It is a
control: a rule that is as good with it uses only the losses of the student.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.losses import gather, record_losses, write_losses
from megatron_vocagno.corpus.manifest import LossTotals, Scoring

WHOLE = "whole"
"""Marks a finished dataset."""


def write_oracle(dataset: Path, out: Path, wrong: Callable[[int], NDArray[np.bool_]]) -> None:
    """Write a copy of a dataset with losses of -inf nats on clean tokens and +inf on wrong ones, whose excess is never positive.

    wrong: function from the number of a document to [M], whether each of its teacher tokens is wrong, including the last
    """
    _write(dataset, out, "oracle", lambda document: np.where(wrong(document), np.inf, -np.inf))


def write_constant(dataset: Path, out: Path) -> None:
    """Write a copy of a scored dataset in which every teacher token has the teacher's mean loss."""
    data = AlignedDataset.open(dataset)
    losses = np.concatenate([data.teacher_losses(document) for document in range(len(data))])
    mean = float(losses.mean(dtype=np.float64))
    _write(dataset, out, "constant", lambda document: np.full(int(data.teacher_lengths[document]), mean))


def _write(dataset: Path, out: Path, name: str, losses_of: Callable[[int], NDArray[np.float64]]) -> None:
    """losses_of: function from the number of a document to the [M] losses of its teacher tokens, nats."""
    if (out / WHOLE).exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(dataset, out)
    data = AlignedDataset.open(out)
    scoring = Scoring(
        teacher="none: the losses are invented",
        name=name,
        dtype="float32",
        weights="as-is",
        context=1,
        stride=1,
        before=data.teacher_tokenizer.eos_id,
    )
    document = 0
    for shard in data.manifest.shards:
        losses = [losses_of(document + i) for i in range(shard.totals.documents)]
        document += len(losses)
        if losses:
            lengths = np.array([len(each) for each in losses], np.int64)
            write_losses(out / shard.path, shard, scoring, np.concatenate(losses).astype(np.float16), lengths, LossTotals())
    record_losses(out, data.manifest, gather(out, data.manifest.shards))
    (out / WHOLE).touch()
