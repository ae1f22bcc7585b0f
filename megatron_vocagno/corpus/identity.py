"""Compare tokenizers: two tokenizers with each other, or a tokenizer with its own library.

    check_own          compares a tokenizer with its own library on the original file, before a dataset is made
    require_tokenizer  compares a model's folder with a dataset
    require_same       reports the difference between two datasets

A fingerprint hashes everything that determines ids, bytes and EOS (`parts_of`). It does not hash the decoder, the post-processor
and truncation, which do not affect the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson

from megatron_vocagno.corpus.encoders import SAMPLE, OwnTokenizer
from megatron_vocagno.corpus.manifest import TokenizerRecord
from megatron_vocagno.corpus.plain_text import digest, parts_of, plain_text
from megatron_vocagno.corpus.tokenizer_files import tokenizer_file
from megatron_vocagno.corpus.tokens import Tokenizer, open_tokenizer
from megatron_vocagno.errors import DatasetError, TokenizerError


def check_own(tokenizer: Tokenizer, name: str | Path, texts: Sequence[str] = ()) -> int:
    """Compare a tokenizer with its own library, which reads the original file. Returns the number of compared texts.

    The texts are SAMPLE, texts with the tokenizer's added tokens, and `texts`. A text that contains a control token is skipped,
    because the library does not read control tokens as plain text.

    Raises TokenizerError for a text with different ids.
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
                f"{name}: texts would not be tokenized as its own library does. {text[:60]!r}…: "
                f"from token {at} on {shown[0]} here, {shown[1]} by {own.library} on the original file"
            )
    return len(compared)


def require_tokenizer(dataset: Path, made_with: TokenizerRecord, side: str, folder: Path) -> str | None:
    """See AlignedDataset.require_tokenizer. Raises DatasetError."""
    if (note := not_compared(dataset, side, folder)) is not None:
        return note
    advice = "build the dataset again with that model's tokenizer, or use the model that it was built for"
    try:
        model = open_tokenizer(folder, eos_token=made_with.eos_token, backend="huggingface")
    except TokenizerError as error:
        raise DatasetError(
            f"{dataset}: its {side} ids were made with another tokenizer than that of the {side} model, {folder}, "
            f"which could not have made them: {error}.\n  {advice.capitalize()}."
        ) from None
    if model.fingerprint != made_with.fingerprint:
        copy, why = _copy(dataset, made_with, side)
        if why and copy.fingerprint == model.fingerprint:
            raise DatasetError(f"{dataset}: {why}: its {side} ids are not those of {folder}. Build the dataset again")
        raise DatasetError(
            f"{dataset}: its {side} ids were made with another tokenizer than that of the {side} model, {folder}. "
            f"They differ in: {differences(copy, model)} ({dataset / 'tokenizers' / side} and {folder}); {advice}"
        )
    return None


def not_compared(dataset: Path, side: str, folder: Path) -> str | None:
    """A note about a model whose folder has no tokenizer; None if it has one."""
    if tokenizer_file(folder) is not None:
        return None
    return (
        f"the {side} model {folder} has no tokenizer.json or tokenizer.model: it is not known whether {dataset} was made with "
        "its tokenizer"
    )


def require_same(dataset: Path, record: TokenizerRecord, other: Path, other_record: TokenizerRecord, side: str) -> None:
    """Raises DatasetError with the differences of two datasets whose fingerprints differ."""
    (one, why), (another, why_another) = _copy(dataset, record, side), _copy(other, other_record, side)
    found = differences(one, another) if one.fingerprint != another.fingerprint else why or why_another
    raise DatasetError(
        f"{dataset}: its {side} ids were made with another tokenizer than those of {other}. They differ in: {found}; "
        "build one of them again with the other's tokenizer"
    )


def _copy(dataset: Path, record: TokenizerRecord, side: str) -> tuple[Tokenizer, str]:
    """The tokenizer that a dataset contains, and the reason if the dataset's ids were not made with it, else ""."""
    copy = open_tokenizer(dataset / "tokenizers" / side, eos_token=record.eos_token, backend="huggingface")
    if copy.fingerprint == record.fingerprint:
        return copy, ""
    added = copy.added
    shown = ", ".join(map(repr, added[:3]))
    return copy, f"it was made without the {len(added):,} added tokens of its {side} tokenizer that texts may give ({shown}, …)"


def differences(one: Tokenizer, other: Tokenizer) -> str:
    """The parts in which two tokenizers differ, each with both values if they are short."""
    found = []
    other_parts = _comparable_parts(other)
    for name, value in _comparable_parts(one).items():
        if value != other_parts[name]:
            found.append(name if value.startswith("sha256:") else f"{name} ({value} and {other_parts[name]})")
    if one.eos_id == other.eos_id and one.eos_token != other.eos_token:
        found.append(f"the end-of-text token's name ({one.eos_token} and {other.eos_token})")
    return ", ".join(found)


def _comparable_parts(tokenizer: Tokenizer) -> dict[str, str]:
    """Name of a part -> its value, or a digest if the value is long."""
    plain = plain_text(orjson.loads(tokenizer.source), set(tokenizer.control))
    parts = parts_of(plain, tokenizer.eos_id, tokenizer.vocab_size)
    model = {k: v for k, v in parts["model"].items() if k not in ("vocab", "merges")}
    shown = {"end-of-text token": str(parts["eos"]), "number of tokens": f"{parts['vocab_size']:,}"}
    added = parts.get("added_tokens", [])
    shown |= {"added tokens that are ordinary vocabulary": f"{len(added):,}"}
    hashed = {"their contents": added, "vocabulary": parts["model"]["vocab"], "merges": parts["model"]["merges"]}
    hashed |= {"settings of its BPE": model, "normalizer": parts["normalizer"], "pre-tokenizer": parts["pre_tokenizer"]}
    return shown | {name: f"sha256:{digest(part)}" for name, part in hashed.items()}
