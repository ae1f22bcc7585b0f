"""What a model reads in front of text: the ids that its own tokenizer puts there, a BOS in most families.

    attention over the row   <bos> a4 a5 E b1 b2 E c1 …   one at the head of all that is read, wherever in a document a row starts
    attention by document    <bos> a4 a5 <bos> b1 b2 …    one before each document: it is read in the place of the EOS before it
    no such ids               a4 a5 E b1 b2 E c1 …        a document's first token is predicted from the EOS before it

They have no target and no loss, and spans do not count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megatron_vocagno.config import Bos
from megatron_vocagno.corpus.front import front_ids
from megatron_vocagno.errors import RunError

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Front:
    """ids: what stands at the head; each_document: attention ends at the borders of documents, so each of them has a head.

    >>> bos = Front((1,))
    >>> bos.before(np.array([5, 6]), np.array([False, False]))
    ((1,), array([5, 6]))
    >>> bos.before(np.array([2, 6]), np.array([True, False]), opens=True)
    ((), array([1, 6]))
    """

    ids: tuple[int, ...] = ()
    each_document: bool = False

    def __post_init__(self) -> None:
        assert not self.each_document or len(self.ids) <= 1, "there is room for one id before a document"

    def __len__(self) -> int:
        return len(self.ids)

    def before(self, inputs: Int32, starts_document: npt.NDArray[np.bool_], opens: bool = False) -> tuple[tuple[int, ...], Int32]:
        """What is read before the inputs of a row, and the inputs as they are read.

        inputs           [n]
        starts_document  [n] whether the token that is predicted from an input is the first one of a document
        opens            the first input is the EOS that stands for "nothing before": the row begins with a document
        """
        if not self.ids:
            return (), inputs
        inputs = inputs.copy()
        if self.each_document:
            inputs[starts_document] = self.ids[-1]
        if opens:
            inputs[0] = self.ids[-1]
        return self.ids[:-1] if opens else self.ids, inputs


NO_FRONT = Front()
NO_FRONTS = (NO_FRONT, NO_FRONT)
"""Of a student and of its teacher."""


def front_of(asked: Bos, tokenizers: Sequence[Path], field: str, rows: int) -> tuple[int, ...]:
    """The ids that a model reads in front of text.

    asked       `teacher.bos` or `student.bos`, which `field` names
    tokenizers  folders, of which the first that has a tokenizer is asked: the model's own, then that of the dataset
    rows        of the model's embedding

    Raises RunError: an id that the model does not have.
    """
    if asked == "none":
        return ()
    own = (found for folder in tokenizers if (found := front_ids(folder)) is not None)
    ids = next(own, ()) if asked == "auto" else (asked,)
    for i in ids:
        if i >= rows:
            whose = f"{field} = {i}" if asked != "auto" else f"{field} = 'auto': the tokenizer puts {i} in front of a text, which"
            raise RunError(f"{whose} is no id of the model: its embedding has {rows:,} rows, ids 0 to {rows - 1:,}")
    return ids


def described(front: Sequence[int], tokenizer: Path) -> str:
    """For people: `<s> (1)`, or `nothing`. tokenizer: a folder with a tokenizer.json."""
    if not front:
        return "nothing"
    raw = orjson.loads((tokenizer / "tokenizer.json").read_bytes())
    names = {i: piece for piece, i in raw["model"]["vocab"].items() if i in front}
    names |= {token["id"]: token["content"] for token in raw.get("added_tokens") or () if token["id"] in front}
    return " ".join(f"{names.get(i, '?')} ({i})" for i in front)
