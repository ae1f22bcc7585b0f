"""The teacher of a run: opened as its `placement` says, and put where it scores."""

from __future__ import annotations

from functools import partial

import torch

from megatron_vocagno.config import Run, RunError
from megatron_vocagno.corpus import CorpusError
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.agreement import together
from megatron_vocagno.engine.cached import CachedScorer, is_cached
from megatron_vocagno.engine.distilling import check_vocabularies
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import ReplicatedScorer, Scorer, ShardedScorer
from megatron_vocagno.engine.sharded import ShardedTeacher, open_sharded
from megatron_vocagno.engine.trainers import Engine
from megatron_vocagno.model.folder import ModelError
from megatron_vocagno.model.teacher import Teacher, open_teacher, teacher_folder


def load_teacher(run: Run, data: AlignedDataset, processes: Processes) -> Teacher | ShardedTeacher | None:
    """The teacher of a run, in memory; None where it is cached, and where the objective needs none.

    Call it before the student's engine is built. Raises RunError, ModelError, TokenizerMismatch.
    """
    if not run.guidance.needs_teacher or is_cached(run):
        return None
    asked = run.teacher[0]
    path = asked.path
    assert path is not None
    together(lambda: check_vocabularies(run, data), RunError)
    together(lambda: data.require_tokenizer("teacher", teacher_folder(path)), RunError, CorpusError, ModelError)
    dtype = getattr(torch, asked.dtype)
    opened = partial(open_teacher, path, dtype, processes.device, asked.attention, weights=asked.weights)
    # a sharded teacher is loaded by all ranks together anyway
    teacher = open_sharded(dtype, opened) if asked.placement == "zero3" else together(opened, ModelError)
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
    if teacher is None:
        return CachedScorer(processes.device)
    scorer = ShardedScorer if isinstance(teacher, ShardedTeacher) else ReplicatedScorer
    return scorer(teacher, engine.pipe_group, run.teacher[0].tokens_per_batch, processes.device, run.data.by_document)
