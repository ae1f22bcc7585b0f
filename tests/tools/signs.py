"""What the signs of an interlinear document mean, as its reader is told."""

from __future__ import annotations

import re

NOT_THE_TEXT = "\u2581"  # SentencePiece reads it as a space: the bytes of its tokens are not the text's


def text_of(row: str) -> str:
    """A row of tokens -> the text that it shows."""
    row = re.sub(r"⟪[^⟫]*⟫?", "", row)
    row = re.sub(r"[⟦⟧◌ ]", "", row)
    pattern = r"⟨U\+([0-9A-F]+)⟩|⟨([0-9a-f]{2})⟩|([\u2400-\u2421])|(␣)|(.)"
    data = b""
    for code, byte, control, space, other in re.findall(pattern, row, re.DOTALL):
        if byte:
            data += bytes.fromhex(byte)
        elif control:
            data += b"\x7f" if control == "\u2421" else bytes([ord(control) - 0x2400])
        else:
            data += (chr(int(code, 16)) if code else " " if space else other).encode()
    return data.decode()
