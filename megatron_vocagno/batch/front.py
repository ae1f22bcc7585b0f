"""The prefix of a row: the ids that the model's own tokenizer puts in front of a text. In most families this is one BOS.

    attention over the row   <bos> a4 a5 E b1 b2 E c1 …   one prefix at the head of the row, even if it starts inside a document
    attention by document    <bos> a4 a5 <bos> b1 b2 …    one prefix per document; it replaces the EOS of the document before
    no prefix                 a4 a5 E b1 b2 E c1 …        a document's first token is predicted from the EOS before it

Prefix ids have no target and no loss, and spans do not count them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Front:
    """A prefix. ids: its tokens. each_document: attention stops at document borders, so each document gets the prefix.

    >>> bos = Front((1,))
    >>> bos.before(np.array([5, 6]), np.array([False, False]))
    ((1,), array([5, 6]))
    >>> bos.before(np.array([2, 6]), np.array([True, False]), opens=True)
    ((), array([1, 6]))
    """

    ids: tuple[int, ...] = ()
    each_document: bool = False

    def __post_init__(self) -> None:
        assert not self.each_document or len(self.ids) <= 1, "only one id fits before a document"

    def __len__(self) -> int:
        return len(self.ids)

    def before(self, inputs: Int32, starts_document: npt.NDArray[np.bool_], opens: bool = False) -> tuple[tuple[int, ...], Int32]:
        """The prefix ids that are read before the inputs of a row, and the inputs as the model reads them.

        inputs           [n]
        starts_document  [n] whether the target of an input is the first token of a document
        opens            the row begins with a document, and its first input is an EOS that the prefix replaces
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
"""The prefixes of a student and its teacher."""
