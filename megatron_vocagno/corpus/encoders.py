"""Texts -> token ids, many texts at once.

Two backends give the same ids: Hugging Face tokenizers, and gigatoken (https://github.com/marcelroed/gigatoken), which takes a
fraction of the time. The ids of gigatoken are compared with Hugging Face's when it is opened, and later for the texts that the
caller names. gigatoken only gets `str`, never bytes: invalid UTF-8 can crash the process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno.errors import EncoderError, EncoderMismatchError

Backend = Literal["auto", "gigatoken", "huggingface"]
REASON_CHARACTERS = 120
"""Longest reason of gigatoken in a message."""

# A byte-level tokenizer of gigatoken caches each word in a table that doubles. In a process above RESIDENT_LIMIT it is opened
# again after TEXT_BEFORE_REOPENING characters: this costs 0.8 s, or some 4 ms per megabyte of text, and saves 50 MB. (A tokenizer
# of SentencePiece's kind caches nothing from call to call.)
RESIDENT_LIMIT = 400 << 20
TEXT_BEFORE_REOPENING = 224 << 20


@dataclass(frozen=True)
class Ragged:
    """Token ids of D texts, concatenated.

    ids     uint32 [N]
    bounds  int64 [D + 1]; text d has the ids ids[bounds[d] : bounds[d + 1]]
    """

    ids: NDArray[np.uint32]
    bounds: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [D], tokens of each text."""
        return np.diff(self.bounds)

    def __getitem__(self, text: int) -> NDArray[np.uint32]:
        return self.ids[self.bounds[text] : self.bounds[text + 1]]

    def select(self, texts: NDArray[np.bool_]) -> Ragged:
        """The ids of the texts whose flag is set. texts: bool [D]"""
        if texts.all():
            return self
        lengths = self.lengths
        return Ragged(self.ids[np.repeat(texts, lengths)], bounds_of(lengths[texts]))


def bounds_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [D] -> int64 [D + 1], from 0."""
    bounds = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


class Encoder(Protocol):
    """A backend.

    `encode` returns the token ids of each text, without BOS or EOS. check: indices of texts whose ids are compared with Hugging
    Face's.
    """

    name: str

    def encode(self, texts: Sequence[str], check: Sequence[int] = ()) -> Ragged: ...


class HuggingFaceEncoder:
    """The reference backend."""

    name = "huggingface"

    def __init__(self, plain: bytes) -> None:
        """plain: a tokenizer.json that reads everything as plain text. Raises EncoderError."""
        import tokenizers  # imported here, because reading a dataset does not need it

        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_str(plain.decode())
        except Exception as error:  # the library raises no more specific class
            raise EncoderError(f"the tokenizers library refuses it: {error}") from None

    def encode(self, texts: Sequence[str], check: Sequence[int] = ()) -> Ragged:
        encoded = [np.array(e.ids, np.uint32) for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return Ragged(np.concatenate([np.zeros(0, np.uint32), *encoded]), bounds_of(lengths))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """[N] the range of characters of each token, by the tokenizer itself."""
        offsets: list[tuple[int, int]] = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def id_of(self, token: str) -> int:
        """The id of a piece or an added token, which must exist."""
        found: int | None = self.tokenizer.token_to_id(token)
        assert found is not None, token
        return found

    def normalized(self, text: str) -> str:
        """The text after the tokenizer's normalizer."""
        normalizer = self.tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


class OwnTokenizer:
    """A tokenizer's original file in its own library: tokenizers for a tokenizer.json, sentencepiece for a model file."""

    def __init__(self, file: bytes) -> None:
        """file: the content of the file. Raises EncoderError."""
        if file.lstrip()[:1] == b"{":
            self.library = "tokenizers"
            self.tokenizer: Any = HuggingFaceEncoder(file).tokenizer
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            if getattr(self.tokenizer.model, "dropout", None):
                self.tokenizer.model.dropout = None  # dropout is only for training
        else:
            import sentencepiece

            self.library = "sentencepiece"
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_proto=file)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """[D] ids of each text, without BOS or EOS."""
        if self.library == "sentencepiece":
            ids: list[list[int]] = self.tokenizer.encode(list(texts))
            return ids
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def piece(self, i: int) -> str:
        """The name of a token."""
        return str(self.tokenizer.id_to_piece(i) if self.library == "sentencepiece" else self.tokenizer.id_to_token(i))


class GigatokenEncoder:
    """The gigatoken backend."""

    name = "gigatoken"

    def __init__(self, plain: bytes, reference: HuggingFaceEncoder, samples: Sequence[str] = ()) -> None:
        """Open gigatoken and compare its ids.

        samples: texts to compare in addition to SAMPLE

        Raises EncoderError if gigatoken cannot read the tokenizer, EncoderMismatchError if its ids differ.
        """
        self.plain, self.reference = plain, reference
        self.tokenizer = self._open()
        texts = [*SAMPLE, *samples]
        self.encode(texts, check=range(len(texts)))

    def encode(self, texts: Sequence[str], check: Sequence[int] = ()) -> Ragged:
        """See Encoder. Raises EncoderMismatchError if the ids of a text in `check` differ from Hugging Face's."""
        if self.caches_words and self.text_read > TEXT_BEFORE_REOPENING and _resident_bytes() > RESIDENT_LIMIT:
            self.tokenizer = self._open()
        self.text_read += sum(map(len, texts))
        # not parallel: each worker uses one core
        layout = self.tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        ids: NDArray[np.uint32] = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        found = Ragged(ids, offsets - offsets[0])
        expected = self.reference.encode([texts[text] for text in check])
        for i, text in enumerate(check):
            if not np.array_equal(found[text], expected[i]):
                raise EncoderMismatchError(_first_difference(texts[text], found[text], expected[i]))
        return found

    def _open(self) -> Any:
        import gigatoken

        self.tokenizer = None  # free its memory first
        try:
            tokenizer = gigatoken.Tokenizer.from_json(self.plain)
        except Exception as error:  # its native code raises different classes for an unknown tokenizer
            reason = str(error).splitlines()[0]  # it may contain the complete pattern that splits words
            shown = reason if len(reason) <= REASON_CHARACTERS else f"{reason[: REASON_CHARACTERS - 1]}…"
            raise EncoderError(f"gigatoken cannot read it: {shown}") from None
        self.text_read = 0  # characters
        self.caches_words = isinstance(tokenizer.backend, gigatoken.gigatoken_rs.BPETokenizer)
        trim_memory()
        return tokenizer


def around_a_text(post_processor: Mapping[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor of a tokenizer.json puts before and after a text. Raises EncoderError."""
    if post_processor is None:
        return (), ()
    text = 2**32 - 1  # the id of the text's only token; no other token has it
    model = {"type": "WordLevel", "vocab": {"a": text}, "unk_token": "a"}
    nothing: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    raw = {**nothing, "post_processor": post_processor, "model": model}
    ids = HuggingFaceEncoder(orjson.dumps(raw)).tokenizer.encode("a").ids
    at = ids.index(text)
    return tuple(ids[:at]), tuple(ids[at + 1 :])


def open_encoder(plain: bytes, backend: Backend, samples: Sequence[str] = ()) -> tuple[Encoder, HuggingFaceEncoder, str]:
    """The encoder, the reference, and the reason why the encoder is not gigatoken ("" if it is, or if it was not requested).

    samples: texts that are compared when gigatoken is opened, in addition to SAMPLE

    Raises EncoderError if the requested backend cannot read the tokenizer, or with "auto" no backend can. Raises
    EncoderMismatchError if gigatoken was requested and gives other ids.
    """
    reference = HuggingFaceEncoder(plain)
    if backend == "huggingface":
        return reference, reference, ""
    if importlib.util.find_spec("gigatoken") is None:
        if backend == "gigatoken":
            raise EncoderError("gigatoken is not installed: pip install 'megatron-vocagno[fast]'")
        return reference, reference, "gigatoken is not installed"
    try:
        return GigatokenEncoder(plain, reference, samples), reference, ""
    except (EncoderError, EncoderMismatchError) as error:
        if backend == "gigatoken":
            raise
        return reference, reference, str(error)


def _first_difference(text: str, found: NDArray[np.uint32], expected: NDArray[np.uint32]) -> str:
    n = min(len(found), len(expected))
    different = np.flatnonzero(found[:n] != expected[:n])
    at = int(different[0]) if len(different) else n
    return (
        f"gigatoken gives other ids than Hugging Face for {text[:60]!r}…: "
        f"from token {at} on {found[at : at + 4].tolist()} instead of {expected[at : at + 4].tolist()}"
    )


def trim_memory() -> None:
    """Return freed memory to the system if the C library supports it: parsing a tokenizer leaves 50 MB of free blocks."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - called for each batch
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# texts on which tokenizers have differed: combining marks, spaces, digits, control tokens as text, scripts, emoji
SAMPLE = (
    "The quick brown fox doesn't jump over 12,345.678 lazy dogs;  they'll RUN\taway!\n\n  def f(x): return x**2\r\n",
    " leading, trailing ",
    "\n\n\n \t  x",
    "1234567890 ½ ² Ⅷ ٣٤٥ 一二三",
    "</s> <s> <unk> <0x41> <|endoftext|> <|im_start|> [INST] ▁ Ġ",
    "e\u0301 o\u0302\u0301 Z\u0351\u036b q\u0323\u0307 \u0301x a\u034fb",
    "각\u1112\u1161\u11ab café naïve ﬁ ｆｕｌｌ Å",
    "Все люди рождаются свободными. Όλοι οι άνθρωποι. יולד חופשי. حقوقًا متساوين",
    "人人生而自由,在尊严和权利上一律平等。すべての人間は。모든 인간은",
    "सभी मनुष्यों को गौरव มนุษย์ทั้งหลาย ყველა ადამიანი",
    "👩‍👩‍👧‍👦 🇺🇳 👍🏽 𝔘𝔫𝔦 𒀀 \U0010fffd",
    "\x00\x01\x1b[0m\x7f \ufeff\u200b\u200d\u00a0\u2003\u3000 x",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, \\int_0^\\infty e^{-x^2}\\,dx",
    "a" * 300 + "=" * 300 + " " * 300 + "\n" * 60 + "ab" * 200,
    "x",
    "é",
    " ",
)
