"""Ranks that share rows: their selections, their attention and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot
from transformers import LlamaConfig

from megatron_vocagno.batch.whole_chunks import opens_chunk
from megatron_vocagno.engine.loss import GuidedObjective
from megatron_vocagno.engine.sequence import _require_same
from megatron_vocagno.model.attention import ULYSSES
from megatron_vocagno.model.student import build_layer
from megatron_vocagno.model.ulysses import register_ulysses
from megatron_vocagno.objective.statistics import STATS, summarize
from tests.datasets import build_dataset
from tests.engine import divided_selections as divided
from tests.errors.telling import told
from tests.runs import REPOSITORY, SCRIPT, STUDENT, Case, environment, metrics, spawn

THRESHOLDS = [STATS.index("threshold_sum"), STATS.index("thresholds")]


@pytest.mark.slow
def test_ranks_that_share_rows_select_what_one_rank_selects(tmp_path: Path) -> None:
    """Every scope, unit and weighting; ties on both sides of the border, and chunks that lie on both."""
    finished = spawn(4, [str(tmp_path)], ["-m", "tests.engine.divided_selections"])
    assert finished.returncode == 0, finished.stdout[-4000:]
    of_ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(4)]
    met = dict.fromkeys(["kept", "chunks over the border", "uneven", "ties over the border"], 0)
    for (*rule, seed), *results in zip(divided.CASES, *of_ranks, strict=True):
        rows = divided.make_rows(seed)
        batches = [divided.of_group(rows.inputs, group) for group in range(divided.GROUPS)]
        losses = list(rows.loss_BS.split(divided.ROWS))
        if rule[0] == "global":
            batches, losses = [rows.inputs], [rows.loss_BS]
        whole = [
            divided.learn(GuidedObjective(divided.guidance(*rule), torch.device("cpu")), loss_BS, inputs)
            for loss_BS, inputs in zip(losses, batches, strict=True)
        ]
        gradient_BS = torch.cat([each["gradient"] for each in whole])
        ours_BS = torch.cat([torch.cat([a["gradient"], b["gradient"]], 1) for a, b in (results[:2], results[2:])])
        assert torch.equal(ours_BS == 0, gradient_BS == 0), rule
        assert torch.allclose(ours_BS, gradient_BS, rtol=1e-6), rule
        assert torch.allclose(sum(each["loss"] for each in results), sum(each["loss"] for each in whole))
        sums, expected = (torch.stack([each["stats"] for each in ranks]).sum(0) for ranks in (results, whole))
        assert summarize(sums) == pytest.approx(summarize(expected)), rule
        # with scope `global`, each data-parallel rank counts the threshold
        sums[THRESHOLDS] /= divided.GROUPS if rule[0] == "global" else 1
        assert torch.allclose(sums, expected), rule
        for each in results:
            assert torch.equal(each["tokens"], each["gradient"].flatten().nonzero().squeeze(1))
        if rule[0] == "global":
            preselected_BS = torch.cat([results[0]["preselected"], results[2]["preselected"]])
            assert torch.equal(preselected_BS > 0, gradient_BS > 0) and torch.equal(
                results[0]["preselected"], results[1]["preselected"]
            )
        # what was met
        half = divided.WIDTH // 2
        met["kept"] += int((gradient_BS > 0).sum())
        met["uneven"] += int((gradient_BS[:, :half] > 0).sum() != (gradient_BS[:, half:] > 0).sum())
        first, last = rows.inputs.first_BS.numpy(), rows.inputs.last_BS.numpy()
        opens = [opens_chunk(a, b)[half] or a[half] == b[half] for a, b in zip(first, last, strict=True)]
        met["chunks over the border"] += rule[1] == "chunk" and not all(opens)
        met["ties over the border"] += rule[2] == "top_k" and seed % 3 == 0
    assert met["kept"] > 3000 and min(met.values()) > 10, met


def test_attention_of_divided_rows_is_proven_before_the_first_step() -> None:
    _require_same({"output": 1e-4, "gradient of the input": 0.0}, 2)
    for apart in (0.25, float("nan")):
        with told(
            snapshot(
                "parallel.sequence = 2: the output of a decoder layer on divided rows differs from that on whole rows by APART "
                "of its largest value (at most 0.001). Does this version of transformers call attention in another way, or does "
                "the backend exchange tensors wrongly?"
            ),
            APART=f"{apart:.2g}",
        ):
            _require_same({"output": apart}, 2)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["masks", "heads", "gradient"])
def test_a_wrong_exchange_stops_the_run_before_its_first_step(case: Case, fault: str) -> None:
    """Attention within the part of a rank, heads in another order, and a gradient that stays on its rank."""
    arguments = case.command(f"wrong-{fault}", ["parallel.sequence=2", "training.steps=1"])
    finished = spawn(2, [fault, *arguments], ["tests/engine/wrong_exchange.py"])
    assert finished.returncode == 2, finished.stdout[-3000:]
    name = "gradient of the input" if fault == "gradient" else "output"
    assert f"the {name} of a decoder layer on divided rows differs from that on whole rows" in finished.stdout
    assert not (case.out(f"wrong-{fault}") / "checkpoints").exists()


def test_a_mask_is_not_dropped() -> None:
    register_ulysses(lambda x_NX: x_NX, 1)
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    config._attn_implementation = ULYSSES
    layer = build_layer(config, 1, seed=0)
    hidden_BSH, mask_B1SS = torch.randn(1, 4, 32), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="got a mask, but rows that are divided among ranks are attended as a whole"):
        layer.layer(hidden_BSH, position_embeddings=layer.positions(hidden_BSH, None), attention_mask=mask_B1SS)


# ---- whole runs


def of_steps(output: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(output) if "loss/train" in line]


FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 64},  # as long as a row
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64, "num_key_value_heads": 1, "query_pre_attn_scalar": 32},
}


@pytest.mark.slow
def test_students_of_other_families_can_be_divided(case: Case) -> None:
    for ranks in (1, 2):
        runs = []
        for family, changes in FAMILIES.items():
            student = STUDENT | {"model_type": family, "num_hidden_layers": 2} | changes
            overrides = ["training.steps=2", f"parallel.sequence={ranks}"]
            runs.append(replace(case, student=student).command(f"{family}-{ranks}", overrides))
        path = case.folder / f"families-{ranks}.json"
        path.write_text(json.dumps(runs))
        finished = spawn(ranks, [str(path)], ["tests/several_runs.py"])
        assert finished.returncode == 0, finished.stdout[-4000:]
    losses = set()
    for family in FAMILIES:
        one, two = case.out(f"{family}-1"), case.out(f"{family}-2")
        for name in ("loss/train", "optimizer/grad_norm", "guidance/excess_kept"):
            assert of_steps(two, name) == pytest.approx(of_steps(one, name), rel=1e-5), (family, name)
        losses.add(of_steps(one, "loss/train")[-1])
    assert len(losses) == len(FAMILIES)


def long_case(case: Case, row_length: int) -> list[str]:
    """Overrides for rows of `row_length` tokens, and a student that is small enough for them."""
    folder = case.folder / f"rows-of-{row_length}"
    if not folder.exists():
        sentence = "".join(f"Sentence {n} of a long document, which is {n * n} words long. " for n in range(row_length // 7))
        build_dataset(folder, [sentence], case.tokenizer("student"), case.tokenizer("teacher"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": row_length}
    student = [f"student.config.{name}={value}" for name, value in small.items()]
    dataset = folder / "dataset" if (folder / "dataset").exists() else folder
    common = [f"data.train={dataset}", f"data.row_length={row_length}", "eval.rows=1", "training.steps=2"]
    return [*common, *student, "guidance.objective=student", "guidance.scope=sequence"]


@pytest.mark.long
@pytest.mark.slow
def test_rows_of_32k_tokens_on_two_ranks(case: Case) -> None:
    overrides = long_case(case, 32_768)
    settings = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
    one = case.run("long-1", 1, overrides, settings)
    two = case.run("long-2", 2, [*overrides, "parallel.sequence=2"], settings | {"zero_optimization": {"stage": 3}})
    assert of_steps(one, "throughput/student_tokens")[0] > 30_000
    for name in ("loss/train", "optimizer/grad_norm", "loss/all_tokens", "guidance/student_loss_kept"):
        assert of_steps(two, name) == pytest.approx(of_steps(one, name), rel=1e-5), name
    assert of_steps(two, "guidance/share_kept") == of_steps(one, "guidance/share_kept")


@pytest.mark.long
@pytest.mark.slow
def test_deepspeeds_launcher_starts_ranks_that_share_rows(case: Case) -> None:
    """Under each ZeRO stage, the losses and gradient norms are those of one process."""
    overrides = ["training.steps=3", "teacher.placement=replicated"]
    one = case.run("launched-1", 1, overrides)
    for stage in (1, 2, 3):
        arguments = case.command(
            f"launched-{stage}-2", [*overrides, "parallel.sequence=2"], {"zero_optimization": {"stage": stage}}
        )
        variables = environment()
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", variables["MASTER_PORT"]]
        finished = subprocess.run(
            [*launcher, SCRIPT, *arguments],
            cwd=REPOSITORY,
            env=variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
        two = case.out(f"launched-{stage}-2")
        assert "1 data-parallel x 2 ranks per row" in finished.stdout
        for name in ("loss/train", "optimizer/grad_norm", "loss/all_tokens"):
            assert of_steps(two, name) == pytest.approx(of_steps(one, name), rel=1e-5), (stage, name)
