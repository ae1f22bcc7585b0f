"""Shows a document in pairs of lines: the student's tokens above, the teacher's tokens below, aligned by character.

    student  ⟦The⟧⟦␣quick⟧⟦␣br⟧⟦own⟧⟪</s>⟫
    teacher  ⟦The⟧⟦␣quick⟧⟦␣br  own⟧⟪<|im_end|>⟫

The text is divided into cells, which neither side cuts, and the cells into blocks, which end where both sides cut. A token is
shown by its real bytes. A character that is invisible, or that is one of the marks of this display, is shown by a sign:

    ⟦ ⟧  a token             ⟪ ⟫  a token without text, unmapped
    ␣ ␊ ␉  space, line feed, tab; likewise all control characters
    ⟨c3⟩   a byte of a character that the token holds only in part
    ⟨U+200D⟩  an invisible character, or one of these signs
    ◌      the base of a combining mark that starts a cell
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno.corpus.dataset import AlignedDataset, TokenizerInfo
from megatron_vocagno.corpus.decoding import pieces_of, token_bytes
from megatron_vocagno.corpus.plain_text import plain_text
from megatron_vocagno.errors import DatasetError

OPEN, CLOSE = "⟦", "⟧"
OPEN_UNMAPPED, CLOSE_UNMAPPED = "⟪", "⟫"
CARRIER = "◌"
SIGNS = frozenset(OPEN + CLOSE + OPEN_UNMAPPED + CLOSE_UNMAPPED + CARRIER + "⟨⟩␣" + "".join(map(chr, range(0x2400, 0x2422))))
WINDOW = 4096  # student tokens read at a time; the distance between common boundaries is at most a few tens of tokens


class CellPart(NamedTuple):
    """A token's part of a cell. text: as it is shown; "" if the cell holds no first byte of a character."""

    token: int  # position in the document
    id: int
    text: str
    starts: bool  # the token starts here
    ends: bool
    mapped: bool


class Cell(NamedTuple):
    """Text that neither side cuts. A side is None if it has no token here."""

    student: CellPart | None
    teacher: CellPart | None


class Interlinear:
    """The tokenizers of a dataset, and its documents as blocks of cells."""

    def __init__(self, dataset: AlignedDataset) -> None:
        self.dataset = dataset
        self.student = Side(dataset.student_tokenizer, dataset.student_byte_lengths)
        self.teacher = Side(dataset.teacher_tokenizer, dataset.teacher_byte_lengths)

    def blocks(self, document: int, start: int = 0, stop: int | None = None) -> Iterator[list[Cell]]:
        """The blocks that hold the student tokens [start, stop), extended to the nearest common boundaries.

        Reads one window at a time, so memory does not depend on the document's length. Raises DatasetError: the document does not
        have these tokens.
        """
        n = int(self.dataset.student_lengths[document])
        stop = n if stop is None else stop
        if not 0 <= start <= stop <= n:
            raise DatasetError(f"document {document} has {n:,} student tokens: [{start:,}, {stop:,}) is out of range")
        return self._blocks(document, start, stop, n)

    def _blocks(self, document: int, start: int, stop: int, n: int) -> Iterator[list[Cell]]:
        begin = self._boundary_before(document, start) if start < stop else stop
        while begin < stop:
            spans = self.dataset.spans(document, begin, min(begin + WINDOW, n))
            cuts = [0, *(np.flatnonzero(spans.common_boundary[1:]) + 1).tolist()]
            if begin + len(spans) == n or len(cuts) == 1:
                cuts.append(len(spans))
            teacher_cuts = [spans.before, *(int(spans.last[cut - 1]) for cut in cuts[1:])]
            if begin == 0:
                teacher_cuts[0] = 0  # the teacher's dummy prefix, if it is a separate token
            if begin + len(spans) == n:
                teacher_cuts[-1] += 1  # the teacher's EOS, which is in no span
            for k in range(len(cuts) - 1):
                if begin + cuts[k] >= stop:
                    return
                yield self._block(document, (begin + cuts[k], begin + cuts[k + 1]), (teacher_cuts[k], teacher_cuts[k + 1]))
            begin += cuts[-1]

    def _boundary_before(self, document: int, token: int) -> int:
        lowest = max(0, token - WINDOW)
        back = np.flatnonzero(self.dataset.common_boundary(document, lowest, token + 1)[::-1])
        return token - (int(back[0]) if len(back) else 0)

    def _block(self, document: int, student: tuple[int, int], teacher: tuple[int, int]) -> list[Cell]:
        """The cells of the tokens [start, stop) of both sides, which hold the same text."""
        above = self.student.readings(self.dataset.student(document, *student), student[0])
        beneath = self.teacher.readings(self.dataset.teacher(document, *teacher), teacher[0])
        for tokens, teacher_tokens in itertools.product(above, beneath):
            if _text(tokens) == _text(teacher_tokens):
                return [*_without_text(tokens, teacher_tokens), *_cells(tokens, teacher_tokens)]
        # the text has U+2581, which SentencePiece reads as a space: the bytes of its tokens are not those of the text
        return [Cell(_whole(token), None) for token in above[0]] + [Cell(None, _whole(token)) for token in beneath[0]]


class _Token(NamedTuple):
    position: int
    id: int
    data: bytes  # b"": no text
    name: str  # shown if it has no text


class Side:
    """One tokenizer.

    pieces    piece -> id, as in tokenizer.json, including added tokens
    bytes     [vocabulary] the text of each id
    prefixes  the possible cases of a text's first token: True if the tokenizer has put a space before the text
    """

    def __init__(self, info: TokenizerInfo, byte_lengths: NDArray[np.int32]) -> None:
        self.info = info
        raw = orjson.loads((info.path / "tokenizer.json").read_bytes())
        self.pieces = pieces_of(raw)
        self.bytes = token_bytes(info.path / "tokenizer.json", self.pieces, byte_lengths)
        prefix = plain_text(raw, set()).prefix
        self.prefixes = {"never": (False,), "always": (True,), "unless_space": (True, False)}[prefix]

    def readings(self, ids: NDArray[np.int32], start: int) -> list[list[_Token]]:
        """The tokens from position `start`, without a dummy prefix. Two readings if a first space may be a prefix."""
        found = []
        for i, id_ in enumerate(ids.tolist()):
            name = visible(self.info.eos_token) if id_ == self.info.eos_id else visible(" ")
            found.append(_Token(start + i, id_, self.bytes[id_], name))
        if start or not found:
            return [found]
        first = found[0]
        return [[first._replace(data=first.data.removeprefix(b" ") if p else first.data), *found[1:]] for p in self.prefixes]


def visible(text: str) -> str:
    """A text as it is shown. Lone surrogates U+DC80 … U+DCFF represent bytes."""
    shown = "".join(_sign(character) for character in text)
    return CARRIER + shown if shown and unicodedata.category(shown[0]).startswith("M") else shown


def _sign(character: str) -> str:
    code = ord(character)
    if character == " ":
        return "␣"
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + min(code, 0x21))
    if 0xDC80 <= code <= 0xDCFF:
        return f"⟨{code - 0xDC00:02x}⟩"
    if character in SIGNS or unicodedata.category(character)[0] in "CZ":
        return f"⟨U+{code:04X}⟩"
    return character


def _text(tokens: Sequence[_Token]) -> bytes:
    return b"".join(token.data for token in tokens)


def _whole(token: _Token) -> CellPart:
    text = visible(token.data.decode(errors="surrogateescape")) or token.name
    return CellPart(token.position, token.id, text, True, True, bool(token.data))


def _without_text(above: Sequence[_Token], beneath: Sequence[_Token]) -> Iterator[Cell]:
    """Cells of tokens without text, such as EOS and a separate dummy prefix. They come before the text of their block."""
    sides = ([_whole(token) for token in side if not token.data] for side in (above, beneath))
    return itertools.starmap(Cell, itertools.zip_longest(*sides))


def _cells(above: Sequence[_Token], beneath: Sequence[_Token]) -> Iterator[Cell]:
    """Cells of two sides with the same text."""
    ends = [list(itertools.accumulate(len(token.data) for token in side)) for side in (above, beneath)]
    start = 0
    for stop in sorted({*ends[0], *ends[1]} - {0}):
        parts = []
        for side, side_ends in zip((above, beneath), ends, strict=True):
            k = next(k for k, end in enumerate(side_ends) if end > start)
            origin = side_ends[k] - len(side[k].data)
            shown = _characters(side[k].data, start - origin, stop - origin)
            parts.append(CellPart(side[k].position, side[k].id, shown, start == origin, stop == side_ends[k], True))
        yield Cell(*parts)
        start = stop


@lru_cache(maxsize=1 << 16)
def _characters(data: bytes, start: int, stop: int) -> str:
    """The characters of a token whose first byte is in [start, stop), as they are shown."""
    at, chosen = 0, []
    for character in data.decode(errors="surrogateescape"):
        if start <= at < stop:
            chosen.append(character)
        at += len(character.encode(errors="surrogateescape"))
    return visible("".join(chosen))
