"""Clean held-out text is read as training's own evaluation reads it, and its halves are the teacher's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from examples.evidence.held_out import HeldOut
from megatron_vocagno.batch.loader import Layout, evaluation_batches
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.losses import gather, record_losses, write_losses
from megatron_vocagno.corpus.manifest import LossTotals, Scoring
from tests.datasets import build_dataset
from tests.tokenizers_for_tests import mistral_tokenizer_path, texts

ROW = 64


@pytest.fixture(scope="module")
def scored(teacher_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> AlignedDataset:
    """Two documents of real text; the losses of their teacher tokens are random."""
    long = [text for text in texts() if 4_000 < len(text) < 8_000][:2]
    data = build_dataset(tmp_path_factory.mktemp("held_out") / "valid", long, mistral_tokenizer_path(), teacher_tokenizer)
    (shard,) = data.manifest.shards
    losses = np.random.default_rng(7).exponential(3, data.totals.teacher_tokens).astype(np.float16)
    scoring = Scoring(teacher="none", name="random", dtype="float32", weights="as-is", context=1, stride=1, before=0)
    write_losses(data.path / shard.path, shard, scoring, losses, data.teacher_lengths.astype(np.int64), LossTotals())
    record_losses(data.path, data.manifest, gather(data.path, data.manifest.shards))
    return AlignedDataset.open(data.path)


@pytest.mark.long
def test_bits_per_byte_are_those_of_training_and_its_halves_add_up(scored: AlignedDataset) -> None:
    torch.manual_seed(8)
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    student = LlamaForCausalLM(LlamaConfig(vocab_size=scored.student_tokenizer.vocab_size, **size)).eval()
    held_out = HeldOut.of(scored.path, ROW)
    scores = held_out.scores(student)

    nats, text_bytes = 0.0, 0
    for step in evaluation_batches(scored, scored.student_byte_lengths, ROW, Layout(3, 1, 1), 0, None):
        (batch,) = step.batches
        with torch.no_grad():
            logits = student(batch.input_BS).logits.flatten(0, 1)
        nats += functional.cross_entropy(logits, batch.target_BS.flatten(), reduction="sum").item()
        text_bytes += step.text_bytes
    assert text_bytes > 5_000
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)

    easy_RS = held_out.easy_RS
    assert np.array_equal(held_out.nats(student) > 0, held_out.text_RS)
    assert abs(easy_RS.sum() - held_out.text_RS.sum() / 2) < 5
    assert held_out.guide_RS[easy_RS].max() <= held_out.guide_RS[held_out.text_RS & ~easy_RS].min()
    share = held_out.bytes_RS[easy_RS].sum() / held_out.bytes_RS.sum()
    both = share * scores["bits_per_byte_easy"] + (1 - share) * scores["bits_per_byte_hard"]
    assert both == pytest.approx(scores["bits_per_byte"])
    assert scores["bits_per_byte_easy"] != pytest.approx(scores["bits_per_byte_hard"], abs=0.01)


def test_a_guide_is_the_highest_loss_of_the_teacher_tokens_that_cover_a_token(scored: AlignedDataset) -> None:
    held_out = HeldOut.of(scored.path, ROW)
    guides, sizes = [], []
    for i in range(len(scored)):
        losses, spans, ids = scored.teacher_losses(i), scored.spans(i), scored.student(i)
        for token in range(1, len(ids) - 1):  # neither the first nor the one that ends it
            guides.append(max(losses[spans.first[token] : spans.last[token]]))
            sizes.append(scored.student_byte_lengths[ids[token]])
    assert len(guides) > 1_000
    assert np.array_equal(held_out.guide_RS[held_out.text_RS], np.array(guides, np.float32))
    assert held_out.bytes_RS[held_out.text_RS].tolist() == sizes
