"""Bytes of parameters, gradients and optimizer of a plan, compared with those of DeepSpeed engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.planning.layouts import Stage, stages
from megatron_vocagno.planning.memory import states
from megatron_vocagno.planning.sizes import sizes
from tests.planning.engine_bytes import STUDENT
from tests.runs import spawn

FLOAT32: dict[str, str] = {"grad_accum_dtype": "fp32"}
ROUNDED: dict[str, str] = {}
BUCKET = 20_000


def configuration(stage: int, data_types: dict[str, str], bf16: bool) -> dict[str, Any]:
    return {
        "bf16": {"enabled": bf16},
        "data_types": data_types,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "stage3_max_live_parameters": 0,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
    }


ENGINES = [(0, 1, 1, FLOAT32, True), (0, 1, 1, ROUNDED, True), (0, 1, 2, FLOAT32, True), (0, 1, 3, FLOAT32, True)]
ENGINES += [(0, 1, stage, ROUNDED, False) for stage in (1, 2, 3)]
ENGINES += [(0, 2, 2, FLOAT32, True), (0, 2, 3, FLOAT32, True)]
ENGINES += [(2, 1, 1, FLOAT32, True), (2, 1, 1, ROUNDED, False)]  # last: DeepSpeed's plain engines do not start after a pipeline
"""(pipeline stages, ranks per row, ZeRO stage, data types, bf16 or float32)"""


@pytest.mark.long
@pytest.mark.slow
def test_engines_hold_the_bytes_that_are_planned(tmp_path: Path) -> None:
    arguments = [(count, shared, configuration(stage, data_types, bf16)) for count, shared, stage, data_types, bf16 in ENGINES]
    finished = spawn(2, [json.dumps(arguments), str(tmp_path / "bytes.json")], ["-m", "tests.planning.engine_bytes"])
    assert finished.returncode == 0, finished.stdout[-4000:]

    model = sizes(student_config(STUDENT))
    told = json.loads((tmp_path / "bytes.json").read_text())
    assert len(told) == len(ENGINES)
    for (count, _, stage, data_types, bf16), held in zip(ENGINES, told, strict=True):
        split = stages(model, count)[0] if count else Stage(model.layers, embedding=True, head=True)
        assert split.parameters(model) == held["parameters"] > 150_000
        ranks = 2 // max(1, count)
        planned = states(held["parameters"], model.embedding, stage, ranks, configuration(stage, data_types, bf16))
        assert planned.weights == pytest.approx(held["weights"], rel=0.001)
        assert planned.optimizer == pytest.approx(12 / 8 * held["moments"], rel=0.001)
        everything = planned.weights + planned.gradients + planned.optimizer
        if (stage, data_types) == (1, ROUNDED):
            # each rank has let go of the others' gradients when its optimizer steps
            everything -= planned.gradients * (ranks - 1) // ranks
        # inputs, norms, and a bucket that may still be there
        assert everything <= held["all"] * 1.001
        assert held["all"] <= (everything + planned.buffers) * 1.01
