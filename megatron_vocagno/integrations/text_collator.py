"""Texts -> aligned tensors for both models, for your own training loop. It needs no dataset on disk and does not pack rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_vocagno.batch.loader import IGNORE
from megatron_vocagno.batch.whole_chunks import opens_chunk
from megatron_vocagno.corpus.alignment import align
from megatron_vocagno.corpus.tokens import Tokenizer
from megatron_vocagno.objective.rule import Unit


class TextCollator:
    """Collates one row per text: inputs and labels of both models, and the teacher tokens that cover each student token.

    The first token of a text is predicted from the id that the model's tokenizer puts in front of a text (BOS in most families),
    or from EOS if there is none. The last label is EOS, which no teacher token covers. Rows are padded on the right, which a
    causal model does not read, so no attention mask is needed. Texts are NFC-normalized, as in build_dataset.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, length: int, unit: Unit = "token") -> None:
        """
        length  maximum number of student tokens per text; the rest of a longer text is dropped
        unit    that of the rule. For 'chunk', a chunk that loses a part in this way is unmapped
        """
        self.student, self.teacher, self.length, self.unit = student, teacher, length, unit

    def __call__(self, examples: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Collate the key "text" of B examples. All tensors are int64; S and U are the numbers of tokens of the longest text.

        input_ids, labels                  [B, S] of the student; labels[i] is predicted from input_ids[:i + 1], and is -100 for
                                           padding
        teacher_input_ids, teacher_labels  [B, U] of the teacher, likewise
        first, last                        [B, S] teacher_labels[first:last] cover labels[i]; first == last if the label is
                                           unmapped or padding

        Raises CorpusError if the tokenizers do not read the same bytes of a text.

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
        if self.unit == "chunk":
            opens, has_text = opens_chunk(spans.first, spans.last), spans.first < spans.last
            dropped = has_text[self.length :]
            if dropped.any() and not opens[self.length + dropped.argmax()]:
                begin = int(np.flatnonzero(opens[: self.length])[-1])
                last = np.concatenate([last[:begin], first[begin:]])
        teacher_labels = pair.teacher.ids[: last[-1]]
        # only the last of the ids in front predicts a token
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
