"""All that a GGUF file says of its model and of what stands before a text is in the folder, or the file is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.fingerprint import CONVERTED, teacher_fingerprint
from megatron_vocagno.model.folder import PretrainedWeights
from megatron_vocagno.model.gguf import dequantize
from tests.model.tiny_gguf import HEADS, HIDDEN, LAYERS, VOCAB, write_gguf

WIDTH = HIDDEN // HEADS


def converted(tmp_path: Path, **asked: Any) -> Path:
    return dequantize(write_gguf(tmp_path / "tiny.gguf", **asked), tmp_path / "out")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] % len(VOCAB)).logits


def with_rope(folder: Path, **rope: Any) -> Any:
    """The same weights in a Llama of transformers with another RoPE."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    config = copy.deepcopy(whole.config)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    model = LlamaForCausalLM(config)
    model.load_state_dict(whole.state_dict())
    return model


def test_frequencies_that_are_divided_by_a_tensor_are_those_of_llama_3(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = converted(tmp_path / "plain")
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = with_rope(plain, **rope, original_max_position_embeddings=128)
    divisors = with_rope(plain, rope_type="default").model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    assert divisors.max() == 32 and divisors.min() == 1
    folder = converted(tmp_path, tensors={"rope_freqs.weight": divisors.numpy()})
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(scaled), rtol=0, atol=1e-5)
    assert (logits(scaled) - logits(AutoModelForCausalLM.from_pretrained(plain))).abs().max() > 0.01


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
        ({"rope.scaling.type": "none", "rope.scaling.finetuned": True}, {"rope_type": "default"}),
        ({}, {"rope_type": "default"}),
    ],
)
def test_scaled_rope_is_read_from_keys(keys: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    folder = converted(tmp_path, keys={f"llama.{name}": value for name, value in keys.items()})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {name: model.config.rope_parameters[name] for name in rope} == rope
    torch.testing.assert_close(logits(model), logits(with_rope(folder, **rope)), rtol=0, atol=1e-6)


def test_biases_and_heads_of_their_own_width_are_kept(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    rows = {"attn_q": 2 * HIDDEN, "attn_k": 2 * HIDDEN, "attn_v": 2 * HIDDEN, "attn_output": HIDDEN}
    biases = {
        f"blk.{layer}.{part}.bias": generator.normal(size=length).astype(np.float32)
        for layer in range(LAYERS)
        for part, length in rows.items()
    }
    keys = {"llama.attention.key_length": HIDDEN, "llama.attention.value_length": HIDDEN}
    folder = converted(tmp_path, tensors=biases, width=HIDDEN, keys=keys)
    weights = PretrainedWeights(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == HIDDEN and config["attention_bias"]
    for layer in range(LAYERS):
        for part, name in (("attn_v", "v_proj"), ("attn_output", "o_proj")):
            kept = weights.tensor(f"model.layers.{layer}.self_attn.{name}.bias")
            assert np.array_equal(kept.numpy(), biases[f"blk.{layer}.{part}.bias"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"keys": {"llama.logit_scale": 2.0}}, r"has llama.logit_scale = 2.0, which cannot be converted: the value would be lost"),
    ({"keys": {"llama.attention.sliding_window": 8}}, "has llama.attention.sliding_window = 8"),
    ({"keys": {"llama.final_logit_softcapping": 30.0}}, "has llama.final_logit_softcapping = 30"),
    ({"keys": {"llama.expert_count": 4}}, "has llama.expert_count = 4"),
    ({"keys": {"llama.attention.causal": False}}, "has llama.attention.causal = False"),
    ({"keys": {"llama.rope.scaling.yarn_log_multiplier": 0.1}}, "has llama.rope.scaling.yarn_log_multiplier"),
    (
        {"keys": {"llama.attention.key_length": [16, 8]}},
        r"has llama.attention.key_length = \[16, 8\]: different values per layer cannot be converted",
    ),
    (
        {"keys": {"llama.rope.dimension_count": 8}},
        "rope.dimension_count = 8 and heads of width 16: a llama model of transformers rotates complete heads",
    ),
    (
        {"keys": {"llama.attention.key_length": 16, "llama.attention.value_length": 8}},
        "key_length = 16 and attention.value_length = 8: a llama model of transformers has equal widths",
    ),
    ({"keys": {"llama.rope.scaling.type": "su"}}, "the GGUF file scales RoPE in a way that cannot be converted: type su"),
    ({"keys": {"llama.rope.scaling.attn_factor": 1.2}}, "attn_factor 1.2"),
    (
        {"architecture": "starcoder2"},
        "GGUF files of architecture 'starcoder2' are not supported; supported architectures: llama, qwen2",
    ),
    (
        {"tensors": {"blk.0.attn_sinks.weight": np.ones(2, np.float32)}},
        r"has 1 tensors that a llama model of transformers does not have, for example blk.0.attn_sinks.weight: they would",
    ),
    (
        {"tensors": {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}},
        r"lacks 7 tensors of a llama model, for example model.layers",
    ),
    (
        {"width": HIDDEN},
        r"k_proj.weight in .* is \(64, 32\), but by the file's keys it is \(32, 32\) in a llama model. "
        "Use the model's folder with safetensors",
    ),
    ({"drop": "blk.1.ffn_up"}, r"lacks 1 tensors of a llama model, for example model.layers.1.mlp.up_proj.weight"),
    (
        {"keys": {"llama.block_count": 1}},
        r"has 9 tensors that a llama model of transformers does not have, for example blk.1.ffn_gate.weight",
    ),
    (
        {"keys": {"tokenizer.ggml.add_bos_token": True}},
        r"requires BOS around a text \(tokenizer.*\), but has no tokenizer.ggml.bos_token_id",
    ),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_no_conversion_is_known_for_is_refused_by_name(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        converted(tmp_path, **asked)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]


A, BOS, END = VOCAB.index("a"), 3, len(VOCAB) - 1
AROUND: dict[str, tuple[dict[str, Any], list[int]]] = {
    "bytes-say-nothing": ({"keys": {"tokenizer.ggml.bos_token_id": BOS}}, [A]),
    "bytes-say-no": (
        {"rule": "llama-bpe", "keys": {"tokenizer.ggml.bos_token_id": BOS, "tokenizer.ggml.add_bos_token": False}},
        [A],
    ),
    "bytes-say-yes": ({"keys": {"tokenizer.ggml.bos_token_id": BOS, "tokenizer.ggml.add_bos_token": True}}, [BOS, A]),
    "llama-3-says-nothing": ({"rule": "llama-bpe", "keys": {"tokenizer.ggml.bos_token_id": BOS}}, [BOS, A]),
    "both": (
        {
            "keys": {
                "tokenizer.ggml.bos_token_id": BOS,
                "tokenizer.ggml.add_bos_token": True,
                "tokenizer.ggml.add_eos_token": True,
            }
        },
        [BOS, A, END],
    ),
    "pieces-say-nothing": ({"pieces": True, "rule": "default"}, [1]),
    "pieces-say-no": ({"pieces": True, "rule": "default", "keys": {"tokenizer.ggml.add_bos_token": False}}, []),
    "pieces-say-eos": ({"pieces": True, "rule": "default", "keys": {"tokenizer.ggml.add_eos_token": True}}, [1, 2]),
}


@pytest.mark.parametrize("case", AROUND)
def test_a_text_gets_the_bos_and_eos_that_the_file_specifies(case: str, tmp_path: Path) -> None:
    asked, expected = AROUND[case]
    folder = converted(tmp_path, **asked)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a").input_ids
    if asked.get("pieces"):
        # "▁a" is one piece or two, which is not asked here
        ids = [i for i in ids if i in (1, 2)]
    assert ids == expected
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert (told["add_bos_token"], told["add_eos_token"]) == (expected[:1] in ([BOS], [1]), expected[-1:] in ([END], [2]))


def test_a_folder_has_the_fingerprint_of_its_file_while_it_holds_its_numbers(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    folder = dequantize(source, tmp_path / "out")
    assert teacher_fingerprint(folder) == teacher_fingerprint(source)
    rounded = dequantize(source, tmp_path / "rounded", torch.bfloat16)
    assert not (rounded / CONVERTED).exists() and teacher_fingerprint(rounded) != teacher_fingerprint(source)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert teacher_fingerprint(folder) != teacher_fingerprint(source)
