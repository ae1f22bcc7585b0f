"""How layers are assigned to pipeline stages, and how the fields of `parallel` reach the stages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.config import Parallel, Run
from megatron_vocagno.engine import build
from megatron_vocagno.engine.pipeline import StudentPipeline, check_stages
from megatron_vocagno.engine.processes import Processes
from megatron_vocagno.engine.sequence import WHOLE_ROWS
from megatron_vocagno.errors import RunError
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.student import DecoderLayer
from tests.runs import STUDENT


def cut(dealt: tuple[int, ...], stage: int) -> tuple[list[int], range]:
    """Where the stages of a student begin and end, and the layers of one of them, without any process group."""
    pipeline = StudentPipeline.__new__(StudentPipeline)
    nn.Module.__init__(pipeline)
    pipeline._layer_specs, pipeline.stage_id = [None] * (sum(dealt) + 3), stage
    pipeline._partition_layers(dealt)
    return pipeline.parts, range(pipeline._local_start, pipeline._local_stop)


@pytest.mark.parametrize("dealt", [(5,), (1, 4), (4, 1), (1, 1, 1), (2, 7, 3, 1)])
def test_each_stage_has_the_decoder_layers_that_it_was_dealt(dealt: tuple[int, ...]) -> None:
    layers = sum(dealt)
    borders, _ = cut(dealt, 0)
    assert borders[0] == 0 and borders[-1] == layers + 3, "embedding first, norm and head last"
    for stage, (count, (begin, end)) in enumerate(zip(dealt, pairwise(borders), strict=True)):
        mine = cut(dealt, stage)[1]
        assert mine == range(begin, end)
        assert sum(1 <= layer <= layers for layer in mine) == count
        assert (0 in mine) == (stage == 0) and (layers + 1 in mine) == (layers + 2 in mine) == (stage == len(dealt) - 1)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"pipeline_stages": 2, "partition": [1, 1, 2]}, r"\[1, 1, 2\] is for 3 stages, parallel.pipeline_stages is 2"),
        ({"pipeline_stages": 0, "partition": [4]}, r"\[4\] is for 1 stages, parallel.pipeline_stages is 0"),
        ({"pipeline_stages": 2, "partition": [1, 2]}, r"\[1, 2\] assigns 3 decoder layers, the student has 4"),
        ({"pipeline_stages": 5}, r"pipeline_stages is 5, but the student has only 4 decoder layers"),
    ],
)
def test_stages_that_the_student_cannot_be_cut_into_are_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        check_stages(Parallel(**parallel), 4)


@pytest.mark.parametrize("partition", ["parameters", "uniform", [1, 3]])
def test_stages_that_fit_are_not(partition: Any) -> None:
    check_stages(Parallel(pipeline_stages=2, partition=partition), 4)


class Built(Exception):
    """What was about to be handed to DeepSpeed, which would want other processes."""

    def __init__(self, layers: Any, **options: Any) -> None:
        super().__init__()
        self.layers, self.options = list(layers), options


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("stages", "own"), [(0, 0), (2, 0), (2, 1)])
def test_activation_checkpointing_reaches_every_decoder_layer_once(
    stages: int, own: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on top of DeepSpeed's own, where its configuration has that."""
    parallel = {"pipeline_stages": stages, "activation_checkpointing": recompute, "partition": "uniform"}
    if stages:
        parallel["partition"] = [1, 2]
    run = Run.model_validate(
        {
            "output": "o",
            "data": {"train": "d"},
            "student": {"config": STUDENT},
            "guidance": {"objective": "clm"},
            "training": {"steps": 1},
            "parallel": parallel,
        }
    )

    def pipeline(config: Any, specs: Any, **options: Any) -> None:
        raise Built([spec.build() for spec in specs], **options)

    def initialize(model: Any, config: Any, **_: Any) -> None:
        raise Built(model.layers, **config)

    monkeypatch.setattr(build, "StudentPipeline", pipeline)
    monkeypatch.setattr(build.deepspeed, "initialize", initialize)
    monkeypatch.setattr(build, "divide_ranks", lambda _: (WHOLE_ROWS, None))
    settings = {"optimizer": {}, "pipeline": {"activation_checkpoint_interval": own}}
    here = Processes(rank=0, world=1, device=torch.device("cpu"))
    with pytest.raises(Built) as built:
        build.build_engine(run, settings, student_config(STUDENT, 50), None, Layout(1, 1, 1), 1, here)
    decoders = [layer for layer in built.value.layers if isinstance(layer, DecoderLayer)]
    assert len(decoders) == 3
    assert {layer.recompute for layer in decoders} == {recompute and not own}
    if stages:
        assert built.value.options["partition_method"] == (1, 2)
    else:
        assert built.value.options["pipeline"]["use_reentrant"] is False, "DeepSpeed's default fails"
