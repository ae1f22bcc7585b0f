"""Finds a Hugging Face folder on disk or on the Hub, reads its tensors lazily, writes one. Safetensors only, no remote code.

This module works for any causal language model of transformers. Code that only the student needs is in student.py. torch and
transformers are imported by the functions that need them, because folders are also found on machines without them.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from megatron_vocagno import hub
from megatron_vocagno.errors import HubError, missing_path_hint, nearest, tool
from megatron_vocagno.errors import ModelError as ModelError  # importers of this module also take ModelError from here
from megatron_vocagno.model.headers import WEIGHT_FILES, read_index, readable, stored_tensors, weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

COMPANION_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "generation_config.json",
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)

DESCRIPTION = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The folder at `path`, or the snapshot of a Hub id. It is checked to have a config.json and all of its safetensors files.

    Raises ModelError: the path does not exist, the Hub does not provide the model, or files are missing.
    """
    try:
        folder = _snapshot(path) if hub.is_id(path) else _local_folder(path)
    except OSError as error:
        raise ModelError(f"no model at {path}: {error}", path) from error
    if missing := _missing_shards(folder):
        source = weight_files(folder)[0]
        raise ModelError(
            f"{source} lists {len(missing)} files that do not exist, for example {missing[0]}. Was the download complete?"
        )
    return folder


def described_folder(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """A folder with the configuration and the tokenizer of a model, and whether it has the weights. Downloads no weights.

    Raises ModelError: the path does not exist, has no config.json, or the Hub does not provide the model.
    """
    if hub.is_id(path):
        if (whole := cached_snapshot(path)) is not None:
            return whole, True
        try:
            return hub.snapshot(path, DESCRIPTION), False
        except HubError as error:
            raise ModelError(f"no model at {path}: {error}", path) from error
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file() or weight_files(folder):
        return model_folder(folder), True
    return folder, False


def _local_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ModelError(f"no model at {folder}: the path does not exist. {hub.why_path(path)}{missing_path_hint(path)}", folder)
    if folder.suffix == ".gguf" and folder.is_file():
        raise ModelError(f"no model at {folder}: {convert_first(folder)}", folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"no model at {folder}: it has no config.json. Is it a Hugging Face model folder?", folder)
    if not weight_files(folder):
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        cause = (
            f"It has {pickled[0]}, which can run code when it is loaded. On a machine where that risk is acceptable, convert it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
            if pickled
            else "Was the download complete?"
        )
        raise ModelError(f"no weights in {folder}: neither model.safetensors nor model.safetensors.index.json. {cause}", folder)
    return folder


def convert_first(gguf: Path) -> str:
    """The part of an error message about a GGUF file in a place where only a folder can be read, such as the student."""
    command = f"{tool('convert.gguf_to_safetensors')} {gguf} --out {gguf.with_suffix('')}"
    return f"{gguf.name} is a GGUF file, and only a teacher can be one. Convert the file, and use the folder:\n  {command}"


def _snapshot(name: str | os.PathLike[str]) -> Path:
    try:
        folder = hub.snapshot(name)
        missing = _missing_files(folder)
        if missing:
            hub.require_unlisted(name, missing)
    except HubError as error:
        raise ModelError(f"no model at {name}: the path does not exist, and as a Hub id: {error}{nearest(name)}", name) from error
    if missing:
        raise ModelError(
            f"no weights in {name}: on the Hub it has no config.json, or neither model.safetensors nor "
            "model.safetensors.index.json. Pickled weights are not downloaded, because they can run code when they are loaded. "
            'If the Community tab offers a conversion ("Adding `safetensors` variant"), use its revision: org/name@refs/pr/1.'
        )
    return folder


def cached_snapshot(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a Hub id in the Hub's cache; None if it is missing or incomplete. Does not contact the Hub."""
    try:
        folder = hub.snapshot(name, offline=True)
    except HubError:
        return None
    return folder if not _missing_files(folder) else None


def on_this_machine(path: Path) -> Path | None:
    """The folder of a path or a Hub id; None if it is not on this machine. Does not contact the Hub."""
    folder = cached_snapshot(path) if hub.is_id(path) else path.expanduser()
    return folder if folder is not None and folder.exists() else None


def pinned(paths: Sequence[Path], record: Path) -> list[Path]:
    """Hub ids with their commits, see hub.pinned. Other paths stay as they are. Raises ModelError, OSError."""
    try:
        return [Path(name) for name in hub.pinned(paths, record)]
    except HubError as error:
        raise ModelError(str(error), error.path) from error


def _missing_files(folder: Path) -> list[str]:
    """Files that a snapshot lacks to be a complete model."""
    if not (folder / "config.json").is_file():
        return ["config.json"]
    return _missing_shards(folder) if weight_files(folder) else list(WEIGHT_FILES)


def _missing_shards(folder: Path) -> list[str]:
    """Files that the index of the weights lists and that do not exist."""
    source = weight_files(folder)[0]
    files = set(read_index(source)[0].values()) if source.suffix == ".json" else set()
    return sorted(file for file in files if not (folder / file).is_file())


def read_config(path: Path) -> PretrainedConfig:
    """The configuration in a folder or in a config.json. Raises ModelError if transformers cannot read it."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # any error: transformers cannot make a configuration of this file
    except Exception as error:
        file = path / "config.json" if path.is_dir() else path
        # the first paragraph: what follows is general advice
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise ModelError(f"{file} is not a configuration that transformers can read: {reason}") from error
    return config


def text_sizes(path: Path) -> tuple[int, int | None]:
    """The number of ids, and the longest input if there is a limit, of the text model of a folder.

    If transformers is not installed, they are read from config.json without the defaults of the model's class.

    Raises ModelError.
    """
    try:
        config = read_config(path).get_text_config()
        return int(config.vocab_size), getattr(config, "max_position_embeddings", None)
    except ModuleNotFoundError:
        pass
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        raw = raw.get("text_config", raw)
        return int(raw["vocab_size"]), raw.get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(
            f"{file} has no vocab_size that can be read ({type(error).__name__}: {error}). If the model's class has a default, "
            "transformers knows it: pip install transformers"
        ) from None


class PretrainedWeights:
    """The tensors of a Hugging Face folder, in one file or in shards. Each tensor is read from disk on request."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = model_folder(path)
        self._stored = stored_tensors(self.folder)
        self._open: dict[str, Any] = {}

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            with readable(self.folder / file):
                self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._stored[name].shape

    def dtype(self, name: str) -> str:
        """Type of a tensor in safetensors' notation, for example "BF16", without reading it."""
        return self._stored[name].dtype

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Read the rows [first, last) of a tensor. Rows past its end are left out."""
        file = self._stored[name].file
        with readable(self.folder / file):
            rows: Tensor = self._shard(file).get_slice(name)[first:last]
        return rows

    def tensor(self, name: str) -> Tensor:
        """Read a tensor onto the CPU, in the type in which it is stored."""
        file = self._stored[name].file
        with readable(self.folder / file):
            tensor: Tensor = self._shard(file).get_tensor(name)
        return tensor


def to_hugging_face(
    config: PretrainedConfig, state: Mapping[str, Tensor], out_dir: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads: config.json, generation_config.json, safetensors.

    state   Hugging Face name -> tensor, complete. A tied head may be left out, and is never written
    dtype   type of the written weights; None keeps the type of the state's first tensor
    """
    dtype = dtype or next(iter(state.values())).dtype
    model = skeleton(config)
    tied = model.all_tied_weights_keys or {}
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items() if name not in tied}
    _check_state({name: tensor for name, tensor in model.state_dict().items() if name not in tied}, weights)

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # not model.save_pretrained, which silently writes nothing on ranks other than 0
    write_tensors(weights, folder / "model.safetensors")
    written = copy.deepcopy(config)
    written.dtype, written.architectures = dtype, [type(model).__name__]
    written.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return folder


def carry_over(source: Path, out: Path) -> list[str]:
    """Copy the files of a model other than weights and configuration: tokenizer, chat templates, generation settings.

    Returns the names of the copied files. Files of these names in `out` are replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(file for pattern in COMPANION_FILES for file in source.glob(pattern) if file.is_file())
    for file in files:
        target = out / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return [file.relative_to(source).as_posix() for file in files]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that the umask gives. The library makes it readable only by its owner."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise ModelError(
            f"cannot write the model: {len(missing)} tensors are missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}. "
            "Is this the configuration that the weights were trained with?"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"cannot write the model: the shape of {name} is {tuple(tensor.shape)}, the configuration requires "
                f"{tuple(expected[name].shape)}"
            )


def skeleton(config: PretrainedConfig) -> Any:
    """The Hugging Face model of a configuration, on the meta device.

    The class is called directly, because `from_config` would shard the model while a ZeRO-3 teacher exists in the same process.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def parameters(config: PretrainedConfig) -> int:
    """Number of parameters of the model of a configuration. A tied head counts once."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


@contextmanager
def quiet(errors_only: bool = False) -> Iterator[None]:
    """Hide the progress bars of transformers, because each rank would show one. errors_only: hide its warnings too."""
    from transformers.utils import logging as hf_logging

    shown, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    if errors_only:
        hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()
