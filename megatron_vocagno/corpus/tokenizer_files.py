"""The files of a tokenizer, the names of its control tokens, and the token that ends a document.

The end-of-text token of a chat model ends a turn of a chat (<|im_end|>, <|eot_id|>). In pretraining, documents ended with another
token. If the vocabulary has the separator of pretraining as a control token, the separator is used:

- A token ends a turn if the chat template contains it, or if it is in CHAT_ENDS.
- A separator is a token of SEPARATORS. If a tokenizer's own end of text is a separator, it is used, even if the chat template
  contains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from megatron_vocagno import hub
from megatron_vocagno.errors import HubError, TokenizerError, lfs_pointer, missing_path_hint, tool

FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference
SMALL_FILES = [*FILES, "tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"]
SMALL_FILES += ["chat_template.jinja"]
# tokens that separate documents in pretraining; if a vocabulary has several, the first is used
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>", "</s>")
CHAT_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|eom_id|>")


def find_file(path_or_id: str | Path) -> Path:
    """The tokenizer.json or tokenizer.model of a folder or a Hub id, or the file itself. Raises TokenizerError."""
    path = Path(path_or_id)
    if not path.is_file() and isinstance(path_or_id, str) and hub.is_id(path_or_id):
        path = _from_hub(path_or_id)
    if (file := tokenizer_file(path)) is not None:
        return file
    if path.is_dir():
        what = "a folder without tokenizer.json or tokenizer.model"
    else:
        # a Path is never a Hub id
        what = "no such file or folder" + (f". {hub.why_path(path_or_id)}" if isinstance(path_or_id, str) else "")
        what += missing_path_hint(path_or_id)
    raise TokenizerError(f"cannot open the tokenizer {path_or_id}: {what}")


def tokenizer_file(path: Path) -> Path | None:
    """The file itself, or the tokenizer's file of a folder; None if there is none.

    Raises TokenizerError for a GGUF file or a pointer of Git LFS.
    """
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is not None:
        # read only the beginning: the file of a model may have gigabytes
        with file.open("rb") as opened:
            start = opened.read(64)
        if start.startswith(b"GGUF"):
            convert = f"{tool('convert.gguf_to_safetensors')} {file} --out {file.with_suffix('')}"
            raise TokenizerError(
                f"{file} is a GGUF file, which is not read as a tokenizer. Convert it, and specify the folder:\n  {convert}"
            )
        if pointer := lfs_pointer(start):
            raise TokenizerError(f"{file} {pointer}")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file, or no object. Raises TokenizerError for invalid JSON."""
    try:
        content = orjson.loads(file.read_bytes()) if file.is_file() else {}
    except orjson.JSONDecodeError as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _from_hub(name: str) -> Path:
    try:
        return hub.snapshot(name, SMALL_FILES)
    except HubError as error:
        raise TokenizerError(
            f"cannot open the tokenizer {name}: no such folder here, and not found on the Hub: {error}"
        ) from error


def token_names(folder: Path, raw: dict[str, Any]) -> dict[str, str]:
    """The names of the bos, eos, unk and pad tokens in the files of a tokenizer's folder. raw: the tokenizer.json"""
    names: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key in ("bos_token", "eos_token", "unk_token", "pad_token") and isinstance(content, str):
                names.setdefault(key, content)
    vocab = raw["model"].get("vocab", {})
    pieces = {i: piece for piece, i in vocab.items()} if isinstance(vocab, dict) else {}
    pieces |= {a["id"]: a["content"] for a in raw.get("added_tokens") or []}
    for name in ("generation_config.json", "config.json"):
        eos = read_json(folder / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if eos in pieces:
            names.setdefault("eos_token", pieces[eos])
    return names


def end_of_text(named: str, control: set[str], folder: Path) -> tuple[str, str]:
    """(the token that ends a document, how it differs from the tokenizer's own end of text, else "").

    named    the tokenizer's own end of text
    control  its control tokens
    """
    separator = next((token for token in SEPARATORS if token in control), None)
    if named in SEPARATORS or separator is None:
        return named, ""
    in_template = named in _chat_template(folder)
    if not in_template and named not in CHAT_ENDS:
        return named, ""
    why = "its chat template contains it" if in_template else "as in chat models"
    return separator, f"not with the tokenizer's {named}, which ends a chat turn ({why})"


def _chat_template(folder: Path) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return str(read_json(folder / "tokenizer_config.json").get("chat_template", ""))
