"""Open a checkpoint of a run as a model of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def open_student(checkpoint: Path) -> PreTrainedModel:
    """The model in float32, in evaluation mode. checkpoint: a folder of `Run.checkpoints`."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensor for file in (checkpoint / "student").glob("*.safetensors") for name, tensor in load_file(file).items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys or {})
    assert not unknown and set(missing) <= tied, f"{checkpoint}: {missing} are missing, {unknown} unknown"
    return model.eval()
