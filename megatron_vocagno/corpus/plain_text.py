"""A tokenizer.json -> a tokenizer.json that reads every text in the same way, but has no control tokens.

A control token that is written out in a text, such as "</s>", is ordinary text here. The control tokens and the merges that
produce them are therefore removed. All other added tokens are ordinary vocabulary of the model (runs of spaces, HTML tags,
letters) and are kept, with their flags and ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno.corpus.sentencepiece_model import FIRST_ONLY, SPACE
from megatron_vocagno.errors import TokenizerError

# normalizers that do not change NFC text, or only mark its spaces
HARMLESS_NORMALIZERS = ("NFC", "Prepend", "Replace")
# pre-tokenizers that cut a text without removing anything
HARMLESS_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")

PLACEHOLDER = "\ufdd0"  # a code point that is not a character
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized")  # of an added token


@dataclass(frozen=True)
class PlainText:
    """A tokenizer.json without control tokens, and its properties.

    json      the tokenizer.json
    prefix    when the tokenizer puts a space before a text that is not in the text
    again     whether it also puts this space before each part of a text after an added token
    marked    whether its pieces write spaces as U+2581
    composes  whether its normalizer converts a text to NFC
    ordinary  its added tokens that are not control tokens, as in tokenizer.json
    drops     whether its pre-tokenizer drops text that its pattern does not match
    """

    json: dict[str, Any]
    prefix: Literal["never", "always", "unless_space"]
    again: bool
    marked: bool
    composes: bool
    ordinary: list[dict[str, Any]]
    drops: bool


def plain_text(raw: dict[str, Any], control: set[str]) -> PlainText:
    """Remove the control tokens. Raises TokenizerError, with the reason, if the bytes of the tokens cannot be known."""
    model = {k: v for k, v in raw["model"].items() if k != "dropout"}
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise TokenizerError("its pieces carry a subword prefix or suffix that is not in the text")
    normalizers, pre_tokenizers = list(steps(raw.get("normalizer"))), list(steps(raw.get("pre_tokenizer")))
    marked = any(marks_spaces(step) for step in [*normalizers, *pre_tokenizers])
    byte_level = [s for s in pre_tokenizers if s["type"] == "ByteLevel"]
    _check_normalizers(normalizers, marked)
    _check_pre_tokenizers(pre_tokenizers)
    if not byte_level and not model.get("byte_fallback"):
        raise TokenizerError("neither byte-level nor with byte fallback: characters outside its vocabulary would be lost")
    if byte_level and marked:
        raise TokenizerError("it marks spaces with U+2581 and is byte-level: the bytes of a space in its pieces are ambiguous")
    prefix, again = _prefix(normalizers, pre_tokenizers)
    # no text may produce a control token, neither through a merge nor as a word
    pairs = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) not in control]
    if model.get("ignore_merges"):
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in control}
    added = raw.get("added_tokens") or []
    ordinary = [a for a in added if a["content"] not in control]
    kept = _with_placeholders(raw, model, control) if ordinary else []
    plain: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": kept,
        "post_processor": None,
        "decoder": None,
        "normalizer": raw.get("normalizer"),
        "pre_tokenizer": raw.get("pre_tokenizer"),
        "model": model,
    }
    composes = any(step["type"] == "NFC" for step in normalizers)
    drops = any(step.get("behavior") == "Removed" for step in pre_tokenizers)
    return PlainText(plain, prefix, again, marked, composes, ordinary, drops)


def _with_placeholders(raw: dict[str, Any], model: dict[str, Any], control: set[str]) -> list[dict[str, Any]]:
    """The added tokens in their order. Each control token is renamed, here and in the model, to a name that no text contains.

    No token may be removed: the tokenizers library numbers added tokens consecutively, and tokens with one id hide each other.
    """
    parts = {part for pair in model["merges"] for part in pair} & control  # a part of a merge keeps its name
    kept = []
    vocab = dict(raw["model"]["vocab"])
    for token in raw["added_tokens"]:
        name = token["content"]
        if name in control and name not in parts:
            placeholder = f"{PLACEHOLDER}{token['id']}{PLACEHOLDER}"
            if name in vocab:
                vocab[placeholder] = vocab.pop(name)
            token = token | {"content": placeholder, "normalized": False}
        if name not in parts:
            kept.append(token)
    model["vocab"] = vocab
    return kept


def byte_table(plain: PlainText, vocab_size: int, control: set[str]) -> NDArray[np.int32]:
    """int32 [vocab_size]: bytes of text of each piece of the model; 0 for control tokens and ids without a piece."""
    lengths = np.zeros(vocab_size, np.int32)
    byte_level = any(s["type"] == "ByteLevel" for s in steps(plain.json["pre_tokenizer"]))
    unknown = plain.json["model"].get("unk_token")
    for piece, i in plain.json["model"]["vocab"].items():
        if piece in control or piece == unknown or piece.startswith(PLACEHOLDER):
            continue
        if byte_level:
            lengths[i] = len(piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            lengths[i] = 1
        else:
            lengths[i] = len((piece.replace(SPACE, " ") if plain.marked else piece).encode())
    return lengths


def parts_of(plain: PlainText, eos_id: int, vocab_size: int) -> dict[str, Any]:
    """The parts of a tokenizer that determine ids, bytes and EOS, by name. A fingerprint is their digest."""
    model = {k: v for k, v in plain.json["model"].items() if v not in (None, False, "")}
    # without ordinary added tokens there is no such key, as in earlier releases, so that fingerprints do not change
    ordinary = [[a["id"], *(a.get(flag) for flag in FLAGS)] for a in plain.ordinary]
    return {
        "normalizer": plain.json["normalizer"],
        "pre_tokenizer": plain.json["pre_tokenizer"],
        "eos": eos_id,
        "vocab_size": vocab_size,
        "model": model,
    } | ({"added_tokens": ordinary} if ordinary else {})


def digest(part: Any) -> str:
    """sha256 of one part, or of all parts."""
    return hashlib.sha256(orjson.dumps(part, option=orjson.OPT_SORT_KEYS)).hexdigest()


def steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat sequence."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("normalizers") or part.get("pretokenizers") or []:
            yield from steps(inner)
    else:
        yield part


def marks_spaces(step: dict[str, Any]) -> bool:
    """Whether the step replaces a space by U+2581."""
    if step["type"] == "Metaspace":
        return bool(step.get("replacement") == SPACE)
    return bool(step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE)


def _check_normalizers(normalizers: list[dict[str, Any]], marked: bool) -> None:
    for step in normalizers:
        kind = step["type"]
        if kind not in HARMLESS_NORMALIZERS or (kind == "Replace" and not marks_spaces(step) and not _first_only(step)):
            raise TokenizerError(f"its normalizer changes the text ({kind}): byte positions would not be the text's")
    prepended = [step.get("prepend") for step in normalizers if step["type"] == "Prepend"]
    if len(prepended) > 1 or any(text != " " and not (marked and text == SPACE) for text in prepended):
        raise TokenizerError(f"its normalizer puts {''.join(map(str, prepended))!r} before a text, and not one space")


def _check_pre_tokenizers(pre_tokenizers: list[dict[str, Any]]) -> None:
    for i, step in enumerate(pre_tokenizers):
        kind = step["type"]
        # "Removed" and inverted drops the text that the pattern does not match. That is nothing if it matches every text, which
        # `tokens` tests.
        drops = step.get("behavior") == "Removed" and not (kind == "Split" and step.get("invert"))
        if kind not in HARMLESS_PRE_TOKENIZERS or drops:
            raise TokenizerError(f"its pre-tokenizer {kind} removes parts of the text")
        if kind == "Metaspace" and not marks_spaces(step):
            raise TokenizerError(f"its pre-tokenizer Metaspace writes {step.get('replacement')!r} for a space, not U+2581")
        if i and _prepends(step):
            before = pre_tokenizers[i - 1]["type"]
            raise TokenizerError(
                f"its pre-tokenizer {kind} puts a space before each part that {before} cuts, not only before the first part"
            )


def _prefix(
    normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]]
) -> tuple[Literal["never", "always", "unless_space"], bool]:
    if any(_first_only(s) for s in normalizers):
        return "always", False
    if any(s["type"] == "Prepend" for s in normalizers):
        return "always", True
    if any(_prepends(s) for s in pre_tokenizers):
        return "unless_space", True
    return "never", False


def _prepends(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step.get("add_prefix_space", True))
    if step["type"] != "Metaspace":
        return False
    return bool(step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never")


def _first_only(step: dict[str, Any]) -> bool:
    """Whether it is the step that sentencepiece_to_json writes for a model with user-defined symbols."""
    pattern = (step.get("pattern") or {}).get("Regex", "")
    return bool(step["type"] == "Replace" and step.get("content") == SPACE and pattern.startswith(FIRST_ONLY))
