"""A text that is too long to be tokenized at once -> parts, cut where both tokenizers have a boundary.

A tokenizer's context is a word or two. A cut is good if the text around it gives the same tokens as its two halves. This is
nearly always true before a space between two words. The tokens of the parts are then the tokens of the full text.

If there is no good cut (for example in a megabyte of one letter), the text is cut anyway. Its tokens still tile it, and a token
at the cut may differ from those of the full text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from megatron_vocagno.corpus.encoders import Ragged
from megatron_vocagno.corpus.tokens import SENTINEL, Tokenizer
from megatron_vocagno.preprocess.aligner import AlignedTexts, Part, Side, align_texts

PART_CHARACTERS = 1 << 20  # characters
REACH = 1 << 16  # characters before the end of a part that are searched for a cut
OFFSET_CHARACTERS = 1 << 15  # characters whose offsets are computed at once
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


def parts(pieces: Iterable[str], tokenizers: tuple[Tokenizer, ...], characters: int | None = None) -> Iterator[str]:
    """Cut a text into parts of this many characters or slightly less, by default `PART_CHARACTERS`.

    pieces: the text, in pieces of any lengths
    """
    characters = characters or PART_CHARACTERS
    ahead = max(_around(tokenizer) for tokenizer in tokenizers)
    text = ""
    for piece in chain(pieces, [None]):
        text += piece or ""
        while len(text) > characters + (0 if piece is None else ahead):
            cut = _last_cut(text, characters, tokenizers)
            yield text[:cut]
            text = text[cut:]
    yield text


def aligned_parts(pieces: Iterable[str], student: Tokenizer, teacher: Tokenizer, nfc: bool) -> Iterator[AlignedPart]:
    """The parts of a text, each NFC-normalized (with `nfc`), tokenized by both tokenizers and aligned. pieces: see `parts`"""
    done = Part(ends=False)
    for part in parts(pieces, (student, teacher)):
        part = unicodedata.normalize("NFC", part) if nfc else part
        n_bytes, first = len(part.encode()), done.student == 0
        s, t = _side(student, part, first, nfc), _side(teacher, part, first, nfc)
        aligned = align_texts(s, t, np.array([n_bytes]), done)
        by_offsets = not aligned.good[0]
        if by_offsets:
            ends = _by_offsets(student, part, first, s), _by_offsets(teacher, part, first, t)
            if ends[0] is not None and ends[1] is not None:
                aligned = align_texts(ends[0], ends[1], np.array([n_bytes]), done)
        yield AlignedPart(s.tokens, t.tokens, aligned, n_bytes, by_offsets)
        done = Part(done.student + len(s.tokens.ids), done.teacher + len(t.tokens.ids), ends=False)


def _side(tokenizer: Tokenizer, part: str, first: bool, nfc: bool) -> Side:
    encoder = tokenizer.encoder
    ids = encoder.encode([part]).ids if first else tokenizer.encode_continuation(part, encoder)
    tokens = Ragged(ids, np.array([0, len(ids)]))
    return Side(tokens, tokenizer.prefixes([part], nfc, first), tokenizer.short_byte_lengths)


def _by_offsets(tokenizer: Tokenizer, part: str, first: bool, side: Side) -> Side | None:
    """The same tokens with the byte lengths of the tokenizer's own offsets: id and table entry i belong to token i.

    None if the offsets do not tile the part. The offsets take some hundred bytes per token, so the part is tokenized again in
    slices; if their tokens are not those of the part, at once.
    """
    placed = _place(tokenizer, parts([part], (tokenizer,), OFFSET_CHARACTERS), first)
    if placed is not None and not np.array_equal(placed[0], side.tokens.ids):
        placed = _place(tokenizer, [part], first)
    if placed is None:
        return None
    lengths = placed[1].astype(np.uint16)
    only_prefix = lengths[:1] == 0  # a token that is only the dummy prefix: one byte, less the prefix
    lengths[:1] += only_prefix
    ids = np.arange(len(lengths), dtype=np.uint32)
    return Side(Ragged(ids, np.array([0, len(ids)])), only_prefix.astype(np.uint8), lengths)


def _place(tokenizer: Tokenizer, slices: Iterable[str], first: bool) -> list[NDArray[np.int64]] | None:
    """The ids of the slices and their byte lengths by offsets, both [N]; None if the offsets do not tile a slice."""
    placed: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for text in slices:
        lead = "" if (first and not placed) or tokenizer.prefix == "never" else SENTINEL
        tokens = tokenizer.encode_batch([lead + text])[0]
        if tokens.ends_from == "unknown":
            return None
        n = len(tokenizer.reference.encode([lead]).ids) if lead else 0
        placed.append((tokens.ids[n:].astype(np.int64), np.diff(tokens.ends[n:] - len(lead), prepend=0)))
    return [np.concatenate(arrays) for arrays in zip(*placed, strict=True)]


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
    around = _around(tokenizer)
    left, right = text[max(cut - around, 0) : cut], text[cut : cut + around]
    encoder = tokenizer.reference
    whole = encoder.encode([left + right]).ids
    halves = np.concatenate([encoder.encode([left]).ids, tokenizer.encode_continuation(right, encoder)])
    return np.array_equal(whole, halves)


def _around(tokenizer: Tokenizer) -> int:
    """Characters on each side of a cut that are tokenized to test it."""
    return max(AROUND, 4 * tokenizer.longest_added)
