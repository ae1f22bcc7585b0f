"""Token ids -> text, by the bytes of each token.

A piece of a tokenizer.json is written in one of five ways. The number of its bytes determines which:

- the text itself
- one character of GPT-2's byte alphabet per byte
- `<0xNN>` for one byte
- with U+2581 for each space
- a normalized added token, without the space that its normalizer puts before it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno.corpus.plain_text import plain_text
from megatron_vocagno.corpus.sentencepiece_model import SPACE
from megatron_vocagno.errors import DatasetError


@dataclass(frozen=True)
class TokenDecoder:
    """Complete documents of one tokenizer -> their text.

    bytes   [vocabulary] the text of each id; b"" for control tokens and ids without a piece
    prefix  when the tokenizer puts a space before a text that is not in the text
    """

    bytes: list[bytes]
    prefix: Literal["never", "always", "unless_space"]

    @classmethod
    def of(cls, file: Path, byte_lengths: NDArray[np.int32]) -> TokenDecoder:
        """The decoder of a tokenizer.json.

        byte_lengths: int32 [vocabulary], bytes of each id

        Raises DatasetError, see token_bytes.
        """
        raw = orjson.loads(file.read_bytes())
        return cls(token_bytes(file, pieces_of(raw), byte_lengths), plain_text(raw, set()).prefix)

    def text(self, ids: NDArray[np.int32]) -> str:
        """The text of a document's tokens [N]; "" if there are no tokens.

        It equals the tokenized text with three exceptions:

        - a space at the start is missing if the prefix is "unless_space"
        - U+2581 is read as a space if the pieces write spaces as U+2581
        - if an added token cuts a text and the tokenizer puts a prefix before the rest, that space is contained too
        """
        data = b"".join([self.bytes[i] for i in ids.tolist()])
        return (data if self.prefix == "never" else data.removeprefix(b" ")).decode()


def pieces_of(raw: Mapping[str, Any]) -> dict[str, int]:
    """Piece -> id of a tokenizer.json, including its added tokens."""
    pieces: dict[str, int] = raw["model"]["vocab"]
    return {token["content"]: token["id"] for token in raw.get("added_tokens") or []} | pieces


def token_bytes(file: Path, pieces: Mapping[str, int], byte_lengths: NDArray[np.int32]) -> list[bytes]:
    """[vocabulary]: the text of each id; b"" for control tokens and ids without a piece.

    file          the tokenizer.json of the pieces, for the message
    pieces        piece -> id
    byte_lengths  int32 [vocabulary], bytes of each id

    Raises DatasetError if a piece cannot have the bytes that byte_lengths.npy records.
    """
    texts = [b""] * len(byte_lengths)
    lengths = byte_lengths.tolist()
    for piece, i in pieces.items():
        text = _text_of(piece, lengths[i])
        if len(text) != lengths[i]:
            raise DatasetError(f"{file}: token {i}, {piece!r}, cannot have the {lengths[i]} bytes that byte_lengths.npy records")
        texts[i] = text
    return texts


def _text_of(piece: str, n_bytes: int) -> bytes:
    unchanged = piece.encode()
    if n_bytes in (0, len(unchanged)):
        return unchanged[:n_bytes]
    if len(piece) == n_bytes and BYTE_OF.keys() >= set(piece):
        return bytes(BYTE_OF[character] for character in piece)
    if n_bytes == 1 and piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    spaced = piece.replace(SPACE, " ").encode()
    return spaced if len(spaced) == n_bytes else b" " + spaced


def _byte_alphabet() -> dict[str, int]:
    """The byte alphabet of GPT-2: a visible byte is its own character, other bytes are the characters from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
