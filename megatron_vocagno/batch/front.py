"""What a model reads in front of text: the ids that its own tokenizer puts there, a BOS in most families.

    attention over the row   <bos> a4 a5 E b1 b2 E c1 …   one at the head of all that is read, wherever in a document a row starts
    attention by document    <bos> a4 a5 <bos> b1 b2 …    one before each document: it is read in the place of the EOS before it
    no such ids               a4 a5 E b1 b2 E c1 …        a document's first token is predicted from the EOS before it

They have no target and no loss, and spans do not count them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
