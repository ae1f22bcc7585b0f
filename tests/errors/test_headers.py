"""What is said of safetensors that are damaged, and of an index that tells otherwise than its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot
from safetensors.torch import save_file

from megatron_vocagno.model.folder import PretrainedWeights
from tests.errors.models import model
from tests.errors.telling import told

__all__ = ["model"]
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def headed(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\x09",
            snapshot("the weights in FILE are damaged: the file has 1 bytes. Was the download complete?"),
        ),
        (
            headed('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}') + bytes(7),
            snapshot("the weights in FILE are damaged: the file has 76 bytes, but 77 by its header. Was the download complete?"),
        ),
        (
            headed("{}") + bytes(7),
            snapshot(
                "the weights in FILE are damaged: the file has 17 bytes, but 10 by its header. Was something added after it was written?"
            ),
        ),
        (
            headed('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}') + bytes(8),
            snapshot(
                "the weights in FILE are damaged: Error while deserializing header: invalid shape, data type, or offset for tensor. Was the "
                "download complete?"
            ),
        ),
        (
            headed("<html>"),
            snapshot(
                "the weights in FILE are damaged: its header is not JSON: Expecting value: line 1 column 1 (char 0). Is it a safetensors file, and was the download complete?"
            ),
        ),
        (headed("[]"), snapshot("the weights in FILE are damaged: its header is a list, not an object. Which program wrote it?")),
        (
            headed('{"a": 1, "a": 2}'),
            snapshot(
                "the weights in FILE are damaged: its header has a twice, and it is undefined which one is read. Which program wrote the file?"
            ),
        ),
    ],
)
def test_a_damaged_file(model: Path, content: bytes, message: str) -> None:
    (model / "model.safetensors").write_bytes(content)
    with told(message, FILE=model / "model.safetensors"):
        PretrainedWeights(model)


def test_a_pointer_of_git_lfs(model: Path) -> None:
    message = snapshot("FILE is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder.")
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    (model / "model.safetensors").write_bytes(pointer)
    with told(message, FILE=model / "model.safetensors"):
        PretrainedWeights(model)
    (model / "model.safetensors").rename(model / "model.safetensors.index.json")
    with told(message, FILE=model / "model.safetensors.index.json"):
        PretrainedWeights(model)


INDICES: list[tuple[Callable[[dict[str, str]], object], str]] = [
    (lambda _: [], snapshot("INDEX cannot be read: it is a list, not an object. Which program wrote the index?")),
    (lambda _: {"metadata": {}}, snapshot("INDEX cannot be read: it has no 'weight_map'. Was the download complete?")),
    (
        lambda _: {"metadata": {}, "weight_map": []},
        snapshot("INDEX cannot be read: its weight_map is a list, not an object. Which program wrote the index?"),
    ),
    (
        lambda _: {"metadata": {}, "weight_map": {}},
        snapshot("INDEX cannot be read: its weight_map is empty. Was it written before the weights were?"),
    ),
    (
        lambda file_of: {"weight_map": file_of},
        snapshot(
            "INDEX has no 'metadata' object, and transformers does not read an index without one. Add \"metadata\": {} to the index."
        ),
    ),
    (
        lambda file_of: {"metadata": {}, "weight_map": file_of | {"a": "../x"}},
        snapshot(
            "INDEX lists a in '../x', which is not the name of a safetensors file inside DIR. Which program wrote the index?"
        ),
    ),
    (
        lambda file_of: {"metadata": {}, "weight_map": file_of | {"b": ONE}},
        snapshot("INDEX lists b in ONE, but it is in TWO. Does the index belong to these files?"),
    ),
    (
        lambda file_of: {"metadata": {}, "weight_map": file_of | {"c": TWO}},
        snapshot("INDEX lists c in TWO, but no file of the index has it. Does the index belong to these files?"),
    ),
    (
        lambda file_of: {"metadata": {}, "weight_map": {"a": ONE, "b": TWO}},
        snapshot(
            "INDEX does not list more, which is in TWO: it lists 2 tensors, and its files hold 3. Does the index belong to these files?"
        ),
    ),
]


@pytest.mark.parametrize(("written", "message"), INDICES)
def test_an_index_that_tells_otherwise(model: Path, written: Callable[[dict[str, str]], object], message: str) -> None:
    (model / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, model / ONE)
    save_file({"b": torch.ones(1), "more": torch.ones(1)}, model / TWO)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps(written({"a": ONE, "b": TWO, "more": TWO})))
    with told(message, INDEX=index, DIR=model, ONE=ONE, TWO=TWO):
        PretrainedWeights(model)


def test_a_tensor_in_two_files(model: Path) -> None:
    (model / "model.safetensors").unlink()
    for name in (ONE, TWO):
        save_file({"a": torch.ones(1)}, model / name)
    index = {"metadata": {}, "weight_map": {"a": ONE, "b": TWO}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with told(
        snapshot("the weights in DIR are ambiguous: a is in ONE and in TWO. Are these files from two downloads?"),
        DIR=model,
        ONE=ONE,
        TWO=TWO,
    ):
        PretrainedWeights(model)
