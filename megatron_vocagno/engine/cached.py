"""The teacher's side of rows: teacher ids for a loaded teacher, stored losses for cached teachers, or a guide without a teacher.

Cached losses are checked before a run uses them. Refused are a dataset without losses or with losses of only some shards, losses
of another teacher than the run names, and, with several teachers, datasets that do not contain the same documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vocagno import hub
from megatron_vocagno.batch.cached import CachedLosses, CombinedGuides
from megatron_vocagno.batch.equal_parts import EqualParts
from megatron_vocagno.batch.front import NO_FRONT, Front
from megatron_vocagno.batch.loader import Batch, TrainRows
from megatron_vocagno.batch.pack import TeacherIds, TeacherSource
from megatron_vocagno.batch.unguided import RandomGuide, RandomRows, ZeroGuide
from megatron_vocagno.batch.whole_chunks import CombinedChunks, WholeChunks
from megatron_vocagno.config import Guidance, Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import describe_front, front_of
from megatron_vocagno.corpus.losses import require_unchanged, unscored
from megatron_vocagno.corpus.manifest import DATASET, Scoring
from megatron_vocagno.errors import RunError, tool
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.model.folder import cached_snapshot


@dataclass(frozen=True)
class TeacherSources:
    """Makes the teacher's side of the rows of each dataset."""

    guidance: Guidance
    seed: int
    """Seed of the run. `random` guidance draws from it."""
    cached_teachers: tuple[Teacher, ...] = ()
    """The teachers whose losses are stored with the datasets. Empty if a teacher is loaded, or if none is needed."""
    teacher_limit: int | None = None
    """Largest number of positions that the loaded teacher reads. None if it has no limit, or if no teacher is loaded."""
    prefix: Front = NO_FRONT
    """Prefix of the loaded teacher."""

    def training_rows(self, datasets: Sequence[AlignedDataset], row_length: int, student_prefix: Front) -> list[TrainRows]:
        """The rows of each dataset of `data.train`. Raises RunError if cached losses are missing or come from another teacher."""
        if self.guidance.objective == "random":
            return [RandomRows(data, row_length, self.seed, part, student_prefix) for part, data in enumerate(datasets)]
        pairs = zip(datasets, self._sources(datasets), strict=True)
        return [TrainRows(data, row_length, self.seed, source, student_prefix) for data, source in pairs]

    def held_out(self, datasets: Sequence[AlignedDataset], valid: AlignedDataset) -> TeacherSource:
        """The teacher's side of the rows of `data.valid`. datasets: those of `data.train`.

        Raises RunError: see training_rows; or there are several teachers, because only the first one has losses of `data.valid`.
        """
        if len(self.cached_teachers) > 1:
            raise RunError(
                f"logging.samples needs one teacher, this run has {len(self.cached_teachers)}: [[teacher]] 2 has no losses for "
                f"data.valid ({valid.path}).\n  Remove logging.samples, or use one teacher."
            )
        return self._sources([*datasets, valid])[-1]

    def _sources(self, datasets: Sequence[AlignedDataset]) -> list[TeacherSource]:
        guidance = self.guidance
        if guidance.objective == "random":
            return [RandomGuide(data, self.seed, part) for part, data in enumerate(datasets)]
        if guidance.objective == "student":
            return [ZeroGuide(data) for data in datasets]
        if not self.cached_teachers:
            return [self._aligned(TeacherIds(data, self.teacher_limit, self.prefix), data) for data in datasets]
        scored = [open_scored(teacher, datasets) for teacher in self.cached_teachers]
        return [self._combined([of_teacher[i] for of_teacher in scored]) for i in range(len(datasets))]

    def _combined(self, scored: Sequence[AlignedDataset]) -> TeacherSource:
        """The source of one dataset, which every teacher has scored."""
        sources = [self._aligned(CachedLosses(data), data) for data in scored]
        if len(sources) == 1:
            return sources[0]
        if self.guidance.unit == "chunk":
            return CombinedChunks(sources, self.guidance.combine)
        return CombinedGuides(sources, self.guidance.aggregate, self.guidance.combine)

    def _aligned(self, source: TeacherSource, data: AlignedDataset) -> TeacherSource:
        """The source, aligned by equal parts if `guidance.equal_parts` is set. For unit `chunk`, only whole chunks are mapped."""
        if self.guidance.unit == "chunk" and self.guidance.objective == "guided":
            return WholeChunks(source, data)
        return source if self.guidance.equal_parts is None else EqualParts(source, self.guidance.equal_parts)


def check_cached(teachers: Sequence[Teacher], datasets: Sequence[AlignedDataset]) -> None:
    """Raises RunError if cached losses are missing or come from another teacher.

    teachers: those whose losses are cached. A further teacher whose datasets do not exist yet is not checked.
    """
    for teacher in teachers:
        if all((path / DATASET).is_file() for path in teacher.data):
            open_scored(teacher, datasets)


def open_scored(teacher: Teacher, datasets: Sequence[AlignedDataset]) -> list[AlignedDataset]:
    """The datasets that store the losses of a cached teacher, checked. Raises RunError.

    datasets: those of `data.train`. They store the losses of the first teacher. Each further teacher names its own (`data`).
    """
    if teacher.data:
        scored = [AlignedDataset.open(path) for path in teacher.data]
        for data, first in zip(scored, datasets, strict=True):
            _require_same_documents(data, first)
    else:
        scored = list(datasets)
    for data in scored:
        _require_losses(data, teacher)
        if data.scoring != scored[0].scoring:
            raise RunError(
                f"{data.path} and {scored[0].path} were not scored in the same way:\n  {data.scoring}\n  {scored[0].scoring}\n"
                "  A run needs losses from one teacher with the same settings. Score one of the datasets again "
                f"({tool('preprocess.score_teacher')} … --replace)."
            )
    return scored


def _require_losses(data: AlignedDataset, teacher: Teacher) -> None:
    if data.scoring is None:
        missing, shards = unscored(data.path, data.manifest), data.manifest.shards
        raise RunError(
            f"{data.path} has no losses of its teacher, and teacher.placement is 'cached': "
            f"{len(shards) - len(missing)} of {len(shards)} shards are scored.\n"
            f"  {tool('preprocess.score_teacher')} {data.path} --teacher {teacher.path or 'TEACHER'}"
        )
    require_unchanged(data.path, data.manifest)
    folder = None if teacher.path is None else _local_weights(teacher.path)
    if teacher.path is not None:
        _require_teacher(data, data.scoring, teacher.path, folder)
    _require_prefix(data, data.scoring, teacher, folder)


def _local_weights(path: Path) -> Path | None:
    """The folder or file of a teacher. None if its weights are not on this machine. Downloads nothing."""
    found = cached_snapshot(path) if hub.is_id(path) else path.expanduser()
    return found if found is not None and found.exists() else None


def _require_teacher(data: AlignedDataset, scoring: Scoring, path: Path, folder: Path | None) -> None:
    """Raises RunError unless `path` is the teacher that scored the dataset.

    Weights are compared if they are on this machine (`folder`). Otherwise names are compared.
    """
    if folder is not None:
        fingerprint = teacher_fingerprint(folder)
        same, which = fingerprint == scoring.teacher, fingerprint
    else:
        same, which = hub.short_name(path) == scoring.name, "whose weights are not on this machine"
    if not same:
        raise RunError(
            f"{data.path} holds the losses of {scoring.name} ({scoring.teacher}), teacher.path is {path} ({which}).\n"
            "  A dataset stores the losses of one teacher: name the teacher that scored it, score a copy of the dataset, or\n"
            f"  score it again ({tool('preprocess.score_teacher')} … --replace)."
        )


def _require_prefix(data: AlignedDataset, scoring: Scoring, teacher: Teacher, folder: Path | None) -> None:
    """Raises RunError if the teacher was scored with another prefix than the run gives it."""
    model = [folder] if folder is not None and folder.is_dir() else []
    tokenizer = data.teacher_tokenizer.path
    prefix = front_of(teacher.bos, [*model, tokenizer], "teacher.bos", data.teacher_tokenizer.vocab_size)
    if prefix != scoring.front:
        raise RunError(
            f"{data.path} was scored with {describe_front(scoring.front, tokenizer)} in front of each window, "
            f"but teacher.bos = {teacher.bos!r} means {describe_front(prefix, tokenizer)}.\n"
            "  Without its BOS, a teacher that was trained with one has far too high losses. Score the dataset again:\n"
            f"  {tool('preprocess.score_teacher')} {data.path} --teacher {teacher.path or 'TEACHER'} --replace"
        )


def _require_same_documents(data: AlignedDataset, first: AlignedDataset) -> None:
    """Raises RunError unless both datasets contain the same student ids, by the recorded sha256 of their files."""
    student, other = (each.manifest.student.fingerprint for each in (data, first))
    if student != other:
        raise RunError(f"{data.path} was built with the student tokenizer {student}, {first.path} with {other}")
    ids = [
        [
            tuple(shard.files[f"student.{end}"].sha256 for end in ("bin", "idx"))
            for shard in each.manifest.shards
            if shard.totals.documents
        ]
        for each in (data, first)
    ]
    if ids[0] != ids[1]:
        same = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        raise RunError(
            f"{data.path} and {first.path} do not contain the same documents: {len(data):,} documents in {len(ids[0])} shards, "
            f"and {len(first):,} in {len(ids[1])}; the first different shard is {same}.\n"
            "  Build both from the same input with the same --shard-mb, and look for documents that one build has quarantined."
        )


class CachedScorer:
    """A Scorer that returns the losses that come with the batches. It is not collective."""

    padding = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def score(self, batches: Sequence[Batch]) -> list[Tensor]:
        return [
            torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in batch.teacher_losses or ()], batch_first=True).to(
                self.device
            )
            for batch in batches
        ]
