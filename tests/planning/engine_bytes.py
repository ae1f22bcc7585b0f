"""A program that builds DeepSpeed engines one after the other and records the bytes that they hold before the optimizer steps.

Arguments: a JSON list of [pipeline stages, ranks per row, DeepSpeed configuration], and the file to write to.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.config import Run
from megatron_vocagno.engine.build import build_engine
from megatron_vocagno.engine.processes import start, stop
from megatron_vocagno.model.configuration import student_config

STUDENT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
ROWS, LENGTH = 2, 32


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes."""
    return {storage.data_ptr(): storage.nbytes() for tensor in tensors if (storage := tensor.untyped_storage()).nbytes()}


def living() -> Iterable[Tensor]:
    for thing in gc.get_objects():
        # not isinstance, which would import lazy modules
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            yield thing
            if thing.grad is not None:
                yield thing.grad


def measure(stages: int, sequence: int, settings: dict[str, Any], processes: Any) -> dict[str, int]:
    run = Run.model_validate(
        {
            "output": "unused",
            "data": {"train": "unused"},
            "student": {"config": STUDENT},
            "guidance": {"objective": "clm"},
            "parallel": {"pipeline_stages": stages, "sequence": sequence},
            "training": {"steps": 1},
        }
    )
    gc.collect()
    before = storages(living())
    layout = Layout(ROWS, 2, processes.world // (max(1, stages) * sequence), sequence)
    engine = build_engine(run, settings, student_config(STUDENT), None, layout, 1, processes).engine
    seen: list[dict[str, int]] = []
    step = engine.optimizer.step

    def record_and_step(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        now = {address: size for address, size in storages(living()).items() if address not in before}
        parameters = list(engine.module.parameters())
        moments = [value for state in engine.optimizer.optimizer.state.values() for value in state.values()]
        seen.append(
            {
                "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
                "weights": sum(storages(getattr(p, "ds_tensor", p) for p in parameters).values()),
                "moments": sum(storages(m for m in moments if torch.is_tensor(m)).values()),
                "all": sum(now.values()),
            }
        )
        return step(*arguments, **options)

    ids_BS = torch.randint(0, STUDENT["vocab_size"], (ROWS, LENGTH))
    for last in (False, True):  # moments exist from the second step on
        if last:
            engine.optimizer.step = record_and_step
        if stages:
            engine.module.loss_fn = lambda outputs, labels: outputs[0].float().mean() + outputs[1].float().mean()
            engine.train_batch(iter([(ids_BS, (ids_BS,))] * 2))
        else:
            for _ in range(2):
                engine.backward(engine(ids_BS, ids_BS, None).mean())
                engine.step()
    return seen[-1]


if __name__ == "__main__":
    wanted, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    processes = start()
    measured = [measure(stages, sequence, settings, processes) for stages, sequence, settings in wanted]
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(measured))
    stop()
