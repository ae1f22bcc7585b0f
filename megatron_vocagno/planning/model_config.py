"""Find the configuration of a student or a teacher without downloading or converting anything."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megatron_vocagno import hub
from megatron_vocagno.errors import HubError, ModelError, RunError, missing_path_hint
from megatron_vocagno.model.folder import convert_first
from megatron_vocagno.model.folder import read_config as read_model_config
from megatron_vocagno.model.gguf import place_of_conversion


def read_config(path: Path, whose: str) -> PretrainedConfig:
    """Read the configuration of a model of the run file.

    path    a config.json, the folder that contains it, a GGUF file, or a Hub id that is in the local cache
    whose   "student" or "teacher", for the message

    Raises RunError if there is no such file, ModelError if transformers cannot read it.
    """
    if hub.is_id(path):
        path = _cached(path, whose)
    path = path.expanduser()
    try:
        if path.suffix == ".gguf" and path.is_file():
            if whose == "student":
                raise RunError(f"student.pretrained: {convert_first(path)}")
            return _read_gguf(path)
        if (file := _json_file(path)).suffix == ".json" and file.is_file():
            return read_model_config(file)
    except OSError as error:
        raise RunError(f"no configuration of the {whose} at {path}: {error}") from error
    raise RunError(
        f"no configuration of the {whose} at {path}: there is no config.json. "
        f"{hub.why_path(path)}{missing_path_hint(path)}\n{_remedy(whose)}"
    )


def given_config(path: Path, option: str) -> PretrainedConfig:
    """Read the configuration that a command-line option names: a config.json, its folder, or a GGUF file.

    Raises RunError if there is no such file, ModelError if transformers cannot read it.
    """
    try:
        file = _json_file(path)
        if file.suffix == ".gguf" and file.is_file():
            return _read_gguf(file)
        if file.is_file():
            return read_model_config(file)
    except OSError as error:
        raise RunError(f"cannot read {path} ({option}): {error}") from error
    raise RunError(f"no such file: {file} ({option}){missing_path_hint(file)}")


def _json_file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _read_gguf(file: Path) -> PretrainedConfig:
    """The configuration in a GGUF file. A file that was converted before has a config.json, which is much faster to read."""
    converted = place_of_conversion(file) / "config.json"
    if converted.is_file():
        return read_model_config(converted)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    # any error: transformers will not read this file when the run starts either
    except Exception as error:
        raise ModelError(f"transformers cannot read the configuration in {file}: {error}") from error
    return config


def _cached(name: Path, whose: str) -> Path:
    try:
        return hub.snapshot(name, hub.CONFIG, offline=True)
    except HubError as error:
        raise RunError(f"no configuration of the {whose} at {name}: {error}\n{_remedy(whose)}") from error


def _remedy(whose: str) -> str:
    return f"  Give its config.json with --{whose}-config. examples/plan in the repository has those of the recipes."
