"""Compare a served teacher with the same teacher in this process, on a few short windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import Scoring
from megatron_vocagno.errors import ServerError
from megatron_vocagno.preprocess.score_local import open_once, score_documents
from megatron_vocagno.preprocess.score_served import served_losses
from megatron_vocagno.preprocess.score_shard import ScoreJob

TOKENS = 256
"""Tokens of a window at most."""
LARGEST = 0.1
"""Nats: the largest mean difference that is accepted. Two implementations in bfloat16 differ by 0.03 to 0.04."""


@dataclass(frozen=True)
class Difference:
    """Over the tokens of the windows, nats. mean, largest: of the absolute difference. bias: mean of served minus own"""

    windows: int
    tokens: int
    mean: float
    largest: float
    bias: float

    def __str__(self) -> str:
        return (
            f"{self.windows:,} windows with {self.tokens:,} tokens: mean difference {self.mean:.4f} nats per token, largest "
            f"{self.largest:.4f}, bias {self.bias:+.4f}"
        )


def check_server(data: AlignedDataset, job: ScoreJob, count: int) -> Difference:
    """Compare the beginnings of `count` documents, which are evenly spaced in the dataset.

    Raises ModelError if the teacher cannot be opened here, ServerError if the losses differ by more than LARGEST in the mean.
    """
    assert job.served is not None and job.teacher is not None
    chosen = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).astype(np.int64)).tolist()
    parts = [data.teacher(i, 0, min(TOKENS, int(data.teacher_lengths[i]))) for i in chosen]
    ids, lengths = np.concatenate(parts), np.array([len(part) for part in parts], np.int32)
    scoring: Scoring = job.scoring
    dtype = scoring.dtype if scoring.dtype in ("bfloat16", "float16", "float32") else "bfloat16"
    own, _ = score_documents(open_once(job.teacher, dtype, "none"), ids, lengths, job)
    served, _ = served_losses(job.served, scoring, ids, lengths, chosen, lambda done, state: None)
    apart = served.astype(np.float64) - own
    found = Difference(len(parts), len(ids), float(np.abs(apart).mean()), float(np.abs(apart).max()), float(apart.mean()))
    if not found.mean <= LARGEST:
        raise ServerError(
            f"{job.served.servers.urls[0]} does not give the losses of {job.teacher} in {dtype}. {found}. At most {LARGEST} was "
            "expected in the mean: does it serve other weights, or quantized ones?"
        )
    return found
