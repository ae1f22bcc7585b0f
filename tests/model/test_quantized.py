"""A teacher in 8 bits says nearly the same, in half the bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.quantized import quantize
from megatron_vocagno.model.teacher import open_teacher
from tests.model.tiny import FAMILIES, SIZES, write_model
from tests.runs import REPOSITORY

TORCHAO = Path(sys.prefix) / "quantized"
"""Where `make install` puts it: see tests/model/quantized.py."""


@pytest.mark.long
@pytest.mark.skipif(not (TORCHAO / "torchao").is_dir(), reason=f"no torchao in {TORCHAO}")
def test_losses_are_near_those_of_the_teacher_as_it_is(tmp_path: Path) -> None:
    wide = {**SIZES, "hidden_size": 128, "intermediate_size": 256}
    folders = [
        write_model(tmp_path / family, {"model_type": family, **wide, **FAMILIES[family]}) for family in ("qwen2", "gemma2")
    ]
    paths = os.pathsep.join([str(TORCHAO), str(REPOSITORY)])
    command = [sys.executable, "-m", "tests.model.quantized", *map(str, folders)]
    finished = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    measured = json.loads(finished.stdout.splitlines()[-1])
    assert len(measured) == 8
    for case in measured:
        # of the spread of the losses between tokens
        assert 0 < case["error"] < {"int8": 0.04, "fp8": 0.12}[case["weights"]], case
        assert 0.5 < case["bytes"] < 0.53, case
        assert case["same_head"] and case["same_count"], case


def test_without_torchao_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, {"model_type": "llama", **SIZES})
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelError, match=r"teacher.quantization = 'int8' needs torchao .*pip install torchao"):
        open_teacher(folder, torch.float32, "cpu", quantization="int8")


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    gpt2 = write_model(tmp_path, {**SIZES, "model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4})
    with pytest.raises(ModelError, match="no torch linear layers"):
        open_teacher(gpt2, torch.float32, "cpu", quantization="int8")
    sharded = torch.nn.Linear(4, 4)
    sharded.weight.ds_id = 0  # DeepSpeed's mark on a parameter of which a rank holds a part
    with pytest.raises(ModelError, match=r"teacher.placement = 'zero3'"):
        quantize(sharded, "fp8", "cpu")
