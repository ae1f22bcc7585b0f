"""Weights are those of their configuration, all of them and no others, or the folder is refused: of teachers and of students."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.folder import PretrainedWeights, read_config
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.model.weights import check_weights
from tests.model.tiny import SIZES, batch, reference, reference_loss, write_model

State = dict[str, Tensor]
LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES, "tie_word_embeddings": False}
Open = Callable[[Path], object]


def as_teacher(folder: Path) -> object:
    return open_teacher(folder, torch.float32, "cpu")


def as_student(folder: Path) -> object:
    return student_config(folder)


both = pytest.mark.parametrize("opened", [as_teacher, as_student])


def rewrite(folder: Path, change: Callable[[State], State] = lambda state: state, **config: Any) -> Path:
    file = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | config))
    return folder


def without(part: str) -> Callable[[State], State]:
    def change(state: State) -> State:
        kept = {name: tensor for name, tensor in state.items() if part not in name}
        assert len(kept) < len(state)
        return kept

    return change


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


FAULTS: dict[str, tuple[Callable[[State], State], dict[str, Any], str]] = {
    "no-head": (without("lm_head"), {}, r"1 tensors are missing \(lm_head.weight\). Does the model tie head and embedding"),
    "no-embedding": (without("embed_tokens"), {}, r"missing \(model.embed_tokens.weight\)"),
    "no-mlp": (without("layers.1.mlp"), {}, r"3 tensors are missing \(model.layers.1.mlp.down_proj.weight, "),
    "a-layer-less": (
        without("layers.2."),
        {},
        "num_hidden_layers is 3: do the weights have fewer layers, or is the download incomplete",
    ),
    "a-layer-more-in-the-configuration": (dict, {"num_hidden_layers": 4}, "num_hidden_layers is 4: do the weights have fewer"),
    "a-layer-less-in-the-configuration": (
        dict,
        {"num_hidden_layers": 2},
        r"9 are not used \(model.layers.2.input_layernorm.weight, .*, …\). num_hidden_layers is 2, but the weights have more",
    ),
    "no-layers": (without("layers"), {}, "27 tensors are missing"),
    "prefix": (lambda state: {f"module.{n}": t for n, t in state.items()}, {}, "30 are not used .* under other names"),
    "bias": (
        lambda state: state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)},
        {},
        r"1 are not used \(model.layers.0.self_attn.q_proj.bias\). Does the configuration lack a bias",
    ),
    "shape": (dict, {"intermediate_size": 82}, r"down_proj.weight is \(48, 80\), the configuration requires \(48, 82\)"),
    "gptq": (dict, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\), which is not supported"),
    "awq": (dict, {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized \(awq\), which is not supported"),
    "bitsandbytes": (dict, {"quantization_config": {"load_in_8bit": True}}, r"\(bitsandbytes\), .*Use the unquantized weights"),
    "fp8": (dict, {"quantization_config": {"quant_method": "fp8"}}, r"\(fp8\), .*FineGrainedFP8Config\(dequantize=True\)"),
    "compressed-tensors": (
        dict,
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        r"\(compressed-tensors\), .*CompressedTensorsConfig\(dequantize=True\)",
    ),
    "gptq-names": (
        renamed("q_proj.weight", "q_proj.qweight"),
        {},
        "but config.json has no quantization_config: .*qweight",
    ),
    "int8": (
        lambda state: {n: t.to(torch.int8) for n, t in state.items()},
        {},
        "the type of .* is I8, but a llama",
    ),
    "uint8": (
        lambda state: {n: t.to(torch.uint8) for n, t in state.items()},
        {},
        "the type of .* is U8, but a llama",
    ),
    "float8": (lambda state: {n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, {}, "is F8_E4M3"),
}


@both
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_those_of_the_configuration_are_refused(fault: str, opened: Open, tmp_path: Path) -> None:
    change, config, message = FAULTS[fault]
    folder = write_model(tmp_path / "model", LLAMA)
    opened(folder)
    rewrite(folder, change, **config)
    with pytest.raises(ModelError, match=message):
        opened(folder)


@both
def test_what_a_model_has_no_use_for_is_no_fault(opened: Open, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", LLAMA)
    opened(rewrite(folder, lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))


@pytest.mark.parametrize("sharded", [False, True])
def test_parts_of_experts_are_counted(sharded: bool, tmp_path: Path) -> None:
    options = {"max_shard_size": "60KB"} if sharded else {}
    folder = write_model(tmp_path, {"model_type": "mixtral", **SIZES, "num_local_experts": 4}, **options)
    assert len(list(folder.glob("*.safetensors"))) > 1 or not sharded
    as_teacher(folder)
    if not sharded:
        whole = shutil.copytree(folder, tmp_path / "whole")
        with pytest.raises(ModelError, match=r"experts.down_proj is \(3, 48, 80\), .* \(4, 48, 80\)"):
            as_teacher(rewrite(folder, without("layers.1.mlp.experts.2") if moe_is_mlp(folder) else without("experts.2")))
        with pytest.raises(ModelError, match="cannot be merged into a mixtral model"):
            as_teacher(rewrite(whole, without("experts.2.w1")))


def moe_is_mlp(folder: Path) -> bool:
    return any("mlp.experts" in name for name in PretrainedWeights(folder))


def losses(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Of transformers, of the teacher and of the student."""
    input_BS, target_BS = batch(2, 20)
    student = Student(student_config(folder), seed=0)
    student.load(PretrainedWeights(folder))
    with torch.no_grad():
        expected_BS = reference_loss(reference(folder), input_BS, target_BS)
        return expected_BS, open_teacher(folder, torch.float32, "cpu").loss(input_BS, target_BS), student(input_BS, target_BS)


def test_a_head_of_its_own_is_used_though_the_configuration_ties_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path, LLAMA)
    trained_BS, _, _ = losses(folder)
    rewrite(folder, tie_word_embeddings=True)
    for loss_BS in losses(folder):
        torch.testing.assert_close(loss_BS, trained_BS, rtol=0, atol=1e-5)
    assert not check_weights(PretrainedWeights(folder), read_config(folder)).tie_word_embeddings


def test_a_head_that_repeats_the_embedding_stays_tied(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**LLAMA, "tie_word_embeddings": True})
    trained_BS, _, _ = losses(folder)
    rewrite(folder, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    for loss_BS in losses(folder):
        torch.testing.assert_close(loss_BS, trained_BS, rtol=0, atol=1e-5)
    assert student_config(folder).tie_word_embeddings
    # the last row alone
    rewrite(folder, lambda state: state | {"lm_head.weight": state["lm_head.weight"].index_fill(0, torch.tensor([210]), 1.0)})
    assert not student_config(folder).tie_word_embeddings


def test_names_of_another_wrapper_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """GPT-2's own files have no "transformer." before their names, and masks that are no weights."""
    folder = write_model(
        tmp_path, {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 211, "n_positions": 64}
    )
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    rewrite(folder, lambda state: {n.removeprefix("transformer."): t for n, t in state.items()} | {"h.0.attn.bias": mask})
    input_BU, target_BU = batch(2, 20)
    with torch.no_grad():
        expected_BU = reference_loss(AutoModelForCausalLM.from_pretrained(folder), input_BU, target_BU)
    torch.testing.assert_close(
        open_teacher(folder, torch.float32, "cpu").loss(input_BU, target_BU), expected_BU, rtol=0, atol=1e-5
    )
