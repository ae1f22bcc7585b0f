"""A text that is too long to be tokenized at once -> parts, cut where both tokenizers have a boundary.

A tokenizer looks no further than a word or two, so a cut is good where the text around it gives the same tokens whole as
in two halves; before a space between two words that is nearly always so. The tokens of the parts are then those of the
whole text. Where no such place is found (a megabyte of one letter), the text is cut all the same: its tokens still tile
it, and one of them may differ from those of the whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vocagno.corpus.encoders import Ragged
from megatron_vocagno.corpus.tokens import SPENT, Tokenizer
from megatron_vocagno.preprocess.aligner import AlignedTexts, Part, Side, align_texts

PART = 1 << 20  # characters
REACH = 1 << 16  # characters before the end of a part, within which a place to cut is sought
AROUND = 128  # characters on each side, or more, that are tokenized to see whether a place is good
TRIES = 64  # places looked at

# between words; at a line end; between a letter and a punctuation mark, for scripts without spaces
PLACES = [re.compile(p) for p in (r"(?<=[^\W\d_])(?= [^\W\d_])", r"(?<=\w)(?=\n\w)", r"(?<=\w)(?=[^\w\s])", r"(?<=\S)(?=\S)")]


@dataclass(frozen=True)
class AlignedPart:
    """Both sides' tokens and the spans of a part, in positions of the whole text; without EOS."""

    student: Ragged
    teacher: Ragged
    aligned: AlignedTexts
    n_bytes: int
    by_offsets: bool


def parts(text: str, tokenizers: tuple[Tokenizer, ...]) -> Iterator[str]:
    """The text, in parts of `PART` characters or a little less."""
    start = 0
    while len(text) - start > PART:
        stop = _place(text, start + PART, tokenizers)
        yield text[start:stop]
        start = stop
    yield text[start:]


def aligned_parts(text: str, student: Tokenizer, teacher: Tokenizer, nfc: bool) -> Iterator[AlignedPart]:
    """The parts of a text, each NFC-normalised (with `nfc`), tokenized by both and aligned.

    Normalising the whole would take its size once more, and Python keeps four bytes a character where one of them needs it.
    """
    done = Part(ends=False)
    for part in parts(text, (student, teacher)):
        part = unicodedata.normalize("NFC", part) if nfc else part
        n_bytes, first = len(part.encode()), done.student == 0
        s, t = _side(student, part, first, nfc), _side(teacher, part, first, nfc)
        aligned = align_texts(s, t, np.array([n_bytes]), done)
        by_offsets = not aligned.good[0]
        if by_offsets:
            ends = _by_offsets(student, part, first), _by_offsets(teacher, part, first)
            if ends[0] is not None and ends[1] is not None:
                aligned = align_texts(ends[0], ends[1], np.array([n_bytes]), done)
        yield AlignedPart(s.tokens, t.tokens, aligned, n_bytes, by_offsets)
        done = Part(done.student + len(s.tokens.ids), done.teacher + len(t.tokens.ids), ends=False)


def _side(tokenizer: Tokenizer, part: str, first: bool, nfc: bool) -> Side:
    encoder = tokenizer.encoder
    ids = encoder.encode([part]).ids if first else tokenizer.encode_continuation(part, encoder)
    tokens = Ragged(ids, np.array([0, len(ids)]))
    return Side(tokens, tokenizer.prefixes([part], nfc, first), tokenizer.short_byte_lengths)


def _by_offsets(tokenizer: Tokenizer, part: str, first: bool) -> Side | None:
    """The same tokens with the bytes that the tokenizer's own offsets give them: entry i of the table is token i.

    None where the offsets do not tile the part either.
    """
    lead = "" if first or tokenizer.prefix == "never" else SPENT
    tokens = tokenizer.encode_batch([lead + part])[0]
    if tokens.ends_from == "unknown":
        return None
    ends = tokens.ends[len(tokenizer.reference.encode([lead]).ids) if lead else 0 :] - len(lead)
    lengths = np.diff(ends, prepend=0).astype(np.uint16)
    alone = lengths[:1] == 0  # a dummy prefix that stands alone is a token of one byte, less the prefix
    lengths[:1] += alone
    ids = np.arange(len(lengths), dtype=np.uint32)
    return Side(Ragged(ids, np.array([0, len(ids)])), alone.astype(np.uint8), lengths)


def _place(text: str, end: int, tokenizers: tuple[Tokenizer, ...]) -> int:
    """The last good place to cut before `end`, of the first kind that has one."""
    for kind in PLACES:
        found = [match.start() for match in kind.finditer(text, end - REACH, end)]
        for place in reversed(found[-TRIES:]):
            if all(_is_boundary(text, place, tokenizer) for tokenizer in tokenizers):
                return place
    return end


def _is_boundary(text: str, place: int, tokenizer: Tokenizer) -> bool:
    """By Hugging Face's tokenizers, which take less than gigatoken to begin."""
    around = max(AROUND, 4 * tokenizer.longest_added)
    left, right = text[max(place - around, 0) : place], text[place : place + around]
    encoder = tokenizer.reference
    whole = encoder.encode([left + right]).ids
    halves = np.concatenate([encoder.encode([left]).ids, tokenizer.encode_continuation(right, encoder)])
    return np.array_equal(whole, halves)
