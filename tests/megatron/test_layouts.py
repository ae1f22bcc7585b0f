"""Guided steps in Megatron equal those of one process in every layout, and those of this project's own engine."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.runs import REPOSITORY, SMALL_VOCABULARY, STUDENT, Case, environment, metrics, spawn

if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

STEPS = 3
CHUNKS = {"unit": "chunk", "weighting": "control_variate"}
ROWS = {"unit": "chunk", "scope": "sequence", "unmapped": "exclude"}
STEP, WHOLE = {"scope": "global", "aggregate": "mean"}, {"micro_batch": 8}
AHEAD = {"unit": "chunk", "require_positive": True, "keep": 0.9}
ENGINE: dict[str, tuple[dict[str, Any], int]] = {
    "tokens": ({}, 2),
    "chunks": (CHUNKS, 2),
    "rows": (ROWS, 2),
    "step": (STEP, 8),
    "ahead": (AHEAD, 2),
}
"""Name -> the rule, and rows of a micro-batch."""
ALONE: dict[str, dict[str, Any]] = {
    "tokens": {},
    "chunks": {"rule": CHUNKS},
    "rows": {"rule": ROWS},
    "step": {"rule": STEP, **WHOLE},
    "ahead": {"rule": AHEAD},
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("tokens", {"tensor": 2}),
    "pp2": ("tokens", {"pipeline": 2}),
    "dp2": ("tokens", {"data_parallel": 2}),
    "dp2-distributed-optimizer": ("tokens", {"data_parallel": 2, "distributed_optimizer": True}),
    "tp2-pp2": ("tokens", {"tensor": 2, "pipeline": 2}),
    "cp2": ("tokens", {"context": 2}),
    "cp2-chunks": ("chunks", {"context": 2, "rule": CHUNKS}),
    "cp2-rows": ("rows", {"context": 2, "rule": ROWS}),
    "tp2-rows": ("rows", {"tensor": 2, "rule": ROWS}),
    "pp2-chunks": ("chunks", {"pipeline": 2, "rule": CHUNKS}),
    "dp2-step": ("step", {"data_parallel": 2, "rule": STEP, "micro_batch": 4}),
    "cp2-dp2-step": ("step", {"context": 2, "data_parallel": 2, "rule": STEP, "micro_batch": 4}),
    "tp2-ahead": ("ahead", {"tensor": 2, "rule": AHEAD}),
}
"""Name -> the case of one process that it equals, and the layout."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def data(scored_case: Case) -> Path:
    return scored_case.train


@pytest.fixture(scope="module")
def student(small_case: Case, folder: Path) -> Path:
    """With weights so large that losses differ between tokens from the first step on."""
    config = AutoConfig.for_model(**STUDENT | {"num_hidden_layers": 2, "vocab_size": SMALL_VOCABULARY})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder / "student")
    for file in small_case.tokenizer("student").iterdir():
        shutil.copy(file, folder / "student" / file.name)
    return folder / "student"


@pytest.fixture(scope="module")
def in_megatron(data: Path, student: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What each case of layouts.py has left, by its name."""
    cases = ALONE | {name: layout for name, (_, layout) in LAYOUTS.items()}
    # from the third row of the second step on: a restart after ten consumed samples
    cases |= {"restarted": {"first_row": 8, "steps": 1}, "evaluated": {"evaluate": True, "steps": 1}}
    same = {"student": str(student), "data": str(data), "out": str(folder)}
    (folder / "cases.json").write_text(json.dumps([{"name": name, **same, **case} for name, case in cases.items()]))
    command = [sys.executable, "-W", "ignore", "-m", "tests.megatron.layouts", str(folder / "cases.json")]
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-6000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


@pytest.fixture(scope="module")
def in_engine(scored_case: Case, student: Path) -> dict[str, Path]:
    """The output folder of the engine's run by each rule."""
    case, commands = scored_case, []
    for name, (rule, micro_batch) in ENGINE.items():
        overrides = [
            *(f"guidance.{field}={str(value).lower()}" for field, value in rule.items()),
            *("student.config={}", f"student.pretrained={student}", "teacher.placement=cached"),
            *(f"training.steps={STEPS}", "training.schedule.warmup_steps=0", "training.schedule.kind=constant"),
        ]
        optimizer = {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}}
        settings = {"train_micro_batch_size_per_gpu": micro_batch, "optimizer": optimizer}
        commands.append(case.command(f"megatron-{name}", overrides, settings))
    runs = case.folder / "megatron-runs.json"
    runs.write_text(json.dumps(commands))
    finished = spawn(1, [str(runs)], ("tests/several_runs.py",))
    assert finished.returncode == 0, finished.stdout[-6000:]
    return {name: case.out(f"megatron-{name}") for name in ENGINE}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(in_megatron: dict[str, dict[str, Any]], name: str) -> None:
    alone, layout = in_megatron[LAYOUTS[name][0]], in_megatron[name]
    assert layout["number"] == alone["number"] and len(alone["number"]) == STEPS
    np.testing.assert_array_equal(np.array(layout["weights"]) > 0, np.array(alone["weights"]) > 0)
    np.testing.assert_allclose(layout["weights"], alone["weights"], atol=1e-5)
    for key in alone.keys() - {"weights"}:
        np.testing.assert_allclose(layout[key], alone[key], rtol=2e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ENGINE)
def test_megatron_equals_the_engine(in_megatron: dict[str, dict[str, Any]], in_engine: dict[str, Path], name: str) -> None:
    """The same rows, the same weights of tokens, losses and gradient norms, from the same initial weights."""
    ours, theirs = metrics(in_engine[name]), in_megatron[name]
    steps = [line for line in ours if "loss/train" in line]
    chosen = np.load(in_engine[name] / "chosen-0.npy")
    weights = np.array(theirs["weights"])
    assert weights.shape == chosen.shape == (STEPS * 8, 64)
    assert 0 < (chosen > 0).mean() < 0.9
    if name == "ahead":  # the planned number is above the sum of the weights
        assert chosen.sum() < 0.95 * sum(theirs["number"])
    np.testing.assert_array_equal(weights > 0, chosen > 0)
    np.testing.assert_allclose(weights, chosen, atol=1e-5)
    for key, own in {"lm loss": "loss/train", "gradient norm": "optimizer/grad_norm"}.items():
        np.testing.assert_allclose(theirs[key], [line[own] for line in steps], rtol=1e-5, err_msg=key)
    for key in ("guidance/share_kept", "guidance/excess_kept", "guidance/excess_dropped", "guidance/likelihood_ratio"):
        np.testing.assert_allclose(theirs[key], [line[key] for line in steps], rtol=1e-5, atol=1e-6, err_msg=key)


def test_the_rules_choose_different_tokens(in_megatron: dict[str, dict[str, Any]]) -> None:
    chosen = {json.dumps((np.array(in_megatron[name]["weights"][:8]) > 0).tolist()) for name in ALONE}
    assert len(chosen) == len(ALONE)


def test_a_restart_reads_on_after_the_consumed_samples(in_megatron: dict[str, dict[str, Any]]) -> None:
    """Its student is the initial one, so only the rows are those of the second step."""
    first, restarted = in_megatron["tokens"], in_megatron["restarted"]
    assert restarted["guidance/share_unmapped"] == first["guidance/share_unmapped"][1:2] != first["guidance/share_unmapped"][:1]


def test_evaluation_is_the_mean_loss_of_all_tokens(in_megatron: dict[str, dict[str, Any]]) -> None:
    """The report of the first step has this mean too."""
    evaluated, first = in_megatron["evaluated"], in_megatron["tokens"]
    np.testing.assert_allclose(evaluated["lm loss"], first["guidance/student_loss_all"][:1], rtol=1e-6)
    assert evaluated["number"] > [2 * number for number in first["number"][:1]]
