"""A GGUF file -> a Hugging Face folder: config.json, model.safetensors, tokenizer.json. Dequantised, so it is larger.

transformers reads GGUF weights, but takes some 20 seconds for 135M parameters each time. So a conversion is kept:
`<cache>/teachers/<sha256 of the file>-<CONVERSION>/`, where <cache> is $MEGATRON_VOCAGNO_CACHE or ~/.cache/megatron_vocagno. A
folder appears there by one rename when it is complete. Processes that want the same file wait for the one that converts it.

What transformers would leave unread is carried over or refused: keys in gguf_keys.py, tensors and the tokenizer's BOS here.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from megatron_vocagno.errors import ModelError, lfs_pointer, looked_for
from megatron_vocagno.model.fingerprint import CONVERSION, CONVERTED, teacher_fingerprint
from megatron_vocagno.model.folder import quiet, skeleton, to_hugging_face
from megatron_vocagno.model.gguf_keys import DIVISORS, LONG, SHORT, settle

log = logging.getLogger(__name__)
LISTS = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}
"""Keys as long as a vocabulary."""
BOS_BY_RULE = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken", "chameleon"),
}
"""`tokenizer.ggml.pre` of the byte-level vocabularies before whose texts llama.cpp puts BOS where a file says nothing."""
# `tokenizer.ggml.pre` of vocabularies that split as GPT-2 does, with nothing more; and pieces of a tokenizer.json
GPT2_RULES = ("gpt-2", "default")
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS_APART = {"type": "Digits", "individual_digits": True}


def cached_folder(gguf_path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Path:
    """The converted folder of a GGUF file; converts it if no process has done so yet. Raises ModelError: see dequantise."""
    source = _gguf_file(gguf_path)
    folder = place_of_conversion(source, cache)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not folder.exists():
                # a warning, because the pause needs an explanation wherever logging was not set up
                log.warning("converting %s once (about 20 s per 100 MB and 10 s per 50,000 tokens) into %s", source.name, folder)
                try:
                    dequantise(source, folder)
                except ModelError:
                    # without locks another process may have put the same folder there
                    if not folder.exists():
                        raise
    return folder


def place_of_conversion(gguf_path: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> Path:
    """Where the converted folder of a GGUF file lies once a process has made it. Raises ModelError: not a GGUF file."""
    source = _gguf_file(gguf_path)
    root = Path(cache or os.environ.get("MEGATRON_VOCAGNO_CACHE") or "~/.cache/megatron_vocagno").expanduser()
    with source.open("rb") as file:
        return root / "teachers" / f"{hashlib.file_digest(file, 'sha256').hexdigest()}-{CONVERSION}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: all ranks of a run come here together, and each would need four bytes of memory a parameter."""
    lock = folder.with_suffix(".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s: this file system has no locks (%s), so each process converts by itself", lock, error.strerror)
        yield


def dequantise(gguf_path: str | os.PathLike[str], out_dir: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Path:
    """Write a GGUF file's model and tokenizer as a Hugging Face folder, all or nothing. float32 holds the weights exactly.

    Raises ModelError: not a GGUF file, one that transformers cannot read, or out_dir exists.
    """
    source, out = _gguf_file(gguf_path), Path(out_dir).expanduser()
    if out.exists():
        raise ModelError(f"cannot write {out}: it exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "folder"
        _write_model(source, folder, dtype)
        log.info("the weights are converted; its tokenizer comes next (about 10 s per 50,000 tokens)")
        _write_tokenizer(source, folder)
        _write_origin(source, folder, dtype)
        try:
            folder.rename(out)
        except OSError as error:
            raise ModelError(f"cannot write {out}: {error}. Was it written by another process meanwhile?") from error
    return out


def _gguf_file(path: str | os.PathLike[str]) -> Path:
    source = Path(path).expanduser()
    if not source.is_file():
        raise ModelError(f"no GGUF file at {source}{looked_for(path)}")
    with source.open("rb") as file:
        head = file.read(64)
    if pointer := lfs_pointer(head):
        raise ModelError(f"{source} {pointer}")
    if not head.startswith(b"GGUF"):
        raise ModelError(f"{source} is not a GGUF file: it begins with {head[:4]!r}. Was the download complete?")
    return source


def _keys(reader: GGUFReader) -> dict[str, Any]:
    """Key -> value, without the lists of the tokenizer."""
    return {name: field.contents() for name, field in reader.fields.items() if name not in LISTS}


def _write_model(source: Path, folder: Path, dtype: torch.dtype) -> None:
    options = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    try:
        reader = GGUFReader(source)
        config = AutoConfig.from_pretrained(source.parent, **options)
    # whatever it is, it means that transformers cannot read this file
    except Exception as error:
        raise ModelError(f"transformers cannot read the model in {source}: {error}") from error
    names = [tensor.name for tensor in reader.tensors]
    divisors = {tensor.name: tensor.data.tolist() for tensor in reader.tensors if tensor.name in (DIVISORS, SHORT, LONG)}
    keys = _keys(reader)
    config = settle(config, keys, names, divisors)
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
        raise ModelError(f"{source} lacks {len(missing)} tensors of a {config.model_type} model, {', '.join(missing[:3])} first")
    for name, there, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"{source} has {name} as {tuple(there)}, and a {config.model_type} model with its keys has {tuple(expected)}. "
            "Use the model's folder with safetensors."
        )
    # the model would refuse to be saved as what it was read from
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    to_hugging_face(model.config, model.state_dict(), folder, dtype)
    model.generation_config.save_pretrained(folder)


def _check_tensors(source: Path, config: PretrainedConfig, names: list[str], architecture: str) -> None:
    """Raises ModelError: a tensor for which the model has no place."""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict())
    known = {DIVISORS, SHORT, LONG, *get_gguf_hf_weights_map(skeleton(config), processor)}
    # experts of a layer are one tensor, which has no ".weight" in the model
    unread = [name for name in names if not known & {name, name.removesuffix(".weight")}]
    if unread:
        raise ModelError(
            f"{source} has {len(unread)} tensors that a {config.model_type} model of transformers has no place for, "
            f"{', '.join(unread[:3])} first: they would be lost. Use the model's folder with safetensors."
        )


def _write_tokenizer(source: Path, folder: Path) -> None:
    """The file's tokenizer, splitting text as its vocabulary was learned and knowing no token that the model does not.

    transformers knows the splitting rule of most vocabularies by name (`tokenizer.ggml.pre`) and takes GPT-2's for the others.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except Exception as error:
        raise ModelError(f"transformers cannot read the tokenizer in {source}: {error}") from error
    tokenizer.save_pretrained(folder)
    reader = GGUFReader(source)
    keys = _keys(reader)
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text(encoding="utf-8"))
    rule = keys.get("tokenizer.ggml.pre", "default")
    if rule == "smollm":
        # digits apart first: else the spaces before a number are cut otherwise than in training
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS_APART, GPT2_SPLIT]}
    elif rule not in GPT2_RULES and parts["pre_tokenizer"] == GPT2_SPLIT:
        log.warning("%s splits text by the rule '%s', unknown here; its ids may differ from those of training", source.name, rule)
    # GPT-2's class adds an <|endoftext|> of its own, an id past the embedding
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < len(parts["model"]["vocab"])]
    around = {side: _token_around(source, keys, side) for side in ("bos", "eos")}
    tokens = reader.get_field("tokenizer.ggml.tokens").contents() if any(each is not None for each in around.values()) else []
    named = {side: None if i is None else (tokens[i], i) for side, i in around.items()}
    parts["post_processor"] = _around(named["bos"], named["eos"], parts["post_processor"])
    file.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    told = json.loads(settings.read_text(encoding="utf-8"))
    told |= {f"add_{side}_token": i is not None for side, i in around.items()}
    # the one class that takes tokenizer.json as it is
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(told, ensure_ascii=False, indent=2), encoding="utf-8")


def _token_around(source: Path, keys: Mapping[str, Any], side: str) -> int | None:
    """The id that llama.cpp puts before (bos) or behind (eos) a text. Raises ModelError: one that the file does not name."""
    spm = keys.get("tokenizer.ggml.model") == "llama"
    default = side == "bos" and (spm or keys.get("tokenizer.ggml.pre") in BOS_BY_RULE)
    if not keys.get(f"tokenizer.ggml.add_{side}_token", default):
        return None
    found = keys.get(f"tokenizer.ggml.{side}_token_id", {"bos": 1, "eos": 2}[side] if spm else None)
    if found is None:
        raise ModelError(
            f"{source} puts {side.upper()} around a text (tokenizer.ggml.add_{side}_token), and does not say which it is"
        )
    return int(found)


def _around(bos: tuple[str, int] | None, eos: tuple[str, int] | None, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """A tokenizer.json's `post_processor`; `before` stays where it puts no token around a text."""
    if bos is None and eos is None:
        return before if before is not None and before["type"] == "ByteLevel" else None

    def of(text: str, kind: int) -> list[dict[str, Any]]:
        head, tail = ([] if each is None else [{"SpecialToken": {"id": each[0], "type_id": kind}}] for each in (bos, eos))
        return [*head, {"Sequence": {"id": text, "type_id": kind}}, *tail]

    special = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in filter(None, (bos, eos))}
    return {"type": "TemplateProcessing", "single": of("A", 0), "pair": of("A", 0) + of("B", 1), "special_tokens": special}


def _write_origin(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """By which a folder that holds the file's very numbers has the file's fingerprint."""
    if dtype == torch.float32:
        record = {"gguf": teacher_fingerprint(source), "folder": teacher_fingerprint(folder)}
        (folder / CONVERTED).write_text(json.dumps(record, indent=2), encoding="utf-8")
