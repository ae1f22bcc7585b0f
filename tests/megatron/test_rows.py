"""Rows for Megatron, the flags, and what is refused. One process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vocagno.batch.cached import CachedLosses
from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, TrainRows, collate
from megatron_vocagno.batch.whole_chunks import WholeChunks
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_ids
from megatron_vocagno.errors import DatasetError, RunError
from megatron_vocagno.integrations.megatron.arguments import (
    OTHER_DATA,
    add_arguments,
    flag,
    notes,
    open_datasets,
    require_supported,
    rule_of,
)
from megatron_vocagno.integrations.megatron.dataset import AlignedGPTDataset, GuidedGPTDataset
from megatron_vocagno.objective import Rule, select_tokens
from tests.runs import REPOSITORY, SMALL_VOCABULARY, Case

WITH_MEGATRON = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
ROW = 64


@pytest.fixture(scope="module")
def scored(scored_case: Case) -> Path:
    return scored_case.train


# ---- rows


@pytest.mark.parametrize("rule", [Rule(), Rule(aggregate="sum"), Rule(unit="chunk"), Rule(unit="chunk", weighting="threshold")])
def test_a_row_selects_as_the_whole_teacher_row_does(scored: Path, rule: Rule) -> None:
    """The losses of units stand for those of all teacher tokens."""
    data = AlignedDataset.open(scored)
    source = CachedLosses(data) if rule.unit == "token" else WholeChunks(CachedLosses(data), data)
    rows = TrainRows(data, ROW, 3, source, Front(front_ids(data.student_tokenizer.path) or ()))
    guided = GuidedGPTDataset(scored, ROW, 100, SMALL_VOCABULARY, 3, rule)
    random, chosen = torch.Generator().manual_seed(0), 0
    shared = 0
    for index in range(rows.rows_in_epoch + 3):
        row, whole = guided[index], collate([rows[index]], ROW)
        assert torch.equal(row["tokens"], whole.input_BS[0])
        valid_S = row["loss_mask"] > 0
        assert torch.equal(row["labels"][valid_S], whole.target_BS[0][valid_S])
        assert torch.equal(valid_S, whole.target_BS[0] != IGNORE)
        assert whole.teacher_losses is not None
        student_BS, valid_BS = 5 * torch.rand(1, ROW, generator=random), valid_S[None]
        losses_BU = torch.from_numpy(whole.teacher_losses[0])[None]
        theirs = select_tokens(student_BS, losses_BU, whole.first_BS, whole.last_BS, valid_BS, rule)
        guide = row[f"{rule.unit}_guide"][None]
        ours = select_tokens(student_BS, guide, row["first"][None], row["last"][None], valid_BS, rule)
        assert torch.equal(ours.weight_BS, theirs.weight_BS)
        np.testing.assert_allclose(ours.stats, theirs.stats, rtol=1e-6)
        chosen += int(ours.stats[3])
        shared += int((row["first"].diff() == 0).logical_and(row["first"][1:] < row["last"][1:]).sum())
    assert chosen > 100 and (shared > 500) == (rule.unit == "chunk")


def test_a_row_does_not_depend_on_the_rows_that_were_read(scored: Path) -> None:
    def rows() -> GuidedGPTDataset:
        return GuidedGPTDataset(scored, ROW, 100, SMALL_VOCABULARY, 3, Rule(unit="chunk"))

    read, fresh = rows(), rows()
    assert len(fresh) == 100
    before = [read[index] for index in range(20)]
    for name, tensor in fresh[17].items():  # NaN equals NaN here
        np.testing.assert_array_equal(before[17][name], tensor)
    assert not torch.equal(before[17]["tokens"], before[16]["tokens"])


@pytest.mark.slow
def test_the_whole_package_imports_neither_deepspeed_nor_transformers(scored: Path) -> None:
    """A row is read too: what is imported on first use counts."""
    program = f"""
import sys
from megatron_vocagno.integrations.megatron import arguments, dataset
from megatron_vocagno.objective import Rule
dataset.GuidedGPTDataset({str(scored)!r}, {ROW}, 8, {SMALL_VOCABULARY}, 0, Rule(unit="chunk"))[3]
if {importlib.util.find_spec("megatron") is not None}:
    from megatron_vocagno.integrations.megatron import step
print(sorted(name for name in ("deepspeed", "transformers", "megatron") if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.stdout in ("['megatron']\n", "[]\n"), run.stderr


# ---- the flags


def arguments(data: Path, *flags: str, **megatron: Any) -> Namespace:
    """Megatron-LM's namespace, as far as it is read."""
    parser = ArgumentParser(allow_abbrev=False)
    own = {"seq_length": ROW, "padded_vocab_size": SMALL_VOCABULARY, "seed": 0, "dataloader_type": "single", "eval_iters": 0}
    own |= {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "make_vocab_size_divisible_by": 128}
    parser.set_defaults(**own | {"tensor_model_parallel_size": 1} | megatron)
    return add_arguments(parser).parse_args(["--vocagno-data", str(data), *flags])


def test_the_flags_are_the_rule(scored: Path) -> None:
    assert rule_of(arguments(scored)) == Rule()
    flags = ["--keep=0.6", "--unit=chunk", "--scope=sequence", "--unmapped=exclude", "--aggregate=mean", "--require-positive"]
    assert rule_of(arguments(scored, *flags)) == Rule(0.6, "mean", "sequence", "exclude", True, None, "chunk")
    weighted = arguments(scored, "--weighting=control_variate", "--strength=0.5", "--clip=2", "--threshold=3")
    assert rule_of(weighted) == Rule(weighting="control_variate", strength=0.5, clip=2.0, threshold=3.0)
    with pytest.raises(RunError, match=r"a flag of the rule is out of range: keep = 1\.5: expected a share above 0"):
        rule_of(arguments(scored, "--keep=1.5"))


def test_the_datasets_of_a_run(small_case: Case, scored: Path) -> None:
    asked = arguments(scored, "--unit=chunk", f"--vocagno-valid={small_case.train}", eval_iters=2)
    train, valid = open_datasets(asked, 10, 6)
    assert valid is not None and (len(train), len(valid)) == (10, 6)
    assert "chunk_guide" in train[0] and list(valid[0]) == ["tokens", "labels", "loss_mask", "position_ids"]
    assert open_datasets(arguments(scored), 10, 0)[1] is None


@pytest.mark.parametrize("name", OTHER_DATA)
def test_what_reads_other_rows_is_refused(scored: Path, name: str) -> None:
    with pytest.raises(RunError) as told:
        require_supported(arguments(scored, **{name: True}))
    assert f"{flag(name)} is set, but rows come from --vocagno-data ({scored}): {OTHER_DATA[name]}. Remove it." == str(told.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shuffled": (
        {"dataloader_type": "cyclic"},
        "--dataloader-type cyclic orders the samples by itself: the rows are in their order already, and a restart "
        "continues with "
        "the row after the last consumed one. Use --dataloader-type single.",
    ),
    "nothing to evaluate on": (
        {"eval_iters": 5},
        "--eval-iters 5 without data to evaluate on: add --vocagno-valid DATASET, or --eval-iters 0",
    ),
    "small": (
        {"padded_vocab_size": 900},
        "its student ids go up to 999, the model's embedding has 900 rows: was the dataset built for another student? "
        "--vocab-size and --make-vocab-size-divisible-by give the rows.",
    ),
    "large": (
        {"padded_vocab_size": 2048},
        "its student tokenizer has 1,000 ids, and --tokenizer-type NullTokenizer gives the model 2,048, more than padding adds: "
        "was the dataset built for another student?\n"
        "  The dataset's own tokenizer is --tokenizer-type HuggingFaceTokenizer --tokenizer-model /",
    ),
    "short": ({"seq_length": 16}, " gives no rows of 16 positions: rows of 16 student positions are too short"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_run_that_would_be_another_is_refused(scored: Path, why: str) -> None:
    changed, message = REFUSED[why]
    with pytest.raises(RunError) as told:
        open_datasets(arguments(scored, **changed), 10, 0)
    assert message in str(told.value)


def test_another_tokenizer_is_refused(small_case: Case, scored: Path) -> None:
    def given(side: str) -> Namespace:
        return arguments(scored, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(small_case.tokenizer(side)))

    open_datasets(given("student"), 10, 0)
    with pytest.raises(DatasetError, match="its student ids were made with another tokenizer"):
        open_datasets(given("teacher"), 10, 0)


def test_a_dataset_without_losses_is_refused(small_case: Case) -> None:
    message = r"has no losses of its teacher, and in Megatron-LM a teacher must be cached: 0 of 2 shards are scored\.\n  .*score"
    with pytest.raises(RunError, match=message):
        open_datasets(arguments(small_case.train), 10, 0)


def test_the_routers_loss_is_noted(scored: Path) -> None:
    moe = {"num_experts": 8, "moe_aux_loss_coeff": 0.01}
    (note,) = notes(arguments(scored, **moe))
    assert "--moe-aux-loss-coeff 0.01" in note and "counts up to 2.5 times as much per token" in note
    assert not notes(arguments(scored)) and not notes(arguments(scored, "--weighting=threshold", **moe))


# ---- the step


@pytest.fixture
def forward(scored: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """forward_step on a row, with a model that is not called, and its rule."""
    from megatron_vocagno.integrations.megatron import step

    monkeypatch.setattr(step.parallel_state, "get_context_parallel_world_size", lambda: 1)
    monkeypatch.setattr(step.parallel_state, "get_context_parallel_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")

    class Model(torch.nn.Module):
        pre_process = post_process = True

        def __init__(self, longest: int, settings: dict[str, Any]) -> None:
            super().__init__()
            self.max_sequence_length = longest
            self.config = SimpleNamespace(**{"calculate_per_token_loss": True, "mtp_num_layers": None} | settings)

        def forward(self, tokens: Tensor, *_: Tensor, labels: Tensor) -> Tensor:
            return torch.full(tokens.shape, 2.0)

    def run(rule: Rule, rows: GuidedGPTDataset | AlignedGPTDataset, longest: int = ROW, **settings: Any) -> Any:
        def batches() -> Iterator[dict[str, Tensor]]:
            yield torch.utils.data.default_collate([rows[0], rows[1]])

        output, loss_func = step.forward_step(batches(), Model(longest, settings), rule)
        assert loss_func is not None
        return loss_func(output)

    return run


@WITH_MEGATRON
def test_a_step_that_would_be_another_is_refused(
    scored: Path, forward: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vocagno.integrations.megatron import step

    rows = GuidedGPTDataset(scored, ROW, 8, SMALL_VOCABULARY, 0, Rule())
    plain = AlignedGPTDataset(scored, ROW, 8, SMALL_VOCABULARY, 0)
    total, number, report = forward(Rule(), rows)
    assert float(total) == 2 * int(number) and report["lm loss"].tolist() == [float(total), int(number)]
    monkeypatch.setattr(step, "get_num_microbatches", lambda: 4)
    refused: list[tuple[Rule, AlignedGPTDataset, dict[str, Any], str]] = [
        (
            Rule(),
            rows,
            {"calculate_per_token_loss": False},
            "calculate_per_token_loss is False: Megatron would divide the loss of each micro-batch by its own number "
            "of tokens, and "
            "a step would be a mean of means.\n  Add --calculate-per-token-loss.",
        ),
        (
            Rule(),
            rows,
            {"mtp_num_layers": 1},
            "mtp_num_layers = 1: the losses of multi-token prediction have no guide, so they would count all tokens.\n"
            "  Remove --mtp-num-layers.",
        ),
        (
            Rule(),
            rows,
            {"longest": 32},
            "the dataset gives rows of 64 positions, and the model has 32: seq_length of the dataset is that of the "
            "run, --seq-length",
        ),
        (
            Rule(unit="chunk"),
            rows,
            {},
            "the rule has unit 'chunk', the rows have token_guide: give GuidedGPTDataset the rule of forward_step",
        ),
        (Rule(), plain, {}, "the rule has unit 'token', the rows have no guide: give GuidedGPTDataset the rule of forward_step"),
        (
            Rule(scope="global"),
            rows,
            {},
            "--scope global ranks the tokens of a step before its first backward pass, and a step has 4 "
            "micro-batches: Megatron-LM's "
            "schedules learn from each before they have the losses of all.\n  Use --scope microbatch, or make "
            "--global-batch-size "
            "the product of --micro-batch-size and the data-parallel ranks.",
        ),
    ]
    for rule, data, settings, message in refused:
        with pytest.raises(RunError) as told:
            forward(rule, data, **settings)
        assert str(told.value) == message


@WITH_MEGATRON
def test_rows_are_cut_as_megatron_cuts_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import utils

    from megatron_vocagno.integrations.megatron.step import own_positions

    class Group:
        def __init__(self, rank: int) -> None:
            self.at = rank

        def size(self) -> int:
            return 4

        def rank(self) -> int:
            return self.at

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    labels = torch.arange(48).view(2, 24)
    hybrid = {"is_hybrid_cp": False} if "is_hybrid_cp" in utils.get_batch_on_this_cp_rank.__code__.co_varnames else {}
    for rank in range(4):
        theirs = utils.get_batch_on_this_cp_rank({"labels": labels}, cp_group=Group(rank), **hybrid)["labels"]
        assert torch.equal(labels[:, own_positions(24, 4, rank)], theirs)
    with pytest.raises(RunError, match=r"rows of 20 positions on 4 context-parallel ranks: --seq-length must be a multiple of 8"):
        own_positions(20, 4, 0)
