"""A teacher whose tokenizer puts something in front of a text is scored with it, in every window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.manifest import Scoring
from megatron_vocagno.errors import ChangedError, CorpusError
from megatron_vocagno.preprocess.score import ScoringOptions, score
from tests.runs import write_teacher
from tests.tokenizers_with_bos import with_front

CONTEXT, STRIDE = 48, 20


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Path:
    """With two tokens in front."""
    folder = tmp_path_factory.mktemp("fronted")
    return write_teacher(folder / "teacher", with_front(teacher_tokenizer, folder / "tokenizer", ["<|im_start|>", "<|im_end|>"]))


@torch.no_grad()
def test_losses_are_those_of_transformers_own_model_behind_the_front(
    unscored: AlignedDataset, copy: Callable[..., Path], fronted: Path
) -> None:
    folder = copy(unscored)
    score(folder, ScoringOptions(fronted, "float32", context=CONTEXT, stride=STRIDE, tokens_per_batch=700))
    scored = AlignedDataset.open(folder)
    assert scored.scoring is not None
    front = list(scored.scoring.front)
    assert front == [1, 2] and scored.scoring.before == front[-1]
    model = AutoModelForCausalLM.from_pretrained(fronted, dtype=torch.float32)
    cut = 0
    for document in range(0, len(scored), 10):
        ids, expected = scored.teacher(document).tolist(), []
        for place in range(len(ids)):
            # the first window that holds the target
            start = 0 if place < CONTEXT else -(-(place - CONTEXT + 1) // STRIDE) * STRIDE
            read = front + ids[max(start - 1, 0) : place]
            # all logits of a window are wanted once; a short prefix costs little here
            if place % 5 == 0:
                logits = model(torch.tensor([read]), use_cache=False).logits[0, -1].float()
                expected.append((place, F.cross_entropy(logits[None], torch.tensor(ids[place : place + 1])).item()))
            cut += start > 0
        got = scored.teacher_losses(document)
        for place, loss in expected:
            assert got[place] == pytest.approx(loss, rel=6e-4, abs=2e-4), (document, place)
    assert cut > 50
    totals = scored.manifest.teacher_losses.totals  # type: ignore[union-attr]
    assert totals.positions - totals.padding > totals.tokens


def test_the_front_is_one_of_the_teachers_positions(unscored: AlignedDataset, fronted: Path) -> None:
    """It reads 256."""
    longest = ScoringOptions(fronted).scoring(unscored)
    assert longest.context == 256 - len(longest.front)
    with pytest.raises(CorpusError, match=rf"--context 256: .* reads 256 tokens, {len(longest.front)} of them in front"):
        replace(ScoringOptions(fronted), context=256).scoring(unscored)
    assert replace(ScoringOptions(fronted), context=256, bos="none").scoring(unscored).front == ()


def test_losses_without_the_front_are_not_taken_for_those_with_it(
    unscored: AlignedDataset, copy: Callable[..., Path], fronted: Path
) -> None:
    folder = copy(unscored)
    asked = ScoringOptions(fronted, "float32", context=CONTEXT, stride=STRIDE, tokens_per_batch=700)
    score(folder, replace(asked, bos="none"))
    plain = AlignedDataset.open(folder).teacher_losses(0)
    with pytest.raises(ChangedError, match=r"front: \(\) then, \(1,"):
        score(folder, asked)
    score(folder, asked, replace=True)
    assert not np.allclose(AlignedDataset.open(folder).teacher_losses(0), plain, atol=0.1)


def test_a_scoring_without_a_front_is_written_as_ever(scored: AlignedDataset) -> None:
    """So that datasets of earlier releases keep their bytes and are read."""
    assert scored.scoring is not None and b'"front"' not in (scored.path / "dataset.json").read_bytes()
    fields = scored.scoring.model_dump()
    assert "front" not in fields and Scoring.model_validate(fields) == scored.scoring
