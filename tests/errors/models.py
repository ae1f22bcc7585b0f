"""A tiny Llama on disk, for what is said of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vocagno.model import folder as folders
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.folder import to_hugging_face

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama on disk."""
    config = student_config(LLAMA)
    state = {name: tensor for name, tensor in folders.skeleton(config).state_dict().items() if name != "lm_head.weight"}
    return to_hugging_face(config, {name: torch.zeros(tensor.shape) for name, tensor in state.items()}, tmp_path / "model")


def change(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
