"""Where the teacher's losses are cached, or are not asked for: rows bring along what guides, and no teacher is loaded.

What is refused: a dataset without losses or with those of some shards alone, losses of another teacher than the run names, and
for several teachers datasets that are not of the same documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vocagno import hub
from megatron_vocagno.batch.cached import CachedLosses, CombinedGuides
from megatron_vocagno.batch.chunked import Chunked
from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import Batch, TrainRows
from megatron_vocagno.batch.pack import TeacherIds, TeacherSource
from megatron_vocagno.batch.unguided import RandomGuide, RandomRows, ZeroGuide
from megatron_vocagno.config import Guidance, Run, Teacher
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import describe_front, front_of
from megatron_vocagno.corpus.losses import require_unchanged, unscored
from megatron_vocagno.corpus.manifest import DATASET, Scoring
from megatron_vocagno.errors import RunError, tool
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.model.folder import cached_snapshot


def is_cached(run: Run) -> bool:
    """Whether the run's teachers have spoken already."""
    return run.guidance.needs_teacher and run.teacher[0].placement == "cached"


def training_rows(
    run: Run, datasets: Sequence[AlignedDataset], teacher_limit: int | None, fronts: tuple[Front, Front]
) -> list[TrainRows]:
    """The rows of each dataset of `data.train`, with what the run's teachers read or have said.

    teacher_limit: most positions that a loaded teacher reads. fronts: of the student, and of a loaded teacher.
    Raises RunError: losses that are missing, or not those asked for.
    """
    length, seed, (student, teacher) = run.data.row_length, run.training.seed, fronts
    if run.guidance.objective == "random":
        return [RandomRows(data, length, seed, part, student) for part, data in enumerate(datasets)]
    sources = _sources(run, datasets, teacher_limit, teacher)
    return [TrainRows(data, length, seed, source, student) for data, source in zip(datasets, sources, strict=True)]


def held_out_source(
    run: Run, datasets: Sequence[AlignedDataset], valid: AlignedDataset, teacher_limit: int | None, teacher: Front
) -> TeacherSource:
    """The teacher's side of rows of `data.valid`, as that of training rows. Raises RunError, see training_rows."""
    if is_cached(run) and len(run.teacher) > 1:
        raise RunError(
            f"logging.samples = {run.logging.samples} with {len(run.teacher)} teachers: [[teacher]] 2 names no losses of "
            f"data.valid ({run.data.valid}).\n  Leave logging.samples out, or name one teacher."
        )
    return _sources(run, [*datasets, valid], teacher_limit, teacher)[-1]


def _sources(run: Run, datasets: Sequence[AlignedDataset], teacher_limit: int | None, front: Front) -> list[TeacherSource]:
    guidance = run.guidance
    if guidance.objective == "random":
        return [RandomGuide(data, run.training.seed, part) for part, data in enumerate(datasets)]
    if guidance.objective == "student":
        return [ZeroGuide(data) for data in datasets]
    if not is_cached(run):
        return [_aligned(TeacherIds(data, teacher_limit, front), guidance) for data in datasets]
    scored = [open_scored(run, k, datasets) for k in range(len(run.teacher))]
    return [_cached_source([sets[i] for sets in scored], guidance) for i in range(len(datasets))]


def _cached_source(teachers: Sequence[AlignedDataset], guidance: Guidance) -> TeacherSource:
    cached = [_aligned(CachedLosses(data), guidance) for data in teachers]
    return cached[0] if len(cached) == 1 else CombinedGuides(cached, guidance.aggregate, guidance.combine)


def _aligned(source: TeacherSource, guidance: Guidance) -> TeacherSource:
    return source if guidance.chunks is None else Chunked(source, guidance.chunks)


def check_cached(run: Run, datasets: Sequence[AlignedDataset]) -> None:
    """Raises RunError: losses that are missing, or not those asked for. Of further teachers, where their datasets are there."""
    if is_cached(run):
        for k, teacher in enumerate(run.teacher):
            if all((path / DATASET).is_file() for path in teacher.data):
                open_scored(run, k, datasets)


def open_scored(run: Run, k: int, datasets: Sequence[AlignedDataset]) -> list[AlignedDataset]:
    """The datasets that hold the losses of the run's teacher k: those of `data.train` for the first, its own for the others."""
    asked = run.teacher[k]
    if k == 0:
        scored = list(datasets)
    else:
        scored = [AlignedDataset.open(path) for path in asked.data]
        for mine, first in zip(scored, datasets, strict=True):
            _require_same_documents(mine, first)
    for data in scored:
        _require_losses(data, asked)
        if data.scoring != scored[0].scoring:
            raise RunError(
                f"{data.path} and {scored[0].path} were not scored in one way:\n  {data.scoring}\n  {scored[0].scoring}\n"
                f"  One teacher's losses guide a run. Score one of them anew ({tool('preprocess.score_teacher')} … --replace)."
            )
    return scored


def _require_losses(data: AlignedDataset, asked: Teacher) -> None:
    if data.scoring is None:
        missing, shards = unscored(data.path, data.manifest), data.manifest.shards
        raise RunError(
            f"{data.path} has no losses of its teacher, and teacher.placement is 'cached': "
            f"{len(shards) - len(missing)} of {len(shards)} shards are scored.\n"
            f"  {tool('preprocess.score_teacher')} {data.path} --teacher {asked.path or 'TEACHER'}"
        )
    require_unchanged(data.path, data.manifest)
    folder = None if asked.path is None else _here(asked.path)
    if asked.path is not None:
        _require_teacher(data, data.scoring, asked.path, folder)
    _require_front(data, data.scoring, asked, folder)


def _here(path: Path) -> Path | None:
    """A teacher's folder or file, where its weights are on this machine."""
    found = cached_snapshot(path) if hub.is_id(path) else path.expanduser()
    return found if found is not None and found.exists() else None


def _require_teacher(data: AlignedDataset, scoring: Scoring, path: Path, folder: Path | None) -> None:
    """Raises RunError: `path` is not the teacher that was scored, by its weights where they are here, or else by its name."""
    if folder is not None:
        fingerprint = teacher_fingerprint(folder)
        same, which = fingerprint == scoring.teacher, fingerprint
    else:
        same, which = hub.short_name(path) == scoring.name, "whose weights are not on this machine"
    if not same:
        raise RunError(
            f"{data.path} holds the losses of {scoring.name} ({scoring.teacher}), teacher.path is {path} ({which}).\n"
            "  One dataset holds one teacher's losses: name the teacher that has scored it, score a copy of the dataset, or\n"
            f"  score it anew ({tool('preprocess.score_teacher')} … --replace)."
        )


def _require_front(data: AlignedDataset, scoring: Scoring, asked: Teacher, folder: Path | None) -> None:
    """Raises RunError: the teacher was scored with something else in front of its windows than the run asks for."""
    own = [folder] if folder is not None and folder.is_dir() else []
    tokenizer = data.teacher_tokenizer.path
    front = front_of(asked.bos, [*own, tokenizer], "teacher.bos", data.teacher_tokenizer.vocab_size)
    if front != scoring.front:
        raise RunError(
            f"{data.path} was scored with {describe_front(scoring.front, tokenizer)} in front of each window, "
            f"teacher.bos = {asked.bos!r} asks for {describe_front(front, tokenizer)}.\n"
            "  The losses of a teacher that was trained with a BOS are far too high without it. Score the dataset anew:\n"
            f"  {tool('preprocess.score_teacher')} {data.path} --teacher {asked.path or 'TEACHER'} --replace"
        )


def _require_same_documents(mine: AlignedDataset, first: AlignedDataset) -> None:
    """Raises RunError unless both hold the same student ids, by the recorded sha256 of their files."""
    student, other = (data.manifest.student.fingerprint for data in (mine, first))
    if student != other:
        raise RunError(f"{mine.path} was built with the student tokenizer {student}, {first.path} with {other}")
    ids = [
        [
            tuple(shard.files[f"student.{end}"].sha256 for end in ("bin", "idx"))
            for shard in data.manifest.shards
            if shard.totals.documents
        ]
        for data in (mine, first)
    ]
    if ids[0] != ids[1]:
        same = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        raise RunError(
            f"{mine.path} and {first.path} are not of the same documents: {len(mine):,} documents in {len(ids[0])} shards, "
            f"{len(first):,} in {len(ids[1])}; shard {same} is the first that differs.\n"
            "  Build both from the same input with the same --shard-mb, and look for documents that one build has quarantined."
        )


class CachedScorer:
    """Nothing is scored, and nothing is collective."""

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
