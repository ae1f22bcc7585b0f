"""The teacher's losses are those of transformers, whatever its architecture and vocabulary; padding changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.teacher import Teacher, open_teacher
from tests.model.tiny import SIZES, batch, each_family, reference, reference_loss, write_model

LLAMA = {"model_type": "llama", **SIZES}


def cpu_teacher(folder: Path) -> Teacher:
    return open_teacher(folder, torch.float32, "cpu")


def assert_scores_as_hugging_face(folder: Path, vocab: int) -> None:
    teacher = cpu_teacher(folder)
    input_BU, target_BU = batch(3, 23, vocab)
    loss_BU = teacher.loss(input_BU, target_BU)
    with torch.no_grad():
        expected_BU = reference_loss(reference(folder), input_BU, target_BU)
    assert loss_BU.dtype == torch.float32 and teacher.vocab_size == vocab
    torch.testing.assert_close(loss_BU, expected_BU, rtol=0, atol=1e-5)
    assert (loss_BU[target_BU != -100] > 0).sum() == 3 * 23 - 14


@each_family
def test_losses_equal_those_of_hugging_face(spec: dict[str, Any], tmp_path: Path) -> None:
    assert_scores_as_hugging_face(write_model(tmp_path, {**spec, "vocab_size": 307}), 307)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"model_type": "mistral", "sliding_window": 8}, id="sliding-window"),
        pytest.param({"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4}, id="learned-positions"),
        pytest.param({"model_type": "gpt_neox"}, id="parallel-residual"),
        pytest.param({"model_type": "gemma", "head_dim": 12}, id="scaled-embedding"),
        pytest.param({"model_type": "olmo2", "pad_token_id": 0}, id="post-norm"),
        pytest.param({"model_type": "granite", "logits_scaling": 1.0}, id="neutral-logit-scale"),
    ],
)
def test_any_architecture_with_a_plain_head_can_teach(spec: dict[str, Any], tmp_path: Path) -> None:
    assert_scores_as_hugging_face(write_model(tmp_path, {**SIZES, **spec}), SIZES["vocab_size"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model_type": "cohere"}, "scale or cap its logits"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "scale or cap its logits"),
        ({"model_type": "recurrent_gemma", "lru_width": 48, "logits_soft_cap": 2.0}, "scale or cap its logits"),
        ({"model_type": "phi"}, "bias in its head"),
    ],
)
def test_a_teacher_whose_logits_are_more_than_a_product_is_refused(spec: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**SIZES, **spec, "pad_token_id": 0})
    with pytest.raises(ModelError, match=message):
        cpu_teacher(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_is_seen_in_16_bits_as_well(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**SIZES, "model_type": "granite", "logits_scaling": 1.02})
    with pytest.raises(ModelError, match=r"the loss of a token is .* by its logits"):
        open_teacher(folder, dtype, "cpu")


def test_hidden_states_come_in_the_precision_of_the_head(tmp_path: Path) -> None:
    teacher = open_teacher(write_model(tmp_path, {**SIZES, "model_type": "mamba", "state_size": 8}), torch.bfloat16, "cpu")
    assert teacher.loss(*batch(2, 9)).isfinite().all() and teacher.hidden_states(batch(2, 9)[0]).dtype == torch.bfloat16


@each_family
def test_rounding_to_16_bits_is_no_difference(spec: dict[str, Any], tmp_path: Path) -> None:
    assert open_teacher(write_model(tmp_path, spec), torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_a_teacher_that_sees_what_comes_is_refused(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path, {"model_type": "cpmant", "vocab_size": 211, "hidden_size": 48, "num_hidden_layers": 2, "dim_ff": 64}
    )
    with pytest.raises(ModelError, match="is not causal, because a loss depends on later tokens: it is"):
        cpu_teacher(folder)


def test_the_proof_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither the model of transformers nor a random number."""
    folder = write_model(tmp_path, LLAMA)
    state = torch.random.get_rng_state()
    teacher = cpu_teacher(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert teacher.whole is None and {name.split(".")[0] for name, _ in teacher.named_parameters()} == {"decoder", "head"}


def test_losses_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """A model whose hidden states are beyond float16, as Gemma's are."""
    folder = write_model(tmp_path, LLAMA)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"] * 1e6}, folder / "model.safetensors")
    assert open_teacher(folder, torch.bfloat16, "cpu").dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"float16.*teacher\.dtype = 'bfloat16' or 'float32'"):
        open_teacher(folder, torch.float16, "cpu")


def test_padding_changes_nothing(tmp_path: Path) -> None:
    teacher = cpu_teacher(write_model(tmp_path, LLAMA))
    input_BU, target_BU = batch(4, 30)
    for row, length in enumerate((30, 19, 5, 1)):
        input_BU[row, length:] = 0
        target_BU[row, length:] = -100
    loss_BU = teacher.loss(input_BU, target_BU)
    for row, length in enumerate((30, 19, 5, 1)):
        alone_1U = teacher.loss(input_BU[row : row + 1, :length], target_BU[row : row + 1, :length])
        torch.testing.assert_close(loss_BU[row : row + 1, :length], alone_1U, rtol=0, atol=1e-5)
        assert (loss_BU[row, length:] == 0).all()


def test_the_teacher_is_frozen(tmp_path: Path) -> None:
    teacher = cpu_teacher(write_model(tmp_path, {**LLAMA, "attention_dropout": 0.5}))
    parameters = list(teacher.parameters())
    assert len(parameters) == 3 * 9 + 3 and not any(parameter.requires_grad for parameter in parameters)
    assert teacher.parameters_count == sum(parameter.numel() for parameter in parameters)
    before = teacher.loss(*batch(2, 9))
    assert not before.requires_grad and not before.is_inference()
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher.loss(*batch(2, 9)), before)


def test_its_losses_may_weigh_a_loss_with_a_gradient(tmp_path: Path) -> None:
    weight_BU = cpu_teacher(write_model(tmp_path, LLAMA)).loss(*batch(2, 9))
    student_loss_BU = torch.ones(2, 9, requires_grad=True)
    (student_loss_BU * weight_BU).sum().backward()
    assert student_loss_BU.grad is not None and torch.equal(student_loss_BU.grad, weight_BU)


def test_half_precision_keeps_exact_rope(tmp_path: Path) -> None:
    folder = write_model(tmp_path, LLAMA)
    teacher = open_teacher(folder, torch.bfloat16, "cpu")
    assert teacher.dtype == torch.bfloat16 and all(parameter.dtype == torch.bfloat16 for parameter in teacher.parameters())
    exact = dict(cpu_teacher(folder).named_buffers())
    buffers = dict(teacher.named_buffers())
    assert buffers.keys() == exact.keys() and len(exact) == 2
    assert all(torch.equal(buffers[name], exact[name]) for name in exact)


def test_rows_longer_than_the_teacher_reads_are_refused(tmp_path: Path) -> None:
    teacher = cpu_teacher(write_model(tmp_path, LLAMA))
    assert teacher.max_positions == 64
    assert teacher.loss(*batch(1, 64)).shape == (1, 64)
    with pytest.raises(ModelError, match=r"65 teacher tokens, .* 64"):
        teacher.loss(*batch(1, 65))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf"])
def test_a_path_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"at {tmp_path / name}"):
        cpu_teacher(tmp_path / name)
