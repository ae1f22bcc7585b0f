"""Tokenizers that put something in front of a text: those of the tests, with another post-processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def with_front(tokenizer: Path, out: Path, pieces: Sequence[str]) -> Path:
    """A copy of a folder with a tokenizer.json that puts these control tokens in front of a text; none of them: nothing."""
    shutil.copytree(tokenizer, out)
    raw = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in raw["added_tokens"]}
    front: list[dict[str, Any]] = [{"SpecialToken": {"id": piece, "type_id": 0}} for piece in pieces]
    text = [*front, {"Sequence": {"id": "A", "type_id": 0}}]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": text,
        "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {piece: {"id": piece, "ids": [ids[piece]], "tokens": [piece]} for piece in pieces},
    }
    (out / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return out
