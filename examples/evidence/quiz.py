"""Test a student on word problems, one by one: the loss on the worked answer, and the accuracy of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from examples.evidence.mixture import END, kinds_of, of_problem
from examples.evidence.problems import TEMPLATES, Problem

OPERATIONS = {"+": "sum", "-": "difference", "*": "product", "/": "quotient"}
ROWS_A_FORWARD = 32


@dataclass(frozen=True)
class Quiz:
    """N problems of at most L tokens, each as a separate document."""

    input_NL: Tensor
    target_NL: Tensor
    """int64. Each problem follows an EOS, and padding is EOS."""
    kind_NL: NDArray[np.str_]
    """The kind of each target. Padding is END, too."""
    operation_N: NDArray[np.str_]

    @classmethod
    def of(cls, problems: Sequence[Problem], tokenizer: Tokenizer, eos: int, byte_lengths: NDArray[np.int32]) -> Quiz:
        """byte_lengths: [V] bytes of each token of the tokenizer"""
        ids = [np.array([*tokenizer.encode(problem.text).ids, eos], np.int32) for problem in problems]
        kinds = [kinds_of(of_problem(problem), one, byte_lengths) for problem, one in zip(problems, ids, strict=True)]
        longest = max(map(len, ids))
        target_NL = pad_sequence([torch.from_numpy(one).long() for one in ids], batch_first=True, padding_value=eos)
        return cls(
            input_NL=torch.cat([torch.full((len(ids), 1), eos), target_NL[:, :-1]], dim=1),
            target_NL=target_NL,
            kind_NL=np.array([np.append(kind, [END] * (longest - len(kind))) for kind in kinds]),
            operation_N=np.array([TEMPLATES[problem.template][0] for problem in problems]),
        )

    @torch.no_grad()
    def read(self, student: PreTrainedModel) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """[N, L] the student's losses in nats, and whether the target is its most likely token."""
        losses, said = [], []
        for start in range(0, len(self.input_NL), ROWS_A_FORWARD):
            targets = self.target_NL[start : start + ROWS_A_FORWARD]
            logits = student(self.input_NL[start : start + ROWS_A_FORWARD]).logits
            losses.append(cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
            said.append(logits.argmax(-1) == targets)
        return torch.cat(losses).numpy(), torch.cat(said).numpy()

    def scores(self, student: PreTrainedModel) -> dict[str, float]:
        """Losses in nats per token, given all tokens before it, and accuracy.

        answer_nats             over the text after `Answer:`, such as `5 + 4 = 9.`
        work_nats, result_nats  over the text before the result, and over the result
        result_nats_OPERATION   over the results of one operation: sum, difference, product, quotient
        accuracy                the share of results that greedy decoding gets exactly right
        """
        loss_NL, said_NL = self.read(student)
        result_NL = self.kind_NL == "result"
        # the point after the last digit is part of it: 12 is not 123
        right_N = (said_NL | ~(result_NL | (self.kind_NL == "point"))).all(1)
        kinds = {"work": ["work"], "result": ["result"], "answer": ["work", "result", "point"]}
        scores = {f"{name}_nats": float(loss_NL[np.isin(self.kind_NL, of)].mean()) for name, of in kinds.items()}
        for operation, name in OPERATIONS.items():
            scores[f"result_nats_{name}"] = float(loss_NL[(self.operation_N == operation)[:, None] & result_NL].mean())
        return scores | {"accuracy": float(right_N.mean())}
