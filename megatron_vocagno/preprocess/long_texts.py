"""A text that is too long to be tokenized at once -> parts, cut where both tokenizers have a boundary.

A tokenizer's context is a word or two. A cut is good if the text around it gives the same tokens as its two halves. This is
nearly always true before a space between two words. The tokens of the parts are then the tokens of the full text.

If there is no good cut (for example in a megabyte of one letter), the text is cut anyway. Its tokens still tile it, and a token
at the cut may differ from those of the full text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vocagno.corpus.encoders import Ragged
from megatron_vocagno.corpus.tokens import SENTINEL, Tokenizer
from megatron_vocagno.preprocess.aligner import AlignedTexts, Part, Side, align_texts

PART_CHARACTERS = 1 << 20  # characters
REACH = 1 << 16  # characters before the end of a part that are searched for a cut
AROUND = 128  # minimum number of characters on each side that are tokenized to test a cut
TRIES = 64  # cuts that are tested per kind

# Kinds of cuts in order of preference: between words, at a line end, between a letter and a punctuation mark (for scripts without
# spaces), between any two characters that are not spaces.
CUTS = [re.compile(p) for p in (r"(?<=[^\W\d_])(?= [^\W\d_])", r"(?<=\w)(?=\n\w)", r"(?<=\w)(?=[^\w\s])", r"(?<=\S)(?=\S)")]


@dataclass(frozen=True)
class AlignedPart:
    """Both sides' tokens and the spans of a part, without EOS. The spans count teacher tokens from the start of the full text."""

    student: Ragged
    teacher: Ragged
    aligned: AlignedTexts
    n_bytes: int
    by_offsets: bool


def parts(text: str, tokenizers: tuple[Tokenizer, ...]) -> Iterator[str]:
    """Cut a text into parts of `PART_CHARACTERS` characters or slightly less."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = _last_cut(text, start + PART_CHARACTERS, tokenizers)
        yield text[start:stop]
        start = stop
    yield text[start:]


def aligned_parts(text: str, student: Tokenizer, teacher: Tokenizer, nfc: bool) -> Iterator[AlignedPart]:
    """The parts of a text, each NFC-normalized (with `nfc`), tokenized by both tokenizers and aligned.

    Normalizing the full text at once would need a second copy in memory, at four bytes per character if one character needs them.
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
    """The same tokens with the byte lengths of the tokenizer's own offsets: id and table entry i belong to token i.

    None if the offsets do not tile the part.
    """
    lead = "" if first or tokenizer.prefix == "never" else SENTINEL
    tokens = tokenizer.encode_batch([lead + part])[0]
    if tokens.ends_from == "unknown":
        return None
    ends = tokens.ends[len(tokenizer.reference.encode([lead]).ids) if lead else 0 :] - len(lead)
    lengths = np.diff(ends, prepend=0).astype(np.uint16)
    only_prefix = lengths[:1] == 0  # a token that is only the dummy prefix: one byte, less the prefix
    lengths[:1] += only_prefix
    ids = np.arange(len(lengths), dtype=np.uint32)
    return Side(Ragged(ids, np.array([0, len(ids)])), only_prefix.astype(np.uint8), lengths)


def _last_cut(text: str, end: int, tokenizers: tuple[Tokenizer, ...]) -> int:
    """The last good cut before `end`, of the first kind that has a good cut; `end` if there is none."""
    for kind in CUTS:
        found = [match.start() for match in kind.finditer(text, end - REACH, end)]
        for cut in reversed(found[-TRIES:]):
            if all(_is_boundary(text, cut, tokenizer) for tokenizer in tokenizers):
                return cut
    return end


def _is_boundary(text: str, cut: int, tokenizer: Tokenizer) -> bool:
    """Whether the text around a cut gives the same tokens as its two halves.

    Uses Hugging Face's tokenizers, whose calls have less overhead than gigatoken's.
    """
    around = max(AROUND, 4 * tokenizer.longest_added)
    left, right = text[max(cut - around, 0) : cut], text[cut : cut + around]
    encoder = tokenizer.reference
    whole = encoder.encode([left + right]).ids
    halves = np.concatenate([encoder.encode([left]).ids, tokenizer.encode_continuation(right, encoder)])
    return np.array_equal(whole, halves)
