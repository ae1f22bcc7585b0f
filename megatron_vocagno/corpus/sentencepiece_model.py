"""A SentencePiece BPE model -> the tokenizer.json that gives the same ids.

A user-defined symbol (USER_DEFINED: Gemma's runs of line ends, HTML tags) is one token wherever it occurs in the normalized text.
It becomes an added token that is not a control token. SentencePiece puts a space only before the text, whereas `Prepend` would
also put one before each part of a text that follows a symbol. The normalizer of such a model is therefore a Replace of `\\A`, the
beginning of the text. It does not change a text that is exactly one symbol, because the library also normalizes added tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_vocagno.errors import TokenizerError

SPACE = "\u2581"  # SentencePiece's visible space
FIRST_ONLY = r"\A(?!"  # beginning of the pattern of the step that puts a space only before the text


def sentencepiece_to_json(data: bytes, file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A SentencePiece BPE model -> (tokenizer.json with the same ids, names of its control tokens).

    Raises TokenizerError if it is not such a model, or if it changes the text.
    """
    proto = _parse(data, file)
    _check(proto, file)
    trainer, spec, pieces = proto.trainer_spec, proto.normalizer_spec, proto.pieces
    normal, unknown, control, user_defined = 1, 2, 3, 4
    steps = _prefix([p.piece for p in pieces if p.type == user_defined]) if spec.add_dummy_prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    raw = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": p.piece, **flags, "normalized": p.type == user_defined, "special": p.type != user_defined}
            for i, p in enumerate(pieces)
            if p.type in (unknown, control, user_defined)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": int(spec.add_dummy_prefix), "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": pieces[trainer.unk_id].piece,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {p.piece: i for i, p in enumerate(pieces)},
            "merges": _merges({p.piece: p.score for p in pieces if p.type == normal}),
        },
    }
    return raw, _names(proto)


def sentencepiece_names(data: bytes, file: Path) -> tuple[dict[str, str], dict[str, int]]:
    """(names of a model's control tokens, id of each piece). Raises TokenizerError if it is not a SentencePiece model."""
    proto = _parse(data, file)
    return _names(proto), {piece.piece: i for i, piece in enumerate(proto.pieces)}


def _parse(data: bytes, file: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined, unused-ignore]
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise TokenizerError(f"{file}: neither JSON nor a SentencePiece model ({len(data):,} bytes)") from None
    return proto


def _names(proto: Any) -> dict[str, str]:
    trainer, pieces = proto.trainer_spec, proto.pieces
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id, "pad_token": trainer.pad_id}
    return {name: pieces[i].piece for name, i in ids.items() if 0 <= i < len(pieces)}


def _check(proto: Any, file: Path) -> None:
    trainer, spec, pieces = proto.trainer_spec, proto.normalizer_spec, proto.pieces
    refused = {
        "it holds no pieces: not a SentencePiece model": not pieces,
        "its model is not BPE (Unigram, word or char); only BPE is supported": trainer.model_type != trainer.BPE,
        "it has no byte fallback: characters outside its vocabulary would be lost": not trainer.byte_fallback,
        f"its normalizer {spec.name!r} changes the text": bool(spec.precompiled_charsmap) or spec.remove_extra_whitespaces,
        "it does not mark spaces with U+2581 before a word": trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces,
    }
    for reason, applies in refused.items():
        if applies:
            raise TokenizerError(f"{file}: {reason}")


def _prefix(symbols: list[str]) -> list[dict[str, Any]]:
    if not symbols:
        return [{"type": "Prepend", "prepend": SPACE}]
    any_symbol = "|".join(re.escape(symbol) for symbol in symbols)
    return [{"type": "Replace", "pattern": {"Regex": rf"{FIRST_ONLY}(?:{any_symbol})\z)"}, "content": SPACE}]


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """All pairs that form a piece, in the order in which BPE must apply them.

    SentencePiece has scores instead of merges. The order is (score, length of the left part, length of the right part), all
    descending. If ties were broken by the ids of the parts instead, the ids of many texts would differ.
    """
    merges = []
    for piece, score in scores.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(score, left, right) for left, right in cuts if left in scores and right in scores]
    merges.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    return [[left, right] for _, left, right in merges]
