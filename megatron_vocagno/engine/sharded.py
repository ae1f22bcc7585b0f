"""A teacher that no rank holds alone: ZeRO-3 over the world, without an optimizer.

Each rank keeps its part of every tensor, and a forward gathers layer by layer what it needs: all ranks must call it equally
often, whatever they score. Build it before the student's engine: DeepSpeed keeps one process-wide record of the ranks that form
a model, and after a pipeline it would shard over the data-parallel ranks alone, or fail (0.19.8).
"""

from __future__ import annotations

import deepspeed
import torch
from transformers.integrations import HfDeepSpeedConfig

from megatron_vocagno.engine.agreement import together
from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.quantised import Weights
from megatron_vocagno.model.teacher import Found, Teacher, load_teacher

PRECISIONS = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}, torch.float32: {}}


class ShardedTeacher:
    """A `Teacher` for scoring, whose weights are elsewhere between two forwards."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        teacher: Teacher = engine.module
        # an engine that nobody holds takes its hooks with it, and with them the gathering
        self.engine = engine
        self.loss, self.vocab_size, self.max_positions = teacher.loss, teacher.vocab_size, teacher.max_positions
        self.parameters_count = teacher.parameters_count


def open_sharded(found: Found, weights: Weights) -> ShardedTeacher:
    """A teacher, sharded while it loads: the first rank reads, each keeps its part. Collective over the world.

    Raises SharedError: as open_teacher raises ModelError.
    """
    # nothing is kept for a second use: the proof goes through the decoder twice, and its weights would stay whole
    zero = {"stage": 3, "stage3_max_reuse_distance": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 2**31}
    config |= PRECISIONS[found.dtype]
    # transformers shards the models that it makes while this object lives: not the student, therefore
    sharding = HfDeepSpeedConfig(config)
    teacher = load_teacher(found, weights)
    del sharding
    engine, *_ = deepspeed.initialize(model=teacher, config=config, dist_init_required=False)
    evidence = teacher.probe()
    together(lambda: evidence.check(teacher.config.model_type), ModelError)
    return ShardedTeacher(engine)
