"""The teacher of a run: opened as its `placement` says, and put where it scores."""

from __future__ import annotations

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from megatron_vocagno.config import Run
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.cached import CachedScorer, is_cached
from megatron_vocagno.engine.collectives import run_on_all_ranks
from megatron_vocagno.engine.distilling import check_vocabularies
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import ReplicatedScorer, Scorer, ShardedScorer
from megatron_vocagno.errors import ModelError, RunError
from megatron_vocagno.model import teacher as model
from megatron_vocagno.model.quantised import Quantization
from megatron_vocagno.model.teacher import Teacher, TeacherFolder, find_teacher, open_teacher, teacher_folder

PRECISIONS = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}, torch.float32: {}}


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
        # collective over all ranks
        teacher = open_sharded(run_on_all_ranks(lambda: find_teacher(*found), ModelError), asked.quantization)
    else:
        teacher = run_on_all_ranks(lambda: open_teacher(*found, quantization=asked.quantization), ModelError)
    if teacher.vocab_size < data.teacher_tokenizer.rows:
        raise RunError(
            f"{data.path}: its teacher tokenizer has {data.teacher_tokenizer.rows:,} tokens, "
            f"the teacher {path} has {teacher.vocab_size:,}: the dataset was aligned for another teacher"
        )
    return teacher


def make_scorer(teacher: Teacher | ShardedTeacher | None, run: Run, engine: TrainEngine, processes: Processes) -> Scorer | None:
    """What scores the steps of a run that selects; None where nothing is selected."""
    if not run.guidance.selects:
        return None
    return CachedScorer(processes.device) if teacher is None else _scorer(teacher, run, engine, processes)


def make_first_scorer(
    teacher: Teacher | ShardedTeacher | None, run: Run, engine: TrainEngine, processes: Processes
) -> Scorer | None:
    """What scores the first step alone, of a teacher that is asked for distributions."""
    return None if teacher is None or run.guidance.selects else _scorer(teacher, run, engine, processes)


def _scorer(teacher: Teacher | ShardedTeacher, run: Run, engine: TrainEngine, processes: Processes) -> Scorer:
    scorer = ShardedScorer if isinstance(teacher, ShardedTeacher) else ReplicatedScorer
    return scorer(teacher, engine.pipe_group, run.teacher[0].tokens_per_batch, processes.device, run.data.by_document)


class ShardedTeacher:
    """A `Teacher` for scoring whose weights are sharded over all ranks (ZeRO-3, no optimizer).

    A forward gathers them layer by layer, so all ranks must call it equally often.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        teacher: Teacher = engine.module
        # an engine that nobody holds takes its hooks with it, and with them the gathering
        self.engine = engine
        self.loss, self.vocab_size, self.max_positions = teacher.loss, teacher.vocab_size, teacher.max_positions
        self.parameters_count = teacher.parameters_count


def open_sharded(found: TeacherFolder, quantization: Quantization) -> ShardedTeacher:
    """A teacher, sharded over the world with ZeRO-3 while it loads: the first rank reads, each rank keeps its part.

    Collective over the world. Build it before the student's engine: DeepSpeed keeps one process-wide record of the ranks that
    form a model, and after a pipeline it would shard over the data-parallel ranks only, or fail (0.19.8).

    Raises SharedError: as open_teacher raises ModelError.
    """
    # nothing is kept for a second use: the proof goes through the decoder twice, and its weights would stay whole
    zero = {"stage": 3, "stage3_max_reuse_distance": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 2**31}
    config |= PRECISIONS[found.dtype]
    # transformers shards the models that it makes while this object lives: not the student, therefore
    sharding = HfDeepSpeedConfig(config)
    teacher = model.load_teacher(found, quantization)
    del sharding
    engine, *_ = deepspeed.initialize(model=teacher, config=config, dist_init_required=False)
    evidence = teacher.probe()
    run_on_all_ranks(lambda: evidence.check(teacher.config.model_type), ModelError)
    return ShardedTeacher(engine)
