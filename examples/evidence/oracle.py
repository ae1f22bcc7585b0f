"""The losses of a teacher without errors, for known noise. With arms/oracle.toml they keep all clean tokens."""

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
    if (out / WHOLE).exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(dataset, out)
    data = AlignedDataset.open(out)
    scoring = Scoring(
        teacher="none: the noise is known",
        name="oracle",
        dtype="float32",
        weights="as-is",
        context=1,
        stride=1,
        before=data.teacher_tokenizer.eos_id,
    )
    document = 0
    for shard in data.manifest.shards:
        marks = [wrong(document + i) for i in range(shard.totals.documents)]
        document += len(marks)
        if marks:
            losses = np.where(np.concatenate(marks), np.inf, -np.inf).astype(np.float16)
            lengths = np.array([len(mark) for mark in marks], np.int64)
            write_losses(out / shard.path, shard, scoring, losses, lengths, LossTotals())
    record_losses(out, data.manifest, gather(out, data.manifest.shards))
    (out / WHOLE).touch()
