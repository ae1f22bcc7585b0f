"""The loss of a batch of texts, computed from the paper's equations one text and one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_vocagno.corpus import Tokenizer
from tests.objective import plain
from tests.tokenizers_for_tests import MISTRAL_BOS

KEEP = "0.4"


class Naive:
    """Both models and their losses of single texts."""

    def __init__(self, student: Path, teacher: Path, tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
        self.tokenizers = tokenizers
        self.student, self.teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher))

    def kept(self, texts: Sequence[str]) -> list[Tensor]:
        """The losses with weight 1, with their gradients. The selection ranks the tokens of all texts together."""
        losses, guides = [], []
        for text in texts:
            (student,), (teacher,) = (tokenizer.encode_batch([text]) for tokenizer in self.tokenizers)
            losses += token_losses(self.student, self.tokenizers[0], [*student.ids.tolist(), self.tokenizers[0].eos_id])
            teacher_losses = [loss.item() for loss in token_losses(self.teacher, self.tokenizers[1], teacher.ids.tolist())]
            covers = list(zip(teacher.starts.tolist(), teacher.ends.tolist(), teacher_losses, strict=True))
            for start, end in zip(student.starts.tolist(), student.ends.tolist(), strict=True):
                guides.append(max((loss for a, b, loss in covers if a < end and b > start), default=plain.NAN))
            guides.append(plain.NAN)  # nothing covers EOS
        numbers, everywhere = [loss.item() for loss in losses], [True] * len(losses)
        weights, _ = plain.weights([numbers], [guides], [everywhere], KEEP, "microbatch", "include", False)
        return [loss for loss, weight in zip(losses, weights[0], strict=True) if weight]


def token_losses(model: Any, tokenizer: Tokenizer, ids: list[int]) -> list[Tensor]:
    """-log p of each id given the ids before it. The first id follows BOS, or EOS if the tokenizer adds no BOS."""
    before = MISTRAL_BOS if tokenizer.vocab_size == 32_000 else tokenizer.eos_id
    logits_NV = model(torch.tensor([[before, *ids[:-1]]])).logits[0]
    return [-logits_V.log_softmax(0)[i] for logits_V, i in zip(logits_NV, ids, strict=True)]
