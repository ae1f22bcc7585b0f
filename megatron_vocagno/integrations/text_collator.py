"""Texts -> tensors of both models, aligned on the way: for loops of one's own, without a dataset on disk and without packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.corpus.alignment import align
from megatron_vocagno.corpus.tokens import Tokenizer


class TextCollator:
    """A row a text: what both models read and predict, and which teacher tokens cover each of the student's.

    The first token of a text is predicted from what the model's tokenizer puts in front of a text (a BOS in most families), or
    else from EOS; the last prediction is EOS, which no teacher token covers. Rows are
    padded on the right, where a causal model never looks: no mask is needed. Texts are NFC-normalised, as build_dataset does.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, length: int) -> None:
        """length: most student tokens of a text; what comes after is left out."""
        self.student, self.teacher, self.length = student, teacher, length

    def __call__(self, examples: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """The key "text" of each example, in B rows; S and U are the longest text's tokens. All int64.

        input_ids, labels                  [B, S] the student's; labels[i] is predicted from input_ids[:i + 1], and is -100 where
                                           the row is padded
        teacher_input_ids, teacher_labels  [B, U] the teacher's, likewise
        first, last                        [B, S] the teacher_labels [first, last) that cover labels[i]; equal where it is
                                           unmapped or padding

        Raises CorpusError: the tokenizers do not read the same bytes of a text.

        >>> from megatron_vocagno.corpus import open_tokenizer
        >>> collate = TextCollator(open_tokenizer("mistral"), open_tokenizer("smollm2"), length=128)
        >>> batch = collate([{"text": "les êtres"}, {"text": "les"}])
        >>> batch["first"]
        tensor([[0, 1, 1, 3, 5],
                [0, 1, 0, 0, 0]])
        >>> batch["last"]
        tensor([[1, 2, 3, 5, 5],
                [1, 1, 0, 0, 0]])
        >>> batch["labels"][1].tolist(), batch["teacher_labels"].shape
        ([1514, 2, -100, -100, -100], torch.Size([2, 5]))
        """
        rows = [self._row(normalize("NFC", example["text"])) for example in examples]
        padding = {"labels": IGNORE, "teacher_labels": IGNORE}
        return {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding.get(name, 0))
            for name in rows[0]
        }

    def _row(self, text: str) -> dict[str, Tensor]:
        pair = align(text, self.student, self.teacher)
        spans = pair.spans.with_eos()
        labels = np.append(pair.student.ids, self.student.eos_id)[: self.length]
        first, last = spans.first[: self.length], spans.last[: self.length]
        teacher_labels = pair.teacher.ids[: last[-1]]
        # all of what is in front but its last id predicts nothing
        before, teacher_before = self.student.front or (self.student.eos_id,), self.teacher.front or (self.teacher.eos_id,)
        silent, teacher_silent = [IGNORE] * (len(before) - 1), [IGNORE] * (len(teacher_before) - 1)
        unmapped = [0] * len(silent)
        columns = {
            "input_ids": np.concatenate([before, labels[:-1]]),
            "labels": np.concatenate([silent, labels]),
            "teacher_input_ids": np.concatenate([teacher_before, teacher_labels])[: len(teacher_silent) + len(teacher_labels)],
            "teacher_labels": np.concatenate([teacher_silent, teacher_labels]),
            "first": np.concatenate([unmapped, first + len(teacher_silent)]),
            "last": np.concatenate([unmapped, last + len(teacher_silent)]),
        }
        return {name: torch.from_numpy(column).long() for name, column in columns.items()}
