"""The student equals Hugging Face's model: losses, gradients, names; and it is the same student however it is cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model import student as student_module
from megatron_vocagno.model.configuration import check_row_length, student_config
from megatron_vocagno.model.folder import PretrainedWeights, to_hugging_face
from megatron_vocagno.model.student import (
    Embedding,
    Student,
    build_layer,
    hf_name,
    layer_count,
    layer_parameters,
    load_layer,
    logit_softcap,
    tied_head,
)
from megatron_vocagno.model.weights import check_weights
from megatron_vocagno.objective.linear_ce import token_loss
from tests.model.tiny import POSITIONS, SIZES, VOCAB, batch, each_family, reference, reference_loss, write_model

LLAMA = {"model_type": "llama", **SIZES}


def loaded(folder: Path, seed: int = 7) -> Student:
    student = Student(student_config(folder), seed)
    student.load(PretrainedWeights(folder))
    return student


def named_gradients(student: Student) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in student.named_parameters():
        _, i, local_name = name.split(".", 2)
        assert parameter.grad is not None, name
        gradients[hf_name(student.config, int(i), local_name)] = parameter.grad
    return gradients


@each_family
def test_losses_and_gradients_equal_those_of_hugging_face(spec: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path, spec)
    theirs, ours = reference(folder), loaded(folder)
    ids_BS, target_BS = batch(2, 17)

    expected_BS, loss_BS = reference_loss(theirs, ids_BS, target_BS), ours(ids_BS, target_BS)
    assert loss_BS.dtype == torch.float32
    torch.testing.assert_close(loss_BS, expected_BS, rtol=0, atol=1e-5)
    ignored_BS = target_BS == -100
    assert ignored_BS.sum() == 7 and (loss_BS[ignored_BS] == 0).all() and (loss_BS[~ignored_BS] > 0).all()

    weight_BS = torch.rand(loss_BS.shape, generator=torch.Generator().manual_seed(2))
    (expected_BS * weight_BS).sum().backward()
    (loss_BS * weight_BS).sum().backward()
    gradients = named_gradients(ours)
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        atol = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@each_family
def test_layers_in_a_chain_are_the_student(spec: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path, spec)
    config, weights = student_config(folder), PretrainedWeights(folder)
    layers = [build_layer(config, i, seed=0) for i in range(layer_count(config))]
    for i, layer in enumerate(layers):
        load_layer(config, i, layer, weights)
    ids_BS, target_BS = batch(2, 11)
    *body, head = layers
    value: Any = ids_BS
    for layer in body:
        value = layer(value)
    expected_BS = loaded(folder)(ids_BS, target_BS)

    hidden_BSH, weight_VH = head(value)
    # a view, never the parameter: see Head
    assert weight_VH._base is head.weight and not weight_VH.is_leaf and torch.equal(weight_VH, head.weight)
    softcap = logit_softcap(config)
    loss_BS = token_loss(hidden_BSH.flatten(0, 1), weight_VH, target_BS.flatten(), softcap=softcap).view(2, 11)
    assert torch.equal(loss_BS, expected_BS)
    if config.tie_word_embeddings:
        assert isinstance(body[0], Embedding)
        hidden_BSH, weight_VH = tied_head(body[0], value)
        assert torch.equal(weight_VH, head.weight) and torch.equal(hidden_BSH, value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope_is_hugging_faces(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**LLAMA, "rope_parameters": rope})
    ids_BS, target_BS = batch(1, POSITIONS)
    expected_BS = reference_loss(reference(folder), ids_BS, target_BS)
    torch.testing.assert_close(loaded(folder)(ids_BS, target_BS), expected_BS, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.half().float()])
def test_rope_frequencies_survive_every_cast(cast: Any) -> None:
    layer = build_layer(student_config(LLAMA), 1, seed=0)
    before = dict(layer.named_buffers())
    after = dict(cast(layer).named_buffers())
    assert len(before) == 2
    for name, buffer in before.items():
        assert buffer.dtype == torch.float32 and torch.equal(after[name], buffer), name
    assert layer.state_dict().keys() == dict(layer.named_parameters()).keys(), "frequencies have no place in a checkpoint"


@each_family
def test_a_layer_depends_only_on_seed_and_index(spec: dict[str, Any]) -> None:
    config = student_config(spec)
    count = layer_count(config)
    student_module._parts.cache_clear()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    upwards = [build_layer(config, i, seed=3).state_dict() for i in range(count)]
    assert torch.equal(torch.get_rng_state(), before), "building a layer used torch's own generator"

    torch.manual_seed(12)
    downwards = [build_layer(config, i, seed=3).state_dict() for i in reversed(range(count))][::-1]
    other_seed = [build_layer(config, i, seed=4).state_dict() for i in range(count)]
    whole = Student(config, seed=3)
    matrices = 0
    for i in range(count):
        mine = whole.layers[i].state_dict()
        assert mine.keys() == upwards[i].keys()
        for name, tensor in upwards[i].items():
            assert torch.equal(tensor, downwards[i][name]) and torch.equal(tensor, mine[name])
            if tensor.ndim == 2:
                matrices += 1
                assert not torch.equal(tensor, other_seed[i][name])
                assert abs(float(tensor.std()) / config.initializer_range - 1) < 0.1, name
            else:
                one = 0 if spec["model_type"].startswith("gemma") else 1  # Gemma's norms scale by 1 + weight
                assert (tensor == (0 if name.endswith("bias") else one)).all(), name
    assert matrices == 2 + 7 * config.num_hidden_layers
    assert not torch.equal(upwards[1]["layer.mlp.up_proj.weight"], upwards[2]["layer.mlp.up_proj.weight"])
    assert torch.equal(upwards[0]["weight"], upwards[-1]["weight"]) == config.tie_word_embeddings


@each_family
def test_names_map_one_to_one_onto_hugging_faces(spec: dict[str, Any]) -> None:
    config = student_config(spec)
    with torch.device("meta"):
        theirs = {name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()}
    ours = {}
    for i in range(layer_count(config)):
        for local_name, _ in build_layer(config, i, seed=0).named_parameters():
            name = hf_name(config, i, local_name)
            assert name not in ours or (config.tie_word_embeddings and i == layer_count(config) - 1)
            ours[name] = i
    assert ours.keys() == theirs


@each_family
def test_export_gives_back_the_same_model(spec: dict[str, Any], tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", spec)
    student = loaded(source)
    state = {}
    for name, parameter in student.named_parameters():
        _, i, local_name = name.split(".", 2)
        state[hf_name(student.config, int(i), local_name)] = parameter
    torch.manual_seed(5)
    before = torch.get_rng_state()
    to_hugging_face(student.config, state, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)

    ids_BS, _ = batch(2, 9)
    with torch.no_grad():
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert torch.equal(again(ids_BS).logits, original(ids_BS).logits)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ("lm_head.weight" in PretrainedWeights(tmp_path / "out")) != student.config.tie_word_embeddings

    to_hugging_face(student.config, state, tmp_path / "half", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in state.values())


def test_tied_head_is_the_embedding_and_is_counted_once() -> None:
    tied, untied = (student_config({**LLAMA, "tie_word_embeddings": tie}) for tie in (True, False))
    student = Student(tied, seed=0)
    assert student.layers[-1].weight is student.layers[0].weight
    counts = [sum(parameter.numel() for parameter in Student(config, seed=0).parameters()) for config in (untied, tied)]
    assert counts[0] - counts[1] == VOCAB * tied.hidden_size


def test_no_token_is_padding_to_the_student(tmp_path: Path) -> None:
    """transformers freezes the embedding of pad_token_id; the rows here are packed, and that token is often EOS."""
    student = Student(student_config({**LLAMA, "pad_token_id": 2}), seed=0)
    ids_BS, target_BS = batch(2, 9)
    ids_BS[0, 0] = 2
    student(ids_BS, target_BS).sum().backward()
    embedding = student.layers[0].weight
    assert isinstance(embedding, nn.Parameter) and embedding.grad is not None
    assert embedding[2].abs().max() > 0 and embedding.grad[2].abs().max() > 0


def saved_bytes(student: Student, ids_BS: Tensor, target_BS: Tensor) -> tuple[int, Tensor]:
    """What a forward keeps for its backward besides the weights, and the losses. Recomputation keeps inputs without telling."""
    seen: dict[int, int] = {parameter.untyped_storage().data_ptr(): 0 for parameter in student.parameters()}
    inputs: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in student.layers
        if getattr(layer, "recompute", False)
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_BS = student(ids_BS, target_BS)
    for handle in handles:
        handle.remove()
    for tensor in inputs:
        pack(tensor)
    return sum(seen.values()), loss_BS


@each_family
def test_recomputation_keeps_less_and_learns_the_same(spec: dict[str, Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path, spec)
    kept, losses, gradients = [], [], []
    for recompute in (False, True):
        student = Student(student_config(folder), seed=0, recompute=recompute)
        student.load(PretrainedWeights(folder))
        held, loss_BS = saved_bytes(student, *batch(2, 40))
        loss_BS.sum().backward()
        kept.append(held)
        losses.append(loss_BS)
        gradients.append(named_gradients(student))
    assert kept[1] < 0.4 * kept[0], kept
    assert torch.equal(*losses)
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"type 'gpt2' are not supported; supported types: llama, mistral, qwen2, qwen3, gemma"),
        ({"model_type": None}, r"has no 'model_type'; supported types: llama, mistral"),
        ({"num_hiden_layers": 4}, r"no field 'num_hiden_layers' in a llama model; did you mean 'num_hidden_layers'\?"),
        ({"xyzzy": 1}, r"no field 'xyzzy' in a llama model$"),
        ({"hidden_size": "many"}, r"not a valid llama model"),
        ({"num_attention_heads": 5}, r"not a valid llama model.*multiple"),
    ],
)
def test_a_wrong_specification_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}"):
        student_config({**LLAMA, **change})


def test_vocabulary_comes_from_the_tokenizer_and_must_fit_it() -> None:
    open_size = {key: value for key, value in LLAMA.items() if key != "vocab_size"}
    assert student_config(open_size, vocab_size=300).vocab_size == 300
    assert student_config(LLAMA, vocab_size=VOCAB - 1).vocab_size == VOCAB, "padding rows are fine"
    assert student_config(LLAMA, vocab_size=VOCAB + 1, rows=VOCAB).vocab_size == VOCAB, "no text gives its last id"
    with pytest.raises(ModelError, match=r"tokenizer has 212 tokens, the student model has 211"):
        student_config(LLAMA, vocab_size=VOCAB + 1)
    with pytest.raises(ModelError, match="no vocab_size"):
        student_config(open_size)


def test_rows_that_the_model_cannot_read_are_refused() -> None:
    config = student_config(LLAMA)
    check_row_length(config, POSITIONS)
    with pytest.raises(ModelError, match=r"65 tokens \(data.row_length\), .* 64"):
        check_row_length(config, POSITIONS + 1)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "llama", LLAMA)
    weights = PretrainedWeights(folder)

    def load(change: dict[str, Any], i: int) -> None:
        config = student_config({**LLAMA, **change})
        load_layer(config, i, build_layer(config, i, seed=0), weights)

    with pytest.raises(
        ModelError, match=r"vocabulary mismatch at model.embed_tokens.weight.*211 tokens.*student 300 \(300, 48\)"
    ):
        load({"vocab_size": 300}, 0)
    with pytest.raises(ModelError, match=r"shape mismatch at model.layers.0.mlp.gate_proj.weight.*\(80, 48\).*\(96, 48\)"):
        load({"intermediate_size": 96}, 1)
    with pytest.raises(ModelError, match=r"has no tensor model.layers.3.self_attn.q_proj.weight"):
        load({"num_hidden_layers": 4}, 4)
    with pytest.raises(ModelError, match=r"has no tensor model.layers.0.*bias"):
        load({"attention_bias": True}, 1)

    biased = PretrainedWeights(write_model(tmp_path / "biased", {**LLAMA, "attention_bias": True}))
    config = student_config(LLAMA)
    with pytest.raises(ModelError, match=r"model.layers.0.self_attn.._proj.bias"):
        check_weights(biased, config)
    tied = PretrainedWeights(write_model(tmp_path / "tied", {**LLAMA, "tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"no tensor lm_head.weight.*tie_word_embeddings"):
        load_layer(config, 5, build_layer(config, 5, seed=0), tied)


@each_family
def test_parameters_are_counted_without_making_them(spec: dict[str, Any]) -> None:
    config = student_config(spec)
    counted = [layer_parameters(config, i) for i in range(layer_count(config))]
    assert counted == [sum(p.numel() for p in build_layer(config, i, seed=0).parameters()) for i in range(layer_count(config))]


def test_dropout_is_refused() -> None:
    with pytest.raises(ModelError, match=r"attention_dropout is 0\.1; set it to 0"):
        student_config({"model_type": "llama", "attention_dropout": 0.1}, vocab_size=100)
