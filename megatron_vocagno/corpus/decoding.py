"""Token ids -> text, by the bytes of each token.

A piece of a tokenizer.json is written in one of four ways, and the number of its bytes says in which: as it stands; one
character of GPT-2's byte alphabet a byte; `<0xNN>` for one byte; or with U+2581 for each space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_vocagno.corpus.manifest import DatasetError
from megatron_vocagno.corpus.sentencepiece_model import SPACE
from megatron_vocagno.corpus.tokens import plain_text_encoder


@dataclass(frozen=True)
class Decoder:
    """Whole documents of one tokenizer -> their text.

    bytes   [vocabulary] the text of each id; b"" for control tokens and ids that no piece has
    prefix  when a space that is not in the text was put before it
    """

    bytes: list[bytes]
    prefix: Literal["never", "always", "unless_space"]

    @classmethod
    def of(cls, file: Path, byte_lengths: NDArray[np.int32]) -> Decoder:
        """file: a tokenizer.json; byte_lengths: int32 [vocabulary], bytes of each id. Raises DatasetError: see token_bytes."""
        raw = orjson.loads(file.read_bytes())
        prefix, _ = plain_text_encoder(raw, set())
        return cls(token_bytes(file, raw["model"]["vocab"], byte_lengths), prefix)

    def text(self, ids: NDArray[np.int32]) -> str:
        """The text of a document's tokens [N]; "" where there are none.

        It is the text that was tokenized, to the byte, except that a space at its start is missing where the prefix is
        "unless_space", and U+2581 reads as a space where the pieces write spaces so.
        """
        data = b"".join([self.bytes[i] for i in ids.tolist()])
        return (data if self.prefix == "never" else data.removeprefix(b" ")).decode()


def token_bytes(file: Path, pieces: Mapping[str, int], byte_lengths: NDArray[np.int32]) -> list[bytes]:
    """[vocabulary]: the text of each id; b"" for control tokens and ids that no piece has.

    file    the tokenizer.json that the pieces are from, for the message
    pieces  piece -> id

    Raises DatasetError where a piece cannot have the bytes that byte_lengths.npy records.
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
    as_it_stands = piece.encode()
    if n_bytes in (0, len(as_it_stands)):
        return as_it_stands[:n_bytes]
    if len(piece) == n_bytes and BYTE_OF.keys() >= set(piece):
        return bytes(BYTE_OF[character] for character in piece)
    if n_bytes == 1 and piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return piece.replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a character for each byte, its own where it can be seen, else the next from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
