"""A text -> token ids and the byte at which each token ends.

`open_tokenizer(path)` reads a Hugging Face `tokenizer.json` or a SentencePiece BPE model. Both kinds of BPE in use keep
every byte of the text, so one table of byte lengths and one cumulative sum give exact ends; the tokenizer's own offsets,
which are in characters and overlap where a character is cut, are asked only when the sum does not add up:

| kind | bytes of a piece | dummy prefix |
|---|---|---|
| byte-level BPE | one a character of GPT-2's byte alphabet | `add_prefix_space`: unless the text starts with a space |
| SentencePiece-like, byte fallback | U+2581 is one space, `<0xNN>` one byte | Prepend: always; Metaspace: likewise unless |

Tokenizers that change the text (NFKC, lower case) or lose parts of it (WordPiece, Unigram) are refused with the reason.
NFC is the caller's: normalise once, before both tokenizers. Added tokens written in a text ("</s>", "<|im_start|>") are
plain text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno import hub
from megatron_vocagno.corpus.encoders import Backend, Encoder, EncoderError, HuggingFaceEncoder, open_encoder
from megatron_vocagno.corpus.sentencepiece_model import SPACE, TokenizerError, sentencepiece_to_json
from megatron_vocagno.errors import looked_for

# a control character that no merge takes in: byte fallback or a byte of its own, whatever follows it
SPENT = "\x01"
SMALL_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "config.json"]
SMALL_FILES += ["generation_config.json"]
# normalizers that leave NFC text as it is, or only mark its spaces
HARMLESS_NORMALIZERS = ("NFC", "Prepend", "Replace")
# pre-tokenizers that cut a text without removing anything
HARMLESS_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts")


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

    vocab_size     highest id + 1, added tokens included
    byte_lengths   int32 [vocab_size], bytes of text of each id; 0 for those that no text gives (control tokens, gaps)
    fingerprint    sha256 of all that decides ids, bytes and EOS; equal for a tokenizer.json and the model it came from
    prefix         when a space that is not in the text is put before it
    encoder        gives the ids; `not_fast` says why that is not gigatoken, where it is not
    """

    eos_id: int
    eos_token: str
    vocab_size: int
    byte_lengths: NDArray[np.int32]
    fingerprint: str
    prefix: Literal["never", "always", "unless_space"]
    names: dict[str, str] = field(repr=False)
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

    def prefixes(self, texts: Sequence[str]) -> NDArray[np.uint8]:
        """uint8 [D]: how many spaces are put before each text (which is not empty)."""
        if self.prefix == "unless_space":
            return np.array([not text.startswith((" ", SPACE)) for text in texts], np.uint8)
        return np.full(len(texts), self.prefix == "always", np.uint8)

    @cached_property
    def short_byte_lengths(self) -> NDArray[np.uint16]:
        """uint16 [vocab_size]: `byte_lengths`, in half the cache."""
        return self.byte_lengths.astype(np.uint16)

    def save(self, folder: Path) -> None:
        """tokenizer.json, added tokens and all, and a tokenizer_config.json that names EOS: what transformers loads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self.source)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names, "eos_token": self.eos_token}
        (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2) + b"\n")

    def _place(self, text: str, ids: NDArray[np.int32]) -> Tokens:
        n_bytes = len(text.encode())
        prefix = int(self.prefixes([text])[0]) if n_bytes else 0
        ends = np.cumsum(self.byte_lengths[ids], dtype=np.int64) - prefix
        if (int(ends[-1]) if len(ends) else 0) == n_bytes:
            return Tokens(ids, ends)
        by_offsets = ends_from_offsets(text, self.reference.offsets(text), self.byte_lengths[ids], prefix)
        return Tokens(ids, ends, "unknown") if by_offsets is None else Tokens(ids, by_offsets, "offsets")


def open_tokenizer(path_or_id: str | Path, backend: Backend = "auto", eos_token: str | None = None) -> Tokenizer:
    """A folder or file on disk (tokenizer.json or a SentencePiece BPE model, known by content), or a Hub id, see hub.py.

    backend: "auto" takes gigatoken where it is installed, can read the tokenizer and gives the same ids.
    eos_token: for tokenizers that come without one; a token of the vocabulary.

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
    file = _find_file(path_or_id)
    data = file.read_bytes()
    try:
        raw = orjson.loads(data)
    except orjson.JSONDecodeError:
        raw, names = sentencepiece_to_json(data, file)
        data = orjson.dumps(raw)
    else:
        names = {}
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise TokenizerError(f"{file}: JSON, but not a tokenizer.json of Hugging Face tokenizers: it has no 'model'")
    try:
        return _build(raw, data, names | _names_beside(file.parent, raw), eos_token, backend)
    except (TokenizerError, EncoderError) as error:
        raise TokenizerError(f"{file}: {error}") from None


def _build(raw: dict[str, Any], source: bytes, names: dict[str, str], eos_token: str | None, backend: Backend) -> Tokenizer:
    if not _is_bpe(raw):
        raise TokenizerError(f"its model is {raw['model'].get('type')}, which may lose bytes of the text; only BPE is supported")
    added = raw.get("added_tokens") or []
    ids = raw["model"]["vocab"] | {a["content"]: a["id"] for a in added}
    eos = eos_token or names.get("eos_token")
    if eos is None:
        raise TokenizerError("no end-of-text token is named beside it; name one: eos_token=…, --student-eos or --teacher-eos")
    if eos not in ids:
        raise TokenizerError(f"the end-of-text token {eos!r} is not among its {len(ids):,} tokens")
    control = {a["content"] for a in added if a.get("special")} | {eos}
    prefix, plain = plain_text_encoder(raw, control)
    encoder, reference, not_fast = open_encoder(orjson.dumps(plain), backend)
    vocab_size = max(ids.values()) + 1
    decisive = {k: plain[k] for k in ("normalizer", "pre_tokenizer")} | {"eos": ids[eos], "vocab_size": vocab_size}
    decisive["model"] = {k: v for k, v in plain["model"].items() if v not in (None, False, "")}
    return Tokenizer(
        eos_id=ids[eos],
        eos_token=eos,
        vocab_size=vocab_size,
        byte_lengths=byte_table(plain, vocab_size, control),
        fingerprint=hashlib.sha256(orjson.dumps(decisive, option=orjson.OPT_SORT_KEYS)).hexdigest(),
        prefix=prefix,
        names={k: v for k, v in names.items() if v in ids},
        source=source,
        encoder=encoder,
        reference=reference,
        not_fast=not_fast,
    )


def plain_text_encoder(
    raw: dict[str, Any], control: set[str]
) -> tuple[Literal["never", "always", "unless_space"], dict[str, Any]]:
    """tokenizer.json -> (its dummy prefix, a tokenizer.json that reads everything as plain text and keeps every byte).

    Raises TokenizerError with the reason where the bytes of its tokens cannot be known.
    """
    model = {k: v for k, v in raw["model"].items() if k != "dropout"}
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerError("its pieces carry a subword prefix or suffix that is not in the text")
    normalizers, pre_tokenizers = list(_steps(raw.get("normalizer"))), list(_steps(raw.get("pre_tokenizer")))
    for step in normalizers:
        if step["type"] not in HARMLESS_NORMALIZERS or (step["type"] == "Replace" and not _marks_spaces(step)):
            raise TokenizerError(f"its normalizer changes the text ({step['type']}): byte positions would not be the text's")
    for step in pre_tokenizers:
        if step["type"] not in HARMLESS_PRE_TOKENIZERS or step.get("behavior") == "Removed":
            raise TokenizerError(f"its pre-tokenizer {step['type']} removes parts of the text")
    byte_level = [s for s in pre_tokenizers if s["type"] == "ByteLevel"]
    if not byte_level and not model.get("byte_fallback"):
        raise TokenizerError("neither byte-level nor with byte fallback: characters outside its vocabulary would be lost")
    prefix: Literal["never", "always", "unless_space"] = "never"
    if any(s["type"] == "Prepend" for s in normalizers):
        prefix = "always"
    elif any(s.get("add_prefix_space", True) for s in byte_level) or any(_metaspace_prepends(s) for s in pre_tokenizers):
        prefix = "unless_space"
    # no text may give a control token: neither through a merge nor as a whole word
    pairs = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) not in control]
    if model.get("ignore_merges"):
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in control}
    plain: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
        "decoder": None,
    }
    return prefix, plain | {"normalizer": raw.get("normalizer"), "pre_tokenizer": raw.get("pre_tokenizer"), "model": model}


def byte_table(plain: dict[str, Any], vocab_size: int, control: set[str]) -> NDArray[np.int32]:
    """int32 [vocab_size]: bytes of text of each id; 0 for control tokens and ids that no piece has."""
    lengths = np.zeros(vocab_size, np.int32)
    byte_level = any(s["type"] == "ByteLevel" for s in _steps(plain["pre_tokenizer"]))
    marked = any(_marks_spaces(s) for s in [*_steps(plain["normalizer"]), *_steps(plain["pre_tokenizer"])])
    unknown = plain["model"].get("unk_token")
    for piece, i in plain["model"]["vocab"].items():
        if piece in control or piece == unknown:
            continue
        if byte_level:
            lengths[i] = len(piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            lengths[i] = 1
        else:
            lengths[i] = len((piece.replace(SPACE, " ") if marked else piece).encode())
    return lengths


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


def _is_bpe(raw: dict[str, Any]) -> bool:
    return raw["model"].get("type", "BPE") == "BPE" and "merges" in raw["model"]


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat sequence."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("normalizers") or part.get("pretokenizers") or []:
            yield from _steps(inner)
    else:
        yield part


def _marks_spaces(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("replacement") == SPACE)
    return bool(step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE)


def _metaspace_prepends(step: dict[str, Any]) -> bool:
    if step["type"] != "Metaspace":
        return False
    return bool(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never")


def _find_file(path_or_id: str | Path) -> Path:
    path = Path(path_or_id)
    if path.is_file():
        return path
    if isinstance(path_or_id, str) and hub.is_id(path_or_id):
        path = _from_hub(path_or_id)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        what = "a folder without tokenizer.json or tokenizer.model"
    else:
        # a Path is never asked of the Hub
        what = "no such file or folder" + (f". {hub.taken_for_path(path_or_id)}" if isinstance(path_or_id, str) else "")
        what += looked_for(path_or_id)
    raise TokenizerError(f"cannot open the tokenizer {path_or_id}: {what}")


def _from_hub(name: str) -> Path:
    try:
        return hub.snapshot(name, SMALL_FILES)
    except hub.HubError as error:
        raise TokenizerError(f"cannot open the tokenizer {name}: no such folder here, and the hub says: {error}") from error


def _names_beside(folder: Path, raw: dict[str, Any]) -> dict[str, str]:
    """bos, eos, unk and pad token as the files beside a tokenizer name them."""
    names: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in _read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key in ("bos_token", "eos_token", "unk_token", "pad_token") and isinstance(content, str):
                names.setdefault(key, content)
    pieces = {i: piece for piece, i in raw["model"].get("vocab", {}).items()} if _is_bpe(raw) else {}
    pieces |= {a["id"]: a["content"] for a in raw.get("added_tokens") or []}
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(folder / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if eos in pieces:
            names.setdefault("eos_token", pieces[eos])
    return names


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(file.read_bytes()) if file.is_file() else {}
    except orjson.JSONDecodeError as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
