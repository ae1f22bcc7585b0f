"""The ids that a model's own tokenizer puts in front of a text: BOS, two tokens (GLM's), or nothing.

They equal the first ids of `AutoTokenizer.from_pretrained(folder)(text).input_ids` in transformers 5, except for (*):

    tokenizer.json    the ids of its post-processor
                      a few classes of transformers build another post-processor (GPT-NeoX's, CodeLlama's): they are opened
                      (*) BOS if the post-processor adds nothing and tokenizer_config.json sets `add_bos_token`: DeepSeek's
                      models were trained so; transformers 4 read this field, and transformers 5 ignores it
    tokenizer.model   BOS if tokenizer_config.json sets `add_bos_token`, else nothing
    another .model    (transformers cannot open it) the same, and BOS if there is no tokenizer_config.json next to it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_vocagno.corpus.encoders import around_a_text
from megatron_vocagno.corpus.sentencepiece_model import sentencepiece_names
from megatron_vocagno.corpus.tokenizer_files import FILES, read_json, tokenizer_file
from megatron_vocagno.errors import RunError, TokenizerError

# classes of transformers that replace the post-processor of tokenizer.json
WITH_OWN_POST_PROCESSOR = ("GPTNeoXTokenizer", "CodeGenTokenizer", "CodeLlamaTokenizer")


def front_ids(folder: Path) -> tuple[int, ...] | None:
    """Ids in front of the first token of a text; () if there are none, None if `folder` has no tokenizer.

    folder  the folder of a model, or a file as for `open_tokenizer`; not a Hub id, see hub.snapshot

    Raises TokenizerError for a file that cannot be read.

    >>> front_ids(Path("mistral")), front_ids(Path("smollm2"))
    ((1,), ())
    """
    file = tokenizer_file(Path(folder))
    if file is None:
        return None
    data = file.read_bytes()
    try:
        raw = orjson.loads(data)
    except orjson.JSONDecodeError:
        return front_of_sentencepiece(*sentencepiece_names(data, file), file)
    if not isinstance(raw, dict):
        raise TokenizerError(f"{file}: JSON, but not a tokenizer.json of Hugging Face tokenizers: it is not an object")
    return front_of_json(raw, file)


def front_of_json(raw: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    """The ids that a tokenizer.json puts in front of a text. raw: the content of `file`"""
    front, _ = around_a_text(raw.get("post_processor"))
    settings, config = (read_json(file.with_name(name)) for name in ("tokenizer_config.json", "config.json"))
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    name = str(declared or "").removesuffix("Fast")
    if name != "CodeLlamaTokenizer" and not front:
        # no other class adds an id if the post-processor adds none
        return _declared_bos(settings, {token["content"]: token["id"] for token in raw.get("added_tokens") or ()})
    replaced = name in WITH_OWN_POST_PROCESSOR or (not name and "model_type" in config)
    if file.name != "tokenizer.json" or "auto_map" in settings or not replaced:
        return front  # code from the folder (auto_map) is never run
    return _front_by_transformers(file.parent)


def front_of_sentencepiece(names: Mapping[str, str], ids: Mapping[str, int], file: Path) -> tuple[int, ...]:
    """The ids that a SentencePiece model puts in front of a text.

    names, ids: the names and the ids of the control tokens of `file`, see sentencepiece_names
    """
    config = file.with_name("tokenizer_config.json")
    settings = {**read_json(file.with_name("special_tokens_map.json")), **read_json(config)}
    if file.name not in FILES and not config.is_file():
        settings |= {"add_bos_token": True}
    return _declared_bos(dict(names) | settings, ids)


def _declared_bos(settings: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[int, ...]:
    """The id of `bos_token` if `add_bos_token` is set, else (). ids: the ids of the control tokens, by name"""
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    return (ids[bos],) if settings.get("add_bos_token") and isinstance(bos, str) and bos in ids else ()


def putting_in_front(tokens: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """The post-processor of a tokenizer.json that puts tokens, (name, id), before a text; None for no tokens."""
    if not tokens:
        return None
    first, second = ([{"SpecialToken": {"id": name, "type_id": i}} for name, _ in tokens] for i in (0, 1))
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, *second, {"Sequence": {"id": "B", "type_id": 1}}]
    named = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in tokens}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


def _front_by_transformers(folder: Path) -> tuple[int, ...]:
    # imported here: it imports torch and takes some seconds
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with_front: list[int] = tokenizer("a").input_ids
        text: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    except (ValueError, OSError, ImportError, TypeError) as error:
        raise TokenizerError(f"{folder}: transformers cannot open this tokenizer: {error}") from error
    at = next(i for i in range(len(with_front)) if with_front[i : i + len(text)] == text)
    return tuple(with_front[:at])


def front_of(bos: Literal["auto", "none"] | int, tokenizers: Sequence[Path], field: str, rows: int) -> tuple[int, ...]:
    """The ids that a model reads in front of text.

    bos         the value of `teacher.bos` or `student.bos`
    tokenizers  folders, for "auto": the first folder with a tokenizer is used (the model's, then the dataset's)
    field       the name of the field, for the message
    rows        number of rows of the model's embedding

    Raises RunError for an id that the model does not have.
    """
    if bos == "none":
        return ()
    own = (found for folder in tokenizers if (found := front_ids(folder)) is not None)
    ids = next(own, ()) if bos == "auto" else (bos,)
    for i in ids:
        if i >= rows:
            whose = f"{field} = {i}" if bos != "auto" else f"{field} = 'auto': the tokenizer puts {i} in front of a text, which"
            raise RunError(f"{whose} is not an id of the model: its embedding has {rows:,} rows, ids 0 to {rows - 1:,}")
    return ids


def describe_front(front: Sequence[int], tokenizer: Path) -> str:
    """The tokens and ids as text, for example `<s> (1)`, or `nothing`. tokenizer: a folder with a tokenizer.json"""
    if not front:
        return "nothing"
    raw = orjson.loads((tokenizer / "tokenizer.json").read_bytes())
    names = {i: piece for piece, i in raw["model"]["vocab"].items() if i in front}
    names |= {token["id"]: token["content"] for token in raw.get("added_tokens") or () if token["id"] in front}
    return " ".join(f"{names.get(i, '?')} ({i})" for i in front)
