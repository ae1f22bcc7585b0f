"""A model's configuration -> parameters and FLOPs. Parameters are counted on a model without numbers, FLOPs from them.

A product of [N, I] and [I, O] takes 2 * N * I * O FLOPs. Attention is causal: a token meets half of its row on average, and code
that skips what is masked takes half the FLOPs of the whole square. Nothing else is counted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from megatron_vocagno import hub
from megatron_vocagno.errors import HubError, ModelError, RunError, looked_for
from megatron_vocagno.model.folder import convert_first, skeleton
from megatron_vocagno.model.gguf import place_of_conversion


@dataclass(frozen=True)
class Sizes:
    """What of a model costs something."""

    model_type: str
    layers: int
    """Decoder layers, all alike."""
    hidden: int
    """H"""
    vocabulary: int
    """V"""
    parameters: int
    """Of the whole model. A tied head counts once."""
    decoder: int
    """Parameters of a decoder layer."""
    matrices: int
    """Those of them that every token is multiplied with."""
    heads_width: int
    """Query heads times their width."""
    tied: bool

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    def layer_flops(self, tokens: float, row: float) -> float:
        """Forward of a decoder layer on so many tokens, in rows of so many."""
        return tokens * (2 * self.matrices + 4 * self.heads_width * (row + 1) / 2)

    def head_flops(self, tokens: float) -> float:
        """One product of hidden states and head."""
        return tokens * 2 * self.embedding

    def forward_flops(self, tokens: float, row: float) -> float:
        return self.layers * self.layer_flops(tokens, row) + self.head_flops(tokens)


def sizes(config: PretrainedConfig) -> Sizes:
    """Counts what transformers would build. Tensors are made without memory."""
    config = config.get_text_config()
    model = skeleton(config)
    decoder = model.get_decoder().layers[0]
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        decoder=sum(parameter.numel() for parameter in decoder.parameters()),
        matrices=sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear)),
        heads_width=config.num_attention_heads * head_width,
        tied=bool(config.tie_word_embeddings),
    )


def read_config(path: Path, whose: str) -> PretrainedConfig:
    """A model's configuration: config.json, the folder that holds it, a GGUF file, or a Hub id that is in the cache.

    Nothing is downloaded or converted. whose: "student" or "teacher", for the message. Raises RunError: no such file, or no
    configuration that transformers knows.
    """
    if hub.is_id(path):
        path = _cached(path, whose)
    path = path.expanduser()
    if path.suffix == ".gguf" and path.is_file():
        if whose == "student":
            raise RunError(f"student.pretrained: {convert_first(path)}")
        return _of_gguf(path)
    try:
        file = path / "config.json" if path.is_dir() else path
        text = file.read_text(encoding="utf-8") if file.suffix == ".json" and file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"no configuration of the {whose} at {path}: {error}") from error
    if text is None:
        raise RunError(
            f"no configuration of the {whose} at {path}: it is not on this machine yet. "
            f"{hub.taken_for_path(path)}{looked_for(path)}\n{_remedy(whose)}"
        )
    return _parsed(text, file)


def given_config(path: Path, option: str) -> PretrainedConfig:
    """The config.json, or the folder that holds it, that an option of the command names. Raises RunError as read_config does."""
    try:
        file = path / "config.json" if path.is_dir() else path
        if file.suffix == ".gguf" and file.is_file():
            return _of_gguf(file)
        return _parsed(file.read_text(encoding="utf-8"), file)
    except FileNotFoundError:
        raise RunError(f"no file at {file} ({option}){looked_for(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} ({option}) cannot be read: {error}") from error


def _parsed(text: str, file: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.for_model(**json.loads(text))
    # transformers raises classes of its own for wrong types and values; all carry a readable message
    except Exception as error:
        # without the names of all models that it does know, hundreds of them
        reason = str(error).partition(". Should contain one of")[0]
        raise RunError(f"{file} is no configuration that transformers knows: {reason}") from error
    return config


def _of_gguf(file: Path) -> PretrainedConfig:
    """What the file says of its model; of one that was converted before, its config.json, which is read in no time."""
    try:
        converted = place_of_conversion(file) / "config.json"
    except ModelError as error:
        raise RunError(str(error)) from error
    if converted.is_file():
        return _parsed(converted.read_text(encoding="utf-8"), converted)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    # whatever it is, transformers will not read this file when the run starts either
    except Exception as error:
        raise RunError(f"transformers cannot read the configuration in {file}: {error}") from error
    return config


def _cached(name: Path, whose: str) -> Path:
    try:
        return hub.snapshot(name, hub.CONFIG, offline=True)
    except HubError as error:
        raise RunError(f"no configuration of the {whose} at {name}: {error}\n{_remedy(whose)}") from error


def _remedy(whose: str) -> str:
    return f"  Give its config.json with --{whose}-config; examples/plan holds those of the recipes."
