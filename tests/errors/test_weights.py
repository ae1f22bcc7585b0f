"""What is said of weights that are not those of their configuration, and of models whose losses are not their logits'."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_vocagno.model import proof
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.folder import PretrainedWeights, read_config
from megatron_vocagno.model.proof import ProbeResult, probe, prove_student
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.model.weights import check_weights, model_class
from tests.errors.models import change, model
from tests.errors.telling import told
from tests.model.tiny import SIZES, write_model

__all__ = ["model"]


def test_weights_of_another_configuration(model: Path, tmp_path: Path) -> None:
    tensors = {name: PretrainedWeights(model).tensor(name) for name in PretrainedWeights(model)}
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}, model / "model.safetensors")
    with told(
        snapshot(
            "the weights in DIR/model do not match its config.json of a llama model: 1 are not used (model.layers.0.self_attn.q_proj.bias). Does the configuration lack a bias?"
        ),
        DIR=tmp_path,
    ):
        student_config(model)
    save_file(tensors | {"model.norm.weight": torch.zeros(8, dtype=torch.int8)}, model / "model.safetensors")
    with told(
        snapshot(
            "the weights in DIR/model cannot be used: the type of model.norm.weight is I8, but a llama model needs floating-point numbers (F64, F32, F16, BF16). Are the weights quantized, or cast by the program that saved them? Use the weights that they were made from."
        ),
        DIR=tmp_path,
    ):
        student_config(model)
    packed = {"model.layers.0.self_attn.q_proj.qweight": torch.zeros(8, dtype=torch.int32)}
    save_file(tensors | packed, model / "model.safetensors")
    with told(
        snapshot(
            "the weights in DIR/model are quantized, but config.json has no quantization_config: model.layers.0.self_attn.q_proj.qweight has type I32. Use the unquantized weights that they were made from."
        ),
        DIR=tmp_path,
    ):
        student_config(model)
    change(model, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with told(
        snapshot(
            "the weights in DIR/model are quantized (bitsandbytes), which is not supported. Use the unquantized weights that it was made from; teacher.quantization = 'int8' holds those in 8 bits."
        ),
        DIR=tmp_path,
    ):
        student_config(model)
    mixtral = write_model(tmp_path / "mixtral", {"model_type": "mixtral", **SIZES, "num_local_experts": 2})
    weights = PretrainedWeights(mixtral)
    part = next(name for name in weights if name.endswith("experts.1.w1.weight"))
    save_file({name: weights.tensor(name) for name in weights if name != part}, mixtral / "model.safetensors")
    with told(
        snapshot(
            """\
the weights in DIR/mixtral cannot be merged into a mixtral model: We encountered some issues during automatic conversion of the weights. For details look at the `CONVERSION` entries of the above report!
  Is a part of an expert missing?\
"""
        ),
        DIR=tmp_path,
    ):
        check_weights(PretrainedWeights(mixtral), read_config(mixtral))
    with told(snapshot("transformers has no causal language model of type vit: is it another kind of model?")):
        model_class(AutoConfig.for_model("vit"))


def test_a_student_that_transformers_makes_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a field of its configuration does what no layer here does."""
    capped = AutoConfig.for_model("gemma2", final_logit_softcapping=0.5)
    monkeypatch.setattr(proof, "Student", lambda config, seed: Student(uncapped(config), seed))

    def uncapped(config: Any) -> Any:
        config = copy.deepcopy(config)
        config.final_logit_softcapping = None
        return config

    with told(
        snapshot(
            "a gemma2 student of this configuration differs from the model of transformers: on a small model, the loss of a token is 4.6962 nats there, 7.5887 here. Does the configuration have an unusual field?"
        )
    ):
        prove_student(capped)
    monkeypatch.setattr(proof, "Student", Student)
    made = proof._reference
    biased = AutoConfig.for_model("llama", attention_bias=True)
    plain = AutoConfig.for_model("llama")
    monkeypatch.setattr(proof, "_reference", lambda _: made(proof.shrunk(biased)))
    with told(
        snapshot(
            "a llama student of this configuration differs from the model of transformers: it lacks the weights ['model.layers.0.self_attn.k_proj.bias', 'model.layers.0.self_attn.o_proj.bias', 'model.layers.0.self_attn.q_proj.bias'] and has the weights [] in addition"
        )
    ):
        prove_student(plain)
    monkeypatch.setattr(proof, "_reference", lambda _: None)
    with told(
        snapshot(
            "transformers cannot run a llama student of this configuration: 'NoneType' object has no attribute 'named_parameters'"
        )
    ):
        prove_student(plain)


def test_teachers_that_score_otherwise_than_their_logits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = open_teacher(model, torch.float32, "cpu")
    nothing_BU = torch.zeros(2, 16)
    with told(
        snapshot(
            "the logits of this cohere teacher are not its head applied to its hidden states, which is not supported: the loss of a token is 0.0000 nats by its logits, and 1.0000 by its head. Does it scale or cap its logits in an unusual way?"
        )
    ):
        ProbeResult(nothing_BU, nothing_BU + 1, nothing_BU, 0.0, torch.float32).check("cohere")
    seen_BU = nothing_BU.clone()
    seen_BU[1, 3] = 2.0
    with told(
        snapshot(
            "this bert teacher is not causal, because a loss depends on later tokens: it is 0.0000 nats, and 2.0000 with other tokens after it"
        )
    ):
        ProbeResult(nothing_BU, None, seen_BU, 0.0, torch.float32).check("bert")
    with told(snapshot("the losses of this gemma3 teacher are NaN in float16. Use teacher.dtype = 'bfloat16' or 'float32'.")):
        ProbeResult(nothing_BU, None, nothing_BU.log() * 0, 0.0, torch.float16).check("gemma3")

    def never(*_: Tensor) -> Tensor:
        raise ValueError("no")

    whole = AutoModelForCausalLM.from_pretrained(model)
    with told(snapshot("this llama teacher cannot read 16 tokens: ValueError: no")):
        probe(whole, never, teacher.head, 10, None, torch.device("cpu"))
    cut = torch.zeros(2, 16, 9)
    monkeypatch.setattr(type(whole), "forward", lambda *_, **__: SimpleNamespace(logits=cut))
    with told(snapshot("this llama teacher has 9 logits, but 10 tokens: some would have no loss")):
        probe(whole, lambda *_: nothing_BU, teacher.head, 10, None, torch.device("cpu"))
