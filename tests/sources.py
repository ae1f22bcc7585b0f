"""Rows and samples of a run, as training makes them, without prefixes and without a loaded teacher."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vocagno.batch.front import NO_FRONT
from megatron_vocagno.batch.loader import TrainRows
from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.cached import TeacherSources
from megatron_vocagno.training.samples import Samples


def sources_of(run: Run) -> TeacherSources:
    return TeacherSources(run.guidance, run.training.seed, run.cached_teachers)


def training_rows(run: Run, datasets: Sequence[AlignedDataset]) -> list[TrainRows]:
    return sources_of(run).training_rows(datasets, run.data.row_length, NO_FRONT)


def samples_of(run: Run, datasets: Sequence[AlignedDataset], valid: AlignedDataset) -> Samples:
    assert run.logging.samples is not None
    return Samples(run.logging.samples, run.data.row_length, datasets, valid, sources_of(run), NO_FRONT)
