"""Parameters and FLOPs of a plan, compared with built models and with the FLOPs that PyTorch counts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vocagno.config import Guidance
from megatron_vocagno.errors import ModelError, RunError
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.student import Student
from megatron_vocagno.objective.linear_ce import SelectedTokens
from megatron_vocagno.objective.rule import Rule
from megatron_vocagno.objective.selection import planned_kept
from megatron_vocagno.planning.cost import _passes, learned_share
from megatron_vocagno.planning.layouts import Stage
from megatron_vocagno.planning.model_config import read_config
from megatron_vocagno.planning.sizes import sizes
from tests.runs import REPOSITORY

ROWS, LENGTH = 2, 96
SIZES: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = [
    {"model_type": "llama", **SIZES},
    {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    {"model_type": "mistral", **SIZES, "sliding_window": None, "hidden_size": 96},
    {"model_type": "qwen2", **SIZES, "intermediate_size": 320},
    {"model_type": "qwen3", **SIZES, "head_dim": 32},
    {"model_type": "gemma", **SIZES, "head_dim": 16},
    {"model_type": "gemma3_text", **SIZES, "head_dim": 32, "sliding_window": 128},
]
each_model = pytest.mark.parametrize(
    "spec", MODELS, ids=[f"{m['model_type']}{'-tied' * bool(m.get('tie_word_embeddings'))}" for m in MODELS]
)


@pytest.mark.parametrize(("name", "count"), [("TinyLlama-1.1B", 1_100_048_384), ("Qwen2.5-Math-7B", 7_615_616_512)])
def test_the_shipped_configurations_have_the_parameters_that_these_models_are_known_for(name: str, count: int) -> None:
    found = sizes(read_config(REPOSITORY / "examples/plan" / f"{name}.json", "student"))
    assert found.parameters == count
    assert Stage(found.layers, embedding=True, head=True).parameters(found) == count


@each_model
def test_parameters_are_those_of_the_model_that_is_trained(spec: dict[str, Any]) -> None:
    config = student_config(spec)
    found = sizes(config)
    built = {id(parameter): parameter.numel() for parameter in Student(config, 0).parameters()}
    assert found.parameters == sum(built.values())
    assert Stage(found.layers, embedding=True, head=True).parameters(found) == found.parameters
    halves = Stage(1, embedding=True, head=False), Stage(found.layers - 1, embedding=False, head=True)
    assert sum(half.parameters(found) for half in halves) == found.parameters + found.tied * found.embedding


@each_model
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_a_step_computes(spec: dict[str, Any], recompute: bool) -> None:
    config = student_config(spec)
    student, found, tokens = Student(config, 0, recompute), sizes(config), ROWS * LENGTH
    learned = tokens * 2 // 5
    ids_BS, selected = torch.randint(0, found.vocabulary, (ROWS, LENGTH)), SelectedTokens()
    # fused attention is not counted on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_BS = student(ids_BS, ids_BS, selected)
        forward = counter.get_total_flops()
        selected.set(torch.arange(learned))
        (loss_BS.flatten() * (torch.arange(tokens) < learned)).sum().backward()
    planned = _passes(Stage(found.layers, True, True), found, tokens, LENGTH, 1, learned / tokens, recompute)
    # torch counts the whole square of attention, we the half under the diagonal
    square = found.layers * tokens * 4 * found.attention_width * (LENGTH - (LENGTH + 1) / 2)
    # transformers 5.17 also multiplies positions and frequencies
    near = partial(pytest.approx, rel=2e-4)
    assert forward == near(planned[0] + square)
    backward = planned[1] + (2 + recompute) * square
    # recomputing stops where nothing more is needed: some layers end with a product that nothing has to keep
    last_product = recompute * found.layers * tokens * 2 * spec["hidden_size"] * spec["intermediate_size"]
    assert counter.get_total_flops() - forward in (near(backward), near(backward - last_product))


def test_the_head_learns_the_share_of_tokens_that_the_selection_plans() -> None:
    met = 0
    for keep in (0.1, 0.4, 0.6, 1.0):
        for unmapped in (0.0, 0.003, 0.2):
            for policy in ("include", "exclude"):
                guidance = Guidance(keep=keep, unmapped=policy)
                lost = round(unmapped * 100_000)
                kept = planned_kept([100_000 - lost], [lost], Rule(keep=keep, unmapped=policy))
                assert learned_share(guidance, 4, unmapped) == pytest.approx(kept / 100_000, abs=1e-4)
                met += 1
    assert met == 24
    assert learned_share(Guidance(objective="clm"), 4, 0.0) == learned_share(Guidance(scope="global"), 1, 0.0) == 1.0


def test_a_configuration_that_is_not_there_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no config\.json.*\n.*--teacher-config"):
        read_config(tmp_path / "model.gguf", "teacher")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match=r"config\.json is not a configuration .*Field 'hidden_size' expected int"):
        read_config(tmp_path, "student")
