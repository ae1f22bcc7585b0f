"""Whether two tokenizers are the same, and in what they differ; whether one reads texts as its own library does.

A fingerprint is of all that decides ids, bytes and EOS. It leaves out what touches no text: decoder, post-processor, truncation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_vocagno.corpus.encoders import SAMPLE, OwnTokenizer
from megatron_vocagno.corpus.plain_text import PlainText, plain_text
from megatron_vocagno.corpus.sentencepiece_model import TokenizerError

if TYPE_CHECKING:
    from megatron_vocagno.corpus.tokens import Tokenizer

FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized")


def parts_of(plain: PlainText, eos_id: int, vocab_size: int) -> dict[str, Any]:
    """What decides ids, bytes and EOS, by name."""
    model = {k: v for k, v in plain.json["model"].items() if v not in (None, False, "")}
    # in a file without ordinary added tokens this is what it always was, so that its datasets stay valid
    ordinary = [[a["id"], *(a.get(flag) for flag in FLAGS)] for a in plain.ordinary]
    return {
        "normalizer": plain.json["normalizer"],
        "pre_tokenizer": plain.json["pre_tokenizer"],
        "eos": eos_id,
        "vocab_size": vocab_size,
        "model": model,
    } | ({"added_tokens": ordinary} if ordinary else {})


def digest(part: Any) -> str:
    """sha256 of a part, or of all of them."""
    return hashlib.sha256(orjson.dumps(part, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _told_apart(tokenizer: Tokenizer) -> dict[str, str]:
    """Name of a part -> a digest, or what can be shown."""
    plain = plain_text(orjson.loads(tokenizer.source), set(tokenizer.control))
    parts = parts_of(plain, tokenizer.eos_id, tokenizer.vocab_size)
    model = {k: v for k, v in parts["model"].items() if k not in ("vocab", "merges")}
    shown = {"end-of-text token": str(parts["eos"]), "number of tokens": f"{parts['vocab_size']:,}"}
    added = parts.get("added_tokens", [])
    shown |= {"added tokens that are ordinary vocabulary": f"{len(added):,}"}
    hashed = {"their contents": added, "vocabulary": parts["model"]["vocab"], "merges": parts["model"]["merges"]}
    hashed |= {"settings of its BPE": model, "normalizer": parts["normalizer"], "pre-tokenizer": parts["pre_tokenizer"]}
    return shown | {name: f"sha256:{digest(part)}" for name, part in hashed.items()}


def what_differs(mine: Tokenizer, theirs: Tokenizer) -> str:
    """In words, each with both values where these can be shown."""
    found = []
    other_parts = _told_apart(theirs)
    for name, value in _told_apart(mine).items():
        other = other_parts[name]
        if value != other:
            found.append(name if value.startswith("sha256:") else f"{name} ({value} and {other})")
    if mine.eos_id == theirs.eos_id and mine.eos_token != theirs.eos_token:
        found.append(f"the end-of-text token's name ({mine.eos_token} and {theirs.eos_token})")
    return ", ".join(found)


def check_own(tokenizer: Tokenizer, name: str | Path, texts: Sequence[str] = ()) -> int:
    """Compares its ids with those of its own library on the untouched file; returns for how many texts.

    The texts are those that tokenizers disagree about, some with its own added tokens, and `texts`. Those with control tokens in
    them are left out, since these are plain text here alone.

    Raises TokenizerError: a text with other ids.
    """
    own = OwnTokenizer(tokenizer.original)
    compared = [
        text for text in (*SAMPLE, *tokenizer.samples, *texts) if text and not any(token in text for token in tokenizer.control)
    ]
    ours = tokenizer.encoder.encode(compared)
    for i, (text, expected) in enumerate(zip(compared, own.encode(compared), strict=True)):
        found = ours[i].tolist()
        if found != expected:
            n = min(len(found), len(expected))
            at = next((k for k in range(n) if found[k] != expected[k]), n)
            shown = [[own.piece(token) for token in ids[at : at + 4]] for ids in (found, expected)]
            raise TokenizerError(
                f"{name}: its texts would be read in another way than its own tokenizer reads them. {text[:60]!r}…: "
                f"from token {at} on {shown[0]} here, {shown[1]} by {own.library} on the untouched file"
            )
    return len(compared)
