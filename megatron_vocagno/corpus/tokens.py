"""A text -> token ids and the byte at which each token ends.

`open_tokenizer(path)` reads a Hugging Face `tokenizer.json` or a SentencePiece BPE model. Both common kinds of BPE keep every
byte of the text, so a table of byte lengths and a cumulative sum give exact ends:

| kind | bytes of a piece | dummy prefix |
|---|---|---|
| byte-level BPE | one per character of GPT-2's byte alphabet | `add_prefix_space`: unless the text starts with a space |
| SentencePiece-like, byte fallback | U+2581 is one space, `<0xNN>` one byte | Prepend: always; Metaspace: as above |
| added tokens (runs of spaces, HTML tags) | those of their text | in some tokenizers also before each part after the token |

In some cases the sum of the table may be wrong even if it equals the length of the text, and is not used: a text with U+2581, a
text that the tokenizer converts to NFC, an added token that removes the spaces around it or is followed by a prefix. The
tokenizer's own offsets are used then. They count characters, and overlap if a token ends inside a character. If they do not tile
the text either, the ends are "unknown".

Tokenizers that change the text (NFKC, lower case) or lose parts of it (WordPiece, Unigram) are refused with the reason. The
caller normalizes to NFC, once for both tokenizers. Control tokens written in a text ("</s>", "<|im_start|>") are plain text. All
other text is read as the tokenizer itself reads it (`plain_text`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno.corpus.encoders import SAMPLE, Backend, Encoder, HuggingFaceEncoder, around_a_text, open_encoder
from megatron_vocagno.corpus.front import front_of_json, front_of_sentencepiece, putting_in_front
from megatron_vocagno.corpus.plain_text import PlainText, byte_table, digest, parts_of, plain_text
from megatron_vocagno.corpus.sentencepiece_model import SPACE, sentencepiece_to_json
from megatron_vocagno.corpus.tokenizer_files import end_of_text, find_file, token_names
from megatron_vocagno.errors import EncoderError, TokenizerError

SENTINEL = "\x01"  # a control character that is in no merge: its token is always a single byte
UNSURE = 255  # marks a text for which the table of byte lengths may be wrong


@dataclass(frozen=True)
class Tokens:
    """The tokens of one document.

    ids        int32 [N]
    ends       int64 [N], the UTF-8 byte of the document at which each token ends; non-decreasing
    ends_from  source of the ends: the byte table, the tokenizer's offsets, or "unknown". Unknown ends do not reach the end of the
               text and cannot be aligned.

    >>> tokens = Tokens(ids=np.array([5, 9]), ends=np.array([3, 9]))
    >>> tokens.starts.tolist(), tokens.pieces("selection")
    ([0, 3], [b'sel', b'ection'])
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    ends_from: Literal["table", "offsets", "unknown"] = "table"

    @property
    def starts(self) -> NDArray[np.int64]:
        """int64 [N], the byte at which each token starts."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[: len(self.ends)]

    @property
    def n_bytes(self) -> int:
        """Bytes of text of all tokens; 0 if there are no tokens."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pieces(self, text: str) -> list[bytes]:
        """[N] the bytes of each token. A token may contain a part of a character.

        text: the text that was tokenized
        """
        data = text.encode()
        return [data[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer whose tokens have known byte lengths.

    eos_token      ends a document
    eos_why        how `eos_token` differs from the tokenizer's own end of text, else ""
    vocab_size     highest id + 1, including added tokens
    byte_lengths   int32 [vocab_size], bytes of text of each id; 0 for ids that no text produces (control tokens, gaps)
    unsure         ids of added tokens whose bytes depend on the text
    front          ids that its model reads in front of a text: BOS or nothing, see the module `front`
    fingerprint    hash of all that determines ids, bytes and EOS; equal for a tokenizer.json and the SentencePiece model of it
    prefix         when the tokenizer puts a space before a text that is not in the text
    marked         whether its pieces write spaces as U+2581
    composes       whether it converts a text to NFC
    added          its added tokens that a text may produce
    samples        texts with the added tokens
    original       the content of the file from which it was read
    source         the content of its tokenizer.json
    encoder        computes the ids
    not_fast       the reason why the encoder is not gigatoken, else ""
    """

    eos_id: int
    eos_token: str
    eos_why: str
    vocab_size: int
    byte_lengths: NDArray[np.int32]
    unsure: NDArray[np.int64]
    front: tuple[int, ...]
    fingerprint: str
    prefix: Literal["never", "always", "unless_space"]
    marked: bool
    composes: bool
    names: dict[str, str] = field(repr=False)
    control: frozenset[str] = field(repr=False)
    added: tuple[str, ...] = field(repr=False)
    samples: tuple[str, ...] = field(repr=False)
    original: bytes = field(repr=False)
    source: bytes = field(repr=False)
    encoder: Encoder = field(repr=False)
    reference: HuggingFaceEncoder = field(repr=False)
    not_fast: str = ""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text, without BOS or EOS. An empty text has no tokens."""
        tokens = self.encoder.encode(texts)
        return [self._place(text, tokens[i].astype(np.int32)) for i, text in enumerate(texts)]

    def encode_continuation(self, text: str, encoder: Encoder) -> NDArray[np.uint32]:
        """[N] ids of a text that continues another text, that is without a dummy prefix.

        The text is tokenized after a control character, which gets the prefix. Its tokens are then removed.
        """
        if self.prefix == "never":
            return encoder.encode([text]).ids
        lead = len(encoder.encode([SENTINEL]).ids)
        return encoder.encode([SENTINEL + text]).ids[lead:]

    def prefixes(self, texts: Sequence[str], nfc: bool = False, first: bool = True) -> NDArray[np.uint8]:
        """uint8 [D]: the number of spaces that are put before each text, or UNSURE if the table of bytes may be wrong for it.

        texts  not empty
        nfc    whether all texts are known to be in NFC; if not, they are tested, which takes time
        first  whether the texts begin documents
        """
        if not first or self.prefix == "never":
            found = np.zeros(len(texts), np.uint8)
        elif self.prefix == "always":
            found = np.ones(len(texts), np.uint8)
        else:
            found = np.array([not text.startswith(self._spaces) for text in texts], np.uint8)
        if self.marked:
            found[[SPACE in text for text in texts]] = UNSURE
        if self.composes and not nfc:
            found[[not unicodedata.is_normalized("NFC", text) for text in texts]] = UNSURE
        return found

    @cached_property
    def short_byte_lengths(self) -> NDArray[np.uint16]:
        """uint16 [vocab_size]: `byte_lengths` in half the memory. It is 0 for `unsure` ids, so that their texts are not good."""
        table = self.byte_lengths.astype(np.uint16)
        table[self.unsure] = 0
        return table

    @cached_property
    def longest_added(self) -> int:
        """Characters of the longest added token that a text may produce; 0 if there are none."""
        return max(map(len, self.added), default=0)

    @property
    def _spaces(self) -> tuple[str, ...]:
        """The beginnings of texts that get no prefix."""
        return (" ", SPACE) if self.marked else (" ",)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json with the added tokens, and tokenizer_config.json with EOS. transformers can load both."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self.source)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names, "eos_token": self.eos_token}
        (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")

    def _place(self, text: str, ids: NDArray[np.int32]) -> Tokens:
        if not text:
            return Tokens(ids, np.zeros(0, np.int64))
        prefix = int(self.prefixes([text])[0])
        lengths = self.short_byte_lengths[ids].astype(np.int64)
        if prefix != UNSURE and lengths.all() and int(lengths.sum()) - prefix == len(text.encode()):
            return Tokens(ids, np.cumsum(lengths) - prefix)
        prefix = self.prefix == "always" or (self.prefix == "unless_space" and not text.startswith(self._spaces))
        by_offsets = ends_from_offsets(text, self.reference.offsets(text), self.byte_lengths[ids], prefix)
        if by_offsets is not None:
            return Tokens(ids, by_offsets, "offsets")
        return Tokens(ids, np.cumsum(self.byte_lengths[ids], dtype=np.int64) - prefix, "unknown")


def open_tokenizer(path_or_id: str | Path, backend: Backend = "auto", eos_token: str | None = None) -> Tokenizer:
    """Open a tokenizer.

    path_or_id  a folder or file (tokenizer.json or a SentencePiece BPE model, recognized by its content), or a Hub id, see hub.py
    backend     "auto" uses gigatoken if it is installed, can read the tokenizer and gives the same ids
    eos_token   a token of the vocabulary, for a tokenizer that has no end-of-text token or the wrong one

    Raises TokenizerError if there is no tokenizer, it is not one of these two kinds, text would be lost, or no end-of-text token
    is known.

    >>> mistral = open_tokenizer("mistral")
    >>> mistral.vocab_size, mistral.eos_token, mistral.prefix
    (32000, '</s>', 'always')
    >>> (tokens,) = mistral.encode_batch(["Zoë"])
    >>> tokens.ids.tolist(), tokens.ends.tolist(), tokens.pieces("Zoë")
    ([1054, 28709, 28919], [1, 2, 4], [b'Z', b'o', b'\\xc3\\xab'])
    """
    if backend not in get_args(Backend):
        raise TokenizerError(f"no tokenizer backend {backend!r}; there are {', '.join(map(repr, get_args(Backend)))}")
    file = find_file(path_or_id)
    original = file.read_bytes()
    names: dict[str, str] = {}
    from_model = False
    try:
        raw = orjson.loads(original)
    except orjson.JSONDecodeError:
        raw, names = sentencepiece_to_json(original, file)
        from_model = True
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise TokenizerError(f"{file}: JSON, but not a tokenizer.json of Hugging Face tokenizers: it has no 'model'")
    try:
        front = front_of_sentencepiece(names, raw["model"]["vocab"], file) if from_model else front_of_json(raw, file)
        return _build(raw, original, names | token_names(file.parent, raw), front, file.parent, eos_token, backend)
    except (TokenizerError, EncoderError) as error:
        raise TokenizerError(f"{file}: {error}") from None


def _build(
    raw: dict[str, Any],
    original: bytes,
    names: dict[str, str],
    front: tuple[int, ...],
    folder: Path,
    eos_token: str | None,
    backend: Backend,
) -> Tokenizer:
    if raw["model"].get("type", "BPE") != "BPE" or "merges" not in raw["model"]:
        raise TokenizerError(f"its model is {raw['model'].get('type')}, which may lose bytes of the text; only BPE is supported")
    added = raw.get("added_tokens") or []
    ids = raw["model"]["vocab"] | {a["content"]: a["id"] for a in added}
    # a padding token is never in a text, even if it is not flagged as special
    control = {a["content"] for a in added if a.get("special") or a["content"] == names.get("pad_token")}
    eos, eos_why = eos_token or names.get("eos_token"), ""
    if eos is None:
        raise TokenizerError("no file next to it names an end-of-text token: pass eos_token=…, --student-eos or --teacher-eos")
    if eos_token is None:
        eos, eos_why = end_of_text(eos, control, folder)
    if eos not in ids:
        raise TokenizerError(f"the end-of-text token {eos!r} is not among its {len(ids):,} tokens")
    control |= {eos}
    plain = plain_text(raw, control)
    contents = [token["content"] for token in plain.ordinary]
    samples = _samples(contents)
    encoder, reference, not_fast = open_encoder(orjson.dumps(plain.json), backend, samples)
    vocab_size = max(ids.values()) + 1
    controls = {ids[token] for token in control if token in ids}
    table, unsure = _added_bytes(byte_table(plain, vocab_size, control), plain, reference, controls)
    tokenizer = Tokenizer(
        eos_id=ids[eos],
        eos_token=eos,
        eos_why=eos_why,
        vocab_size=vocab_size,
        byte_lengths=table,
        unsure=unsure,
        front=front,
        fingerprint=digest(parts_of(plain, ids[eos], vocab_size)),
        prefix=plain.prefix,
        marked=plain.marked,
        composes=plain.composes,
        names={k: v for k, v in names.items() if v in ids},
        control=frozenset(control),
        samples=samples,
        added=tuple(contents),
        original=original,
        source=_source(raw, original, front),
        encoder=encoder,
        reference=reference,
        not_fast=not_fast,
    )
    if plain.drops:
        _require_nothing_dropped(tokenizer)
    return tokenizer


def _added_bytes(
    table: NDArray[np.int32], plain: PlainText, reference: HuggingFaceEncoder, controls: set[int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The table with the bytes of ordinary added tokens, and the ids of those whose bytes depend on the text."""
    unsure = []
    for token in plain.ordinary:
        content = token["content"]
        i = reference.id_of(content)
        if i in controls:
            continue  # two tokens have this id: the library never finds this one
        text = reference.normalized(content) if token.get("normalized", True) else content
        n_bytes = len((text.replace(SPACE, " ") if plain.marked and text != content else text).encode())
        if content not in plain.json["model"]["vocab"]:
            table[i] = n_bytes
        elif plain.marked and SPACE in content:
            continue  # its piece means spaces, its text means U+2581: texts with U+2581 are UNSURE
        if table[i] != n_bytes or plain.again or token.get("lstrip") or token.get("rstrip"):
            unsure.append(i)
    return table, np.array(unsure, np.int64)


def _samples(contents: list[str]) -> tuple[str, ...]:
    """Texts with each added token: inside a word, between spaces and line ends, twice; some at the start and end of a text."""
    among = [f"a{c}b {c} c\n{c}{c}1" for c in contents]
    some = contents[:: max(len(contents) // 64, 1)]
    return (*("\n".join(among[i : i + 16]) for i in range(0, len(among), 16)), *(f"{c} x{c}" for c in some))


def _require_nothing_dropped(tokenizer: Tokenizer) -> None:
    """Raises TokenizerError if the pre-tokenizer drops unmatched text and its pattern does not match every character."""
    known = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    runs = ["".join(known[i : i + 64]) for i in range(0, len(known), 64)]
    texts = [unicodedata.normalize("NFC", text) for text in (*SAMPLE, *runs)]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokens.ends_from != "table":
            raise TokenizerError(f"its pre-tokenizer Split removes parts of the text, for example of {text[:60]!r}…")


def _source(raw: dict[str, Any], original: bytes, front: tuple[int, ...]) -> bytes:
    """The content of a tokenizer.json that puts `front` before a text."""
    from_json = original.lstrip()[:1] == b"{"
    if from_json and around_a_text(raw.get("post_processor"))[0] == front:
        return original
    pieces = {i: piece for piece, i in raw["model"]["vocab"].items()}
    pieces |= {a["id"]: a["content"] for a in raw.get("added_tokens") or []}
    return orjson.dumps(raw | {"post_processor": putting_in_front([(pieces[i], i) for i in front])})


def ends_from_offsets(
    text: str, offsets: list[tuple[int, int]], lengths: NDArray[np.int32], prefix: int
) -> NDArray[np.int64] | None:
    """Byte ends [N] from the tokenizer's character offsets [N], or None if these do not tile the text.

    Tokens that share one range (a character that is cut into bytes) divide it by their byte lengths, which must add up to it.

    lengths  int32 [N], bytes of each token by the table
    prefix   number of spaces that the tokenizer puts before the text

    For example, two tokens of one character of three bytes, of 2 bytes and 1 byte, after a token of one letter:

    >>> ends_from_offsets("a一", [(0, 1), (1, 2), (1, 2)], np.array([1, 2, 1], np.int32), 0).tolist()
    [1, 3, 4]
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    byte_at = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths, dtype=np.int64)])
    ends: list[int] = []
    here = i = 0
    if prefix and len(lengths) and lengths[0] == prefix and len(lengths) > 1 and offsets[1][0] == 0:
        ends.append(0)  # a token that is only the dummy prefix: its offset is the first character, which it does not contain
        i = 1
    while i < len(offsets):
        first, last = offsets[i]
        j = i + 1
        while j < len(offsets) and offsets[j] == (first, last):
            j += 1
        if first != here or last <= first:
            return None
        inner = int(byte_at[first]) + np.cumsum(lengths[i:j], dtype=np.int64)
        if j - i > 1 and inner[-1] != byte_at[last]:
            return None
        ends += [*inner[:-1].tolist(), int(byte_at[last])]
        here, i = last, j
    return np.array(ends, np.int64) if here == len(text) else None
