"""A GGUF file -> a Hugging Face folder: config.json, model.safetensors, tokenizer.json. Dequantised, so it is larger.

transformers reads GGUF weights, but takes some 20 seconds for 135M parameters each time. So a conversion is kept:
`<cache>/teachers/<sha256 of the file>/`, where <cache> is $MEGATRON_VOCAGNO_CACHE or ~/.cache/megatron_vocagno. A folder
appears there by one rename when it is complete. Processes that want the same file wait for the one that converts it.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from megatron_vocagno.errors import looked_for
from megatron_vocagno.model.folder import ModelError, quiet, to_hugging_face

log = logging.getLogger(__name__)
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
        return root / "teachers" / hashlib.file_digest(file, "sha256").hexdigest()


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
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{source} is not a GGUF file: it begins with {magic!r}. Was the download complete?")
    return source


def _write_model(source: Path, folder: Path, dtype: torch.dtype) -> None:
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
    # whatever it is, it means that transformers cannot read this file
    except Exception as error:
        raise ModelError(f"transformers cannot read the model in {source}: {error}") from error
    # the model would refuse to be saved as what it was read from
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    to_hugging_face(model.config, model.state_dict(), folder, dtype)
    model.generation_config.save_pretrained(folder)


def _write_tokenizer(source: Path, folder: Path) -> None:
    """The file's tokenizer, splitting text as its vocabulary was learned and knowing no token that the model does not.

    transformers knows the splitting rule of most vocabularies by name (`tokenizer.ggml.pre`) and takes GPT-2's for the others.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    except Exception as error:
        raise ModelError(f"transformers cannot read the tokenizer in {source}: {error}") from error
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    parts = json.loads(file.read_text(encoding="utf-8"))
    rule = _splitting_rule(source)
    if rule == "smollm":
        # digits apart first: else the spaces before a number are cut otherwise than in training
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS_APART, GPT2_SPLIT]}
    elif rule not in GPT2_RULES and parts["pre_tokenizer"] == GPT2_SPLIT:
        log.warning("%s splits text by the rule '%s', unknown here; its ids may differ from those of training", source.name, rule)
    # GPT-2's class adds an <|endoftext|> of its own, an id past the embedding
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < len(parts["model"]["vocab"])]
    file.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")


def _splitting_rule(source: Path) -> str:
    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    return "default" if field is None else str(field.contents())
