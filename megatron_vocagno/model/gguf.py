"""Converts a GGUF file to a Hugging Face folder: config.json, model.safetensors, tokenizer.json. The weights are dequantized.

transformers can read GGUF weights, but it takes about 20 seconds for 135M parameters each time. A conversion is therefore kept in
`<cache>/teachers/<sha256 of the file>-<CONVERSION>/`, where <cache> is $MEGATRON_VOCAGNO_CACHE or ~/.cache/megatron_vocagno. The
folder is renamed to this name when it is complete. Processes that need the same file wait for the one that converts it.

transformers ignores some keys and tensors of a GGUF file. Here they are converted or rejected: keys in gguf_keys.py, tensors and
the tokenizer's BOS in this module.

A conversion needs the package gguf, which the extra `megatron-vocagno[gguf]` installs. Reading a conversion that exists does not.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from megatron_vocagno.compat import gguf_remedy
from megatron_vocagno.errors import ModelError, UserError, lfs_pointer, missing_path_hint
from megatron_vocagno.files import sha256, wait_for_lock
from megatron_vocagno.model.fingerprint import CONVERSION, CONVERTED, teacher_fingerprint
from megatron_vocagno.model.folder import quiet, skeleton, to_hugging_face
from megatron_vocagno.model.gguf_keys import DIVISORS, LONG, SHORT, complete_config

if TYPE_CHECKING:
    from gguf import GGUFReader

log = logging.getLogger(__name__)
LISTS = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}
"""Keys whose values are as long as the vocabulary."""
BOS_BY_RULE = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken", "chameleon"),
}
"""`tokenizer.ggml.pre` of the byte-level vocabularies for which llama.cpp adds a BOS if the file does not specify it."""
# `tokenizer.ggml.pre` of vocabularies that split text exactly as GPT-2 does; and parts of a tokenizer.json
GPT2_RULES = ("gpt-2", "default")
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_APART = {"type": "Digits", "individual_digits": True}


def cached_folder(gguf_path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Path:
    """The converted folder of a GGUF file. Converts the file if no process has done so yet. Raises ModelError: see dequantize."""
    source = _gguf_file(gguf_path)
    folder = place_of_conversion(source, cache)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock")
        # all ranks of a run come here at the same time, and each conversion needs 4 bytes of memory per parameter
        with lock.open("w") as file:
            if not wait_for_lock(file):
                log.warning("%s: this file system does not support locks, so each process converts the file", lock)
            if not folder.exists():
                # a warning, so that the pause is explained even if logging was not set up
                log.warning("converting %s once (about 20 s per 100 MB and 10 s per 50,000 tokens) into %s", source.name, folder)
                try:
                    dequantize(source, folder)
                except ModelError:
                    # without locks, another process may have written the same folder
                    if not folder.exists():
                        raise
    return folder


def place_of_conversion(gguf_path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Path:
    """Path of the converted folder of a GGUF file, whether or not it exists yet. Raises ModelError: not a GGUF file."""
    source = _gguf_file(gguf_path)
    root = Path(cache or os.environ.get("MEGATRON_VOCAGNO_CACHE") or "~/.cache/megatron_vocagno").expanduser()
    return root / "teachers" / f"{sha256(source)}-{CONVERSION}"


def check_conversion(gguf_path: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths of a GGUF file and of its new folder.

    Raises ModelError: not a GGUF file, out_dir exists, or gguf is not installed. It is found before the file is read.
    """
    source, out = _gguf_file(gguf_path), Path(out_dir).expanduser()
    if out.exists():
        raise ModelError(f"cannot write {out}: it exists. Remove it, or write to another folder")
    if remedy := gguf_remedy():
        raise ModelError(f"{source} is a GGUF file, and reading it needs {remedy}")
    return source, out


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the block name a GGUF file instead of its converted folder, which the user has not chosen.

    path: a model. If it is not a GGUF file, nothing changes.

    Raises UserError: the error of the block, with the name of the file.
    """
    try:
        yield
    except UserError as error:
        source = Path(path).expanduser()
        if source.suffix != ".gguf" or not source.is_file():
            raise
        folder = re.escape(str(place_of_conversion(source)))
        message = re.sub(rf"{folder}/([\w.]*\w)", lambda found: f"{source} ({found[1]} of its conversion)", str(error))
        raise type(error)(re.sub(folder, lambda _: str(source), message), error.path) from error


def dequantize(gguf_path: str | os.PathLike[str], out_dir: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Path:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder. The folder is written completely or not at all.

    dtype  type of the written weights; float32 holds the values of any GGUF file exactly

    Raises ModelError: not a GGUF file, a file that transformers cannot read, out_dir exists, or gguf is not installed.
    """
    source, out = check_conversion(gguf_path, out_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "folder"
        _write_model(source, folder, dtype)
        log.info("the weights are converted; converting the tokenizer (about 10 s per 50,000 tokens)")
        _write_tokenizer(source, folder)
        _write_origin(source, folder, dtype)
        try:
            folder.rename(out)
        except OSError as error:
            raise ModelError(f"cannot write {out}: {error}. Did another process write it at the same time?") from error
    return out


def _gguf_file(path: str | os.PathLike[str]) -> Path:
    source = Path(path).expanduser()
    if source.is_dir():
        raise ModelError(f"{source} is a folder, not a GGUF file")
    if not source.is_file():
        raise ModelError(f"no GGUF file at {source}{missing_path_hint(path)}")
    with source.open("rb") as file:
        head = file.read(64)
    if pointer := lfs_pointer(head):
        raise ModelError(f"{source} {pointer}")
    if not head.startswith(b"GGUF"):
        raise ModelError(f"{source} is not a GGUF file: it begins with {head[:4]!r}. Was the download complete?")
    return source


def _open_reader(source: Path) -> "GGUFReader":
    from gguf import GGUFReader

    return GGUFReader(source)


def _keys(reader: "GGUFReader") -> dict[str, Any]:
    """Key -> value, without the lists of the tokenizer."""
    return {name: field.contents() for name, field in reader.fields.items() if name not in LISTS}


def _write_model(source: Path, folder: Path, dtype: torch.dtype) -> None:
    options = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    try:
        reader = _open_reader(source)
        config = AutoConfig.from_pretrained(source.parent, **options)
    # gguf and transformers raise errors of many classes for a file that they cannot read
    except Exception as error:
        raise ModelError(f"transformers cannot read the model in {source}: {error}") from error
    names = [tensor.name for tensor in reader.tensors]
    divisors = {tensor.name: tensor.data.tolist() for tensor in reader.tensors if tensor.name in (DIVISORS, SHORT, LONG)}
    keys = _keys(reader)
    config = complete_config(config, keys, names, divisors)
    _check_tensors(source, config, names, str(keys["general.architecture"]))
    try:
        with quiet(errors_only=True):
            model, found = AutoModelForCausalLM.from_pretrained(
                source.parent,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:
        raise ModelError(f"transformers cannot read the model in {source}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{source} lacks {len(missing)} tensors of a {config.model_type} model, for example {', '.join(missing[:3])}. Was "
            "the download complete?"
        )
    for name, actual, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"the shape of {name} in {source} is {tuple(actual)}, but by the file's keys it is {tuple(expected)} in a "
            f"{config.model_type} model. Use the model's folder with safetensors."
        )
    # with this field, transformers does not save the model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    to_hugging_face(model.config, model.state_dict(), folder, dtype)
    model.generation_config.save_pretrained(folder)


def _check_tensors(source: Path, config: PretrainedConfig, names: list[str], architecture: str) -> None:
    """Raises ModelError: a tensor that the model of transformers does not have."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict())
    known = {DIVISORS, SHORT, LONG, *get_gguf_hf_weights_map(skeleton(config), processor)}
    # the experts of a layer are one tensor, whose name in the model does not end with ".weight"
    unread = [name for name in names if not known & {name, name.removesuffix(".weight")}]
    if unread:
        raise ModelError(
            f"{source} has {len(unread)} tensors that a {config.model_type} model of transformers does not have, for example "
            f"{', '.join(unread[:3])}: they would be lost. Use the model's folder with safetensors."
        )


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Write the file's tokenizer. It splits text as in training, and has no token without an embedding.

    transformers knows the splitting rule of most vocabularies by name (`tokenizer.ggml.pre`) and uses GPT-2's for the others.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except Exception as error:
        raise ModelError(f"transformers cannot read the tokenizer in {source}: {error}") from error
    tokenizer.save_pretrained(folder)
    reader = _open_reader(source)
    keys = _keys(reader)
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text(encoding="utf-8"))
    rule = keys.get("tokenizer.ggml.pre", "default")
    if rule == "smollm":
        # split digits first, else the spaces before a number are split differently than in training
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS_APART, GPT2_SPLIT]}
    elif rule not in GPT2_RULES and parts["pre_tokenizer"] == GPT2_SPLIT:
        log.warning("%s splits text by the unknown rule '%s'; token ids may differ from those of training", source.name, rule)
    # GPT-2's tokenizer class adds an <|endoftext|>, whose id is past the end of the embedding
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < len(parts["model"]["vocab"])]
    around = {side: _token_around(source, keys, side) for side in ("bos", "eos")}
    tokens = reader.get_field("tokenizer.ggml.tokens").contents() if any(each is not None for each in around.values()) else []
    named = {side: None if i is None else (tokens[i], i) for side, i in around.items()}
    parts["post_processor"] = _around(named["bos"], named["eos"], parts["post_processor"])
    file.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {f"add_{side}_token": i is not None for side, i in around.items()}
    # the only class that does not change tokenizer.json
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def _token_around(source: Path, keys: Mapping[str, Any], side: str) -> int | None:
    """The id that llama.cpp puts before (bos) or after (eos) a text; None if it puts none there.

    Raises ModelError: the file requests such a token and does not contain its id.
    """
    spm = keys.get("tokenizer.ggml.model") == "llama"
    default = side == "bos" and (spm or keys.get("tokenizer.ggml.pre") in BOS_BY_RULE)
    if not keys.get(f"tokenizer.ggml.add_{side}_token", default):
        return None
    found = keys.get(f"tokenizer.ggml.{side}_token_id", {"bos": 1, "eos": 2}[side] if spm else None)
    if found is None:
        raise ModelError(
            f"{source} requires {side.upper()} around a text (tokenizer.ggml.add_{side}_token), but has no "
            f"tokenizer.ggml.{side}_token_id. Use the model's folder with safetensors."
        )
    return int(found)


def _around(bos: tuple[str, int] | None, eos: tuple[str, int] | None, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The `post_processor` of a tokenizer.json that adds BOS and EOS to a text.

    before  the post-processor that the file has. Without BOS and EOS it is kept if it adds no token, else removed
    """
    if bos is None and eos is None:
        return before if before is not None and before["type"] == "ByteLevel" else None

    def of(text: str, kind: int) -> list[dict[str, Any]]:
        head, tail = ([] if each is None else [{"SpecialToken": {"id": each[0], "type_id": kind}}] for each in (bos, eos))
        return [*head, {"Sequence": {"id": text, "type_id": kind}}, *tail]

    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in filter(None, (bos, eos))}
    return {"type": "TemplateProcessing", "single": of("A", 0), "pair": of("A", 0) + of("B", 1), "special_tokens": special}


def _write_origin(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Record the file's fingerprint in a folder that holds exactly the file's values. See fingerprint.py."""
    if dtype == torch.float32:
        record = {"gguf": teacher_fingerprint(source), "folder": teacher_fingerprint(folder)}
        (folder / CONVERTED).write_text(json.dumps(record, indent=2), encoding="utf-8")
