"""Document attention in the engines equals transformers on each document, in every layout. Uses real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows, evaluation_batches
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.scoring import ReplicatedScorer
from megatron_vocagno.export import export
from tests import tokenizers_for_tests as real
from tests.runs import STUDENT, Case, metrics

# Gemma 2, as nothing of it is plain: windows in every other layer, logits capped twice, norms of 1 + weight, scaled embeddings
GEMMA = [
    "model_type=gemma2",
    "head_dim=8",
    "query_pre_attn_scalar=8",
    "sliding_window=16",
    "attn_logit_softcapping=2.0",
    "final_logit_softcapping=5.0",
]
DOCUMENTS = [*(f"student.config.{field}" for field in GEMMA), "data.attention=document", "training.steps=3"]
RECOMPUTE = [*DOCUMENTS, "parallel.activation_checkpointing=true"]
LAYOUTS = {
    "documents": (1, DOCUMENTS, {}),
    "documents-pp2": (2, [*RECOMPUTE, "parallel.pipeline_stages=2", "parallel.partition=[1, 2]"], {}),
    "documents-zero3": (2, [*RECOMPUTE, "teacher.placement=zero3"], {"zero_optimization": {"stage": 3}}),
    "documents-uniform": (2, [*DOCUMENTS, "parallel.pipeline_stages=2", "parallel.partition=uniform"], {}),
}


def output(case: Case, name: str) -> Path:
    if not case.out(name).exists():
        processes, overrides, settings = LAYOUTS[name]
        case.run(name, processes, overrides, settings)
    return case.out(name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "documents"])
def test_every_layout_has_the_losses_of_one_process(case: Case, layout: str) -> None:
    one, other = metrics(output(case, "documents")), metrics(output(case, layout))
    compared = 0
    for a, b in zip(one, other, strict=True):
        for name in ("loss/train", "loss/all_tokens", "guidance/guide_kept", "optimizer/grad_norm", "eval/bits_per_byte"):
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5), (name, a["step"])
                compared += 1
    assert compared == 3 * 4 + 2


@pytest.mark.slow
def test_the_exported_model_says_of_each_document_alone_what_the_engine_said_of_it_in_its_row(case: Case, tmp_path: Path) -> None:
    run = output(case, "documents-pp2")
    export(run, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert model.config.model_type == "gemma2" and model.config.num_hidden_layers == STUDENT["num_hidden_layers"]

    def losses(ids_S: Tensor, target_S: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=ids_S[None]).logits[0], target_S, ignore_index=IGNORE, reduction="none")

    valid, front = AlignedDataset.open(case.valid), Front((real.MISTRAL_BOS,), each_document=True)
    alone, apart, tokens, documents, rows = 0.0, 0.0, 0, 0, 0
    with torch.no_grad():
        for step in evaluation_batches(valid, valid.student_byte_lengths, 64, Layout(2, 1, 1), 0, 12, front):
            (batch,) = step.batches
            tokens += step.tokens
            for ids_S, target_S, segment_S in zip(batch.input_BS, batch.target_BS, batch.segment_BS, strict=True):
                rows += 1
                whole_S = losses(ids_S, target_S)
                for segment in segment_S.unique():
                    mine_S = segment_S == segment
                    alone_D = losses(ids_S[mine_S], target_S[mine_S])
                    alone += alone_D.sum().item()
                    apart = max(apart, (alone_D - whole_S[mine_S]).abs().max().item())
                    documents += 1
    assert documents > rows == 12, "no row had two documents"
    [*_, said] = [line["eval/loss"] for line in metrics(run) if "eval/loss" in line]
    assert alone / tokens == pytest.approx(said, rel=1e-5)
    assert apart > 1e-3, "documents did not matter"


class Listening:
    """A teacher whose loss is the document that it was told."""

    def loss(self, input_BU: Tensor, target_BU: Tensor, segment_BU: Tensor | None = None) -> Tensor:
        return torch.full(input_BU.shape, -1.0) if segment_BU is None else segment_BU.float()


@pytest.mark.parametrize("documents", [False, True])
def test_the_teacher_is_told_the_documents_of_each_row(case: Case, documents: bool) -> None:
    batches = Batches(TrainRows(AlignedDataset.open(case.train), 512, seed=2), Layout(3, 20, 1), 0).step(0)
    losses = ReplicatedScorer(Listening(), None, 2000, torch.device("cpu"), documents).score(batches)
    met = 0
    for batch, loss_BU in zip(batches, losses, strict=True):
        for segment_U, loss_U in zip(batch.teacher_segments, loss_BU, strict=True):
            told_U = loss_U[: len(segment_U)].numpy()
            assert np.array_equal(told_U, segment_U if documents else np.full(len(segment_U), -1))
            met += int(segment_U.max(initial=0)) > 0
    assert met > 5, "hardly a row had two documents"
