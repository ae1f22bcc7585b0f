"""The teacher of a run: opened as its `placement` says, and put where it scores."""

from __future__ import annotations

import torch

from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.agreement import together
from megatron_vocagno.engine.cached import CachedScorer, is_cached
from megatron_vocagno.engine.distilling import check_vocabularies
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import ReplicatedScorer, Scorer, ShardedScorer
from megatron_vocagno.engine.sharded import ShardedTeacher, open_sharded
from megatron_vocagno.engine.trainers import Engine
from megatron_vocagno.errors import ModelError, RunError
from megatron_vocagno.model.teacher import Teacher, find_teacher, open_teacher, teacher_folder


def check_teacher(run: Run, data: AlignedDataset) -> None:
    """What can be refused before a teacher is read. Raises RunError, ModelError, DatasetError."""
    check_vocabularies(run, data)
    if run.guidance.needs_teacher and not is_cached(run):
        path = run.teacher[0].path
        assert path is not None
        data.require_tokenizer("teacher", teacher_folder(path))


def load_teacher(run: Run, data: AlignedDataset, processes: Processes) -> Teacher | ShardedTeacher | None:
    """The teacher of a run, in memory; None where it is cached, and where the objective needs none.

    Call it before the student's engine is built. Raises RunError, ModelError, DatasetError.
    """
    if not run.guidance.needs_teacher or is_cached(run):
        return None
    asked = run.teacher[0]
    path = asked.path
    assert path is not None
    found = (path, getattr(torch, asked.dtype), processes.device, asked.attention)
    teacher: Teacher | ShardedTeacher
    if asked.placement == "zero3":
        # loaded by all ranks together
        teacher = open_sharded(together(lambda: find_teacher(*found), ModelError), asked.weights)
    else:
        teacher = together(lambda: open_teacher(*found, weights=asked.weights), ModelError)
    if teacher.vocab_size < data.teacher_tokenizer.rows:
        raise RunError(
            f"{data.path}: its teacher tokenizer has {data.teacher_tokenizer.rows:,} tokens, "
            f"the teacher {path} has {teacher.vocab_size:,}: the dataset was aligned for another teacher"
        )
    return teacher


def place_teacher(teacher: Teacher | ShardedTeacher | None, run: Run, engine: Engine, processes: Processes) -> Scorer | None:
    """What scores the steps of a run that selects; None where nothing is selected."""
    if not run.guidance.selects:
        return None
    return CachedScorer(processes.device) if teacher is None else _scorer(teacher, run, engine, processes)


def first_scorer(teacher: Teacher | ShardedTeacher | None, run: Run, engine: Engine, processes: Processes) -> Scorer | None:
    """What scores the first step alone, of a teacher that is asked for distributions."""
    return None if teacher is None or run.guidance.selects else _scorer(teacher, run, engine, processes)


def _scorer(teacher: Teacher | ShardedTeacher, run: Run, engine: Engine, processes: Processes) -> Scorer:
    scorer = ShardedScorer if isinstance(teacher, ShardedTeacher) else ReplicatedScorer
    return scorer(teacher, engine.pipe_group, run.teacher[0].tokens_per_batch, processes.device, run.data.by_document)
