"""A text -> token ids and the byte at which each token ends.

`open_tokenizer(path)` reads a Hugging Face `tokenizer.json` or a SentencePiece BPE model. Both kinds of BPE in use keep
every byte of the text, so one table of byte lengths and one cumulative sum give exact ends:

| kind | bytes of a piece | dummy prefix |
|---|---|---|
| byte-level BPE | one a character of GPT-2's byte alphabet | `add_prefix_space`: unless the text starts with a space |
| SentencePiece-like, byte fallback | U+2581 is one space, `<0xNN>` one byte | Prepend: always; Metaspace: likewise unless |
| added tokens (runs of spaces, HTML tags) | those of their text | put before each part that they cut off, too, in some |

Where the table cannot know, its sum is not believed, even where it adds up: U+2581 in the text, a text that the tokenizer
brings into NFC, an added token that takes the spaces around it or is followed by a prefix. Then the tokenizer's own offsets are
asked, which are in characters and overlap where a character is cut; where these do not tile the text either, its ends are
"unknown".

Tokenizers that change the text (NFKC, lower case) or lose parts of it (WordPiece, Unigram) are refused with the reason.
NFC is the caller's: normalise once, before both tokenizers. Control tokens written in a text ("</s>", "<|im_start|>") are
plain text; all else is read as the tokenizer itself reads it (`plain_text`).
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
from megatron_vocagno.corpus.tokenizer_files import end_of_text, find_file, names_beside
from megatron_vocagno.errors import EncoderError, TokenizerError

# a control character that no merge takes in: byte fallback or a byte of its own, whatever follows it
SPENT = "\x01"
UNSURE = 255  # a text whose bytes are not those that its tokens have by the table


@dataclass(frozen=True)
class Tokens:
    """One document, tokenized.

    ids        int32 [N]
    ends       int64 [N], the UTF-8 byte of the document at which each token ends; never falling
    ends_from  where the ends come from: the byte table, the tokenizer's offsets, or "unknown": then they do not reach the
               text's end, nothing may be aligned with them

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
        """Bytes of text that the tokens hold; 0 where there are none."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pieces(self, text: str) -> list[bytes]:
        """[N] the bytes of each token, of the text that was tokenized: a token may hold a part of a character."""
        data = text.encode()
        return [data[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer whose tokens have known byte lengths.

    eos_token      ends a document; `eos_why` says why it is not the one that the tokenizer names, where it is not
    vocab_size     highest id + 1, added tokens included
    byte_lengths   int32 [vocab_size], bytes of text of each id; 0 for those that no text gives (control tokens, gaps)
    unsure         ids of added tokens whose bytes differ from text to text
    front          what its model reads in front of a text: BOS or nothing, see `front`
    fingerprint    sha256 of all that decides ids, bytes and EOS; equal for a tokenizer.json and the model it came from
    prefix         when a space that is not in the text is put before it
    marked, composes  its pieces have U+2581 for a space; it brings a text into NFC
    added          its added tokens that a text may give; `samples` are texts that have them
    original       the file that it was read from, `source` its tokenizer.json
    encoder        gives the ids; `not_fast` says why that is not gigatoken, where it is not
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
        """Tokens of each text, without BOS or EOS; an empty text has none."""
        tokens = self.encoder.encode(texts)
        return [self._place(text, tokens[i].astype(np.int32)) for i, text in enumerate(texts)]

    def encode_continuation(self, text: str, encoder: Encoder) -> NDArray[np.uint32]:
        """[N] ids of a text that follows other text: without a dummy prefix.

        The prefix is spent on a control character, whose tokens are taken off again.
        """
        if self.prefix == "never":
            return encoder.encode([text]).ids
        lead = len(encoder.encode([SPENT]).ids)
        return encoder.encode([SPENT + text]).ids[lead:]

    def prefixes(self, texts: Sequence[str], nfc: bool = False, first: bool = True) -> NDArray[np.uint8]:
        """uint8 [D]: how many spaces are put before each text (which is not empty); UNSURE: the table cannot know its bytes.

        nfc: the texts are in NFC, which takes longer to see than to know. first: they begin documents.
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
        """uint16 [vocab_size]: `byte_lengths`, in half the cache; 0 for `unsure` as well, so that no sum is believed."""
        table = self.byte_lengths.astype(np.uint16)
        table[self.unsure] = 0
        return table

    @cached_property
    def longest_added(self) -> int:
        """Characters of the longest added token that a text may give; 0 without any."""
        return max(map(len, self.added), default=0)

    @property
    def _spaces(self) -> tuple[str, ...]:
        """What a text begins with that gets no prefix."""
        return (" ", SPACE) if self.marked else (" ",)

    def save(self, folder: Path) -> None:
        """tokenizer.json, added tokens and all, and a tokenizer_config.json that names EOS: what transformers loads."""
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
    """A folder or file on disk (tokenizer.json or a SentencePiece BPE model, known by content), or a Hub id, see hub.py.

    backend: "auto" takes gigatoken where it is installed, can read the tokenizer and gives the same ids.
    eos_token: for tokenizers that come without one, or name another; a token of the vocabulary.

    Raises TokenizerError: nothing there, not one of the two kinds, text would be lost, no end-of-text token is known.

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
        return _build(raw, original, names | names_beside(file.parent, raw), front, file.parent, eos_token, backend)
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
    # a token that fills rows up is in no text, whatever its flag says
    control = {a["content"] for a in added if a.get("special") or a["content"] == names.get("pad_token")}
    eos, eos_why = eos_token or names.get("eos_token"), ""
    if eos is None:
        raise TokenizerError("no end-of-text token is named beside it; name one: eos_token=…, --student-eos or --teacher-eos")
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
        _prove_whole(tokenizer)
    return tokenizer


def _added_bytes(
    table: NDArray[np.int32], plain: PlainText, reference: HuggingFaceEncoder, controls: set[int]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The table with the bytes of ordinary added tokens, and the ids among these whose bytes it cannot tell."""
    unsure = []
    for token in plain.ordinary:
        content = token["content"]
        i = reference.id_of(content)
        if i in controls:
            continue  # a file whose ids are taken twice: the library never finds this token
        text = reference.normalised(content) if token.get("normalized", True) else content
        n_bytes = len((text.replace(SPACE, " ") if plain.marked and text != content else text).encode())
        if content not in plain.json["model"]["vocab"]:
            table[i] = n_bytes
        elif plain.marked and SPACE in content:
            continue  # as a piece it is spaces, as a text U+2581: such texts are UNSURE
        if table[i] != n_bytes or plain.again or token.get("lstrip") or token.get("rstrip"):
            unsure.append(i)
    return table, np.array(unsure, np.int64)


def _samples(contents: list[str]) -> tuple[str, ...]:
    """Each within a word, between spaces and line ends, doubled; some at the start and at the end of a text."""
    among = [f"a{c}b {c} c\n{c}{c}1" for c in contents]
    some = contents[:: max(len(contents) // 64, 1)]
    return (*("\n".join(among[i : i + 16]) for i in range(0, len(among), 16)), *(f"{c} x{c}" for c in some))


def _prove_whole(tokenizer: Tokenizer) -> None:
    """Raises TokenizerError where its pre-tokenizer drops what its pattern does not match, and the pattern leaves something."""
    known = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    runs = ["".join(known[i : i + 64]) for i in range(0, len(known), 64)]
    texts = [unicodedata.normalize("NFC", text) for text in (*SAMPLE, *runs)]
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if tokens.ends_from != "table":
            raise TokenizerError(f"its pre-tokenizer Split removes parts of the text, of {text[:60]!r}… for one")


def _source(raw: dict[str, Any], original: bytes, front: tuple[int, ...]) -> bytes:
    """A tokenizer.json that puts `front` before a text."""
    from_json = original.lstrip()[:1] == b"{"
    if from_json and around_a_text(raw.get("post_processor"))[0] == front:
        return original
    pieces = {i: piece for piece, i in raw["model"]["vocab"].items()}
    pieces |= {a["id"]: a["content"] for a in raw.get("added_tokens") or []}
    return orjson.dumps(raw | {"post_processor": putting_in_front([(pieces[i], i) for i in front])})


def ends_from_offsets(
    text: str, offsets: list[tuple[int, int]], lengths: NDArray[np.int32], prefix: int
) -> NDArray[np.int64] | None:
    """Byte ends [N] from the tokenizer's character offsets [N], or None where these do not tile the text.

    Tokens that share one range (a character cut into bytes) divide it by their byte lengths, which must add up to it.
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    byte_at = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths, dtype=np.int64)])
    ends: list[int] = []
    here = i = 0
    if prefix and len(lengths) and lengths[0] == prefix and len(lengths) > 1 and offsets[1][0] == 0:
        ends.append(0)  # the dummy prefix alone: the tokenizer gives it the first character, which it does not hold
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
