"""Load the teacher of a run, replicated or sharded as `teacher.placement` requires, and make the scorer that uses it."""

from __future__ import annotations

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from megatron_vocagno.config import Teacher as TeacherConfig
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.cached import CachedScorer
from megatron_vocagno.engine.collectives import run_on_all_ranks
from megatron_vocagno.engine.engines import TrainEngine
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.scoring import ReplicatedScorer, Scorer, ShardedScorer
from megatron_vocagno.errors import ModelError, RunError
from megatron_vocagno.model import teacher as model
from megatron_vocagno.model.gguf import naming_file
from megatron_vocagno.model.quantized import Quantization
from megatron_vocagno.model.teacher import Teacher, TeacherFolder, find_teacher, open_teacher, teacher_folder

PRECISIONS = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}, torch.float32: {}}


def check_teacher(config: TeacherConfig | None, data: AlignedDataset) -> None:
    """Compare the teacher's tokenizer with the dataset, before any weights are read. config: the teacher to load, if any.

    Raises ModelError, DatasetError.
    """
    if config is not None:
        assert config.path is not None
        with naming_file(config.path):
            data.require_tokenizer("teacher", teacher_folder(config.path))


def load_teacher(config: TeacherConfig | None, data: AlignedDataset, processes: Processes) -> Teacher | ShardedTeacher | None:
    """The teacher, in memory. None if `config` is None. Collective over the world.

    Call it before the student's engine is built, see open_sharded.

    Raises SharedError if the teacher cannot be loaded, and RunError if it has fewer tokens than the dataset's teacher tokenizer.
    """
    if config is None:
        return None
    path = config.path
    assert path is not None
    arguments = (path, getattr(torch, config.dtype), processes.device, config.attention)
    teacher: Teacher | ShardedTeacher
    if config.placement == "zero3":
        teacher = open_sharded(run_on_all_ranks(lambda: find_teacher(*arguments), ModelError), config.quantization)
    else:
        teacher = run_on_all_ranks(lambda: open_teacher(*arguments, quantization=config.quantization), ModelError)
    if teacher.vocab_size < data.teacher_tokenizer.rows:
        raise RunError(
            f"{data.path}: its teacher tokenizer has {data.teacher_tokenizer.rows:,} tokens, "
            f"but the teacher {path} has {teacher.vocab_size:,}. Was the dataset aligned for another teacher?"
        )
    return teacher


def make_scorer(
    teacher: Teacher | ShardedTeacher | None, config: TeacherConfig | None, engine: TrainEngine, device: torch.device
) -> Scorer | None:
    """The scorer for every step. None if the objective trains on every token.

    teacher, config: the loaded teacher and its section of the run. None if no teacher is loaded.
    """
    if not engine.objective.guidance.selects:
        return None
    return CachedScorer(device) if teacher is None or config is None else _scorer(teacher, config, engine, device)


def make_first_scorer(
    teacher: Teacher | ShardedTeacher | None, config: TeacherConfig | None, engine: TrainEngine, device: torch.device
) -> Scorer | None:
    """The scorer for the first step, for objectives that read the teacher's distributions instead of its losses. Else None."""
    if teacher is None or config is None or engine.objective.guidance.selects:
        return None
    return _scorer(teacher, config, engine, device)


def _scorer(teacher: Teacher | ShardedTeacher, config: TeacherConfig, engine: TrainEngine, device: torch.device) -> Scorer:
    scorer = ShardedScorer if isinstance(teacher, ShardedTeacher) else ReplicatedScorer
    return scorer(teacher, engine.row_group, config.tokens_per_batch, device, engine.by_document)


class ShardedTeacher:
    """A `Teacher` for scoring whose weights are sharded over all ranks (ZeRO-3, no optimizer).

    A forward gathers the weights layer by layer, so all ranks must run the same number of forwards.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        teacher: Teacher = engine.module
        # the engine owns the hooks that gather the weights: without a reference to it, they would be removed
        self.engine = engine
        self.loss, self.vocab_size, self.max_positions = teacher.loss, teacher.vocab_size, teacher.max_positions
        self.parameters_count = teacher.parameters_count


def open_sharded(folder: TeacherFolder, quantization: Quantization) -> ShardedTeacher:
    """Load a teacher with ZeRO-3: the first rank reads the weights, and each rank stores its share. Collective over the world.

    Build it before the student's engine. DeepSpeed 0.19.8 has one process-wide record of the ranks that form a model. After a
    pipeline is built, it would shard over the data-parallel ranks only, or fail.

    Raises SharedError for the reasons for which open_teacher raises ModelError.
    """
    # no reuse of gathered weights: the probe runs the decoder twice, and its weights would stay gathered
    zero = {"stage": 3, "stage3_max_reuse_distance": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 2**31}
    config |= PRECISIONS[folder.dtype]
    # transformers shards every model that it builds while this object exists, so it must not exist when the student is built
    sharding = HfDeepSpeedConfig(config)
    teacher = model.load_teacher(folder, quantization)
    del sharding
    engine, *_ = deepspeed.initialize(model=teacher, config=config, dist_init_required=False)
    probed = teacher.probe()
    run_on_all_ranks(lambda: probed.check(teacher.config.model_type), ModelError)
    return ShardedTeacher(engine)
