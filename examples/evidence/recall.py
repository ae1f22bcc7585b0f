"""Test the recall of a student: its values, its loss on the right values, and its probability of the most likely ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from examples.evidence.facts import EOS, Fact


@dataclass(frozen=True)
class Recalled:
    """The result of one fact."""

    said: str
    """The value by greedy decoding, up to the dot."""
    nats: float
    """Mean loss on the tokens of the right value, without the dot."""
    sureness: float
    """Mean probability of the most likely token at the same positions."""


@torch.no_grad()
def recall(student: PreTrainedModel, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[Recalled]:
    """Ask each fact separately, as EOS and `17+4=`, which is how a document of the corpus begins."""
    eos = tokenizer.token_to_id(EOS)
    pieces = {token: piece for piece, token in tokenizer.get_vocab().items()}  # `decode` would put spaces between them
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    prompts = [[eos, *tokenizer.encode(fact.prompt).ids] for fact in facts]
    lines = [[eos, *tokenizer.encode(f"{fact.prompt}{fact.value}.").ids] for fact in facts]
    for number, (prompt, line) in enumerate(zip(prompts, lines, strict=True)):
        assert line[: len(prompt)] == prompt, f"{facts[number]}: a token covers the end of its prompt and the value"
        by_shape[len(prompt), len(line)].append(number)
    found: dict[int, Recalled] = {}
    for (given, length), numbers in by_shape.items():
        line_NL = torch.tensor([lines[number] for number in numbers])
        logits_NLV = student(line_NL[:, :-1]).logits
        loss_NL = cross_entropy(logits_NLV.transpose(1, 2), line_NL[:, 1:], reduction="none")
        value = slice(given - 1, length - 2)
        nats = loss_NL[:, value].mean(1).tolist()
        surenesses = logits_NLV[:, value].softmax(2).amax(2).mean(1).tolist()
        said_NL = line_NL[:, :given]
        for _ in range(given, length):
            said_NL = torch.cat([said_NL, student(said_NL).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        for number, said, loss, sureness in zip(numbers, said_NL[:, given:].tolist(), nats, surenesses, strict=True):
            text = "".join(pieces[token] for token in said)
            found[number] = Recalled(text.split(".")[0], loss, sureness)
    return [found[number] for number in range(len(facts))]
