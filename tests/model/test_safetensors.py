"""Safetensors of any writer are read alike by student, teacher and fingerprint, or refused with the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.fingerprint import teacher_fingerprint
from megatron_vocagno.model.folder import PretrainedWeights, read_config
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import open_teacher, teacher_folder
from megatron_vocagno.model.weights import check_weights
from tests.model.tiny import SIZES, batch, write_model
from tests.model.tiny_gguf import write_gguf

LLAMA: dict[str, Any] = {"model_type": "llama", **SIZES, "tie_word_embeddings": False}
NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def as_teacher(folder: Path) -> object:
    return open_teacher(folder, torch.float32, "cpu")


def as_student(folder: Path) -> object:
    return student_config(folder)


roads = pytest.mark.parametrize("opened", [as_teacher, as_student, teacher_fingerprint])
models = pytest.mark.parametrize("opened", [as_teacher, as_student])


# ---- faults of a sharded folder


def of_index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps(change(json.loads(index.read_text()))))

    return broken


def mapped(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return of_index(lambda index: index | {"weight_map": change(index["weight_map"])})


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def other_shard(folder: Path, name: str) -> Path:
    return next(file for file in sorted(folder.glob("*.safetensors")) if file != shard_of(folder, name))


def add(file: Path, name: str, tensor: Tensor) -> None:
    save_file(load_file(file) | {name: tensor}, file, metadata={"format": "pt"})


def in_two_shards(folder: Path) -> None:
    add(other_shard(folder, NORM), NORM, torch.zeros(48))


def indexed_in_the_wrong_file(folder: Path) -> None:
    wrong = other_shard(folder, NORM).name
    mapped(lambda file_of: file_of | {NORM: wrong})(folder)


SHARDED: dict[str, tuple[Callable[[Path], None], str]] = {
    "in-two-shards": (in_two_shards, f"{NORM} is in model-.*safetensors and in model-.*safetensors"),
    "not-in-the-index": (
        mapped(lambda file_of: {name: file for name, file in file_of.items() if name != NORM}),
        f"does not list {NORM}, which is in model-.*: it lists 29 tensors, and its files hold 30",
    ),
    "in-no-file": (
        mapped(lambda file_of: {**file_of, "more": file_of[NORM]}),
        "lists more in model-.*, but no file of the index has it",
    ),
    "in-the-wrong-file": (indexed_in_the_wrong_file, f"lists {NORM} in model-.*, but it is in model-"),
    "no-metadata": (
        of_index(lambda index: {"weight_map": index["weight_map"]}),
        "has no 'metadata' object, .* Add \"metadata\": {} to the index",
    ),
    "metadata-is-null": (of_index(lambda index: index | {"metadata": None}), "has no 'metadata'"),
    "a-list": (of_index(lambda index: [index]), "it is a list, not an object"),
    "map-is-a-list": (mapped(list), "its weight_map is a list, not an object"),
    "empty-map": (mapped(lambda _: {}), "its weight_map is empty"),
    "no-string": (mapped(lambda file_of: file_of | {NORM: 3}), f"lists {NORM} in 3, which is not the name of a safetensors"),
    "a-list-for-a-file": (mapped(lambda file_of: file_of | {NORM: ["a"]}), f"lists {NORM} in ..a..,"),
    "outside": (
        mapped(lambda file_of: file_of | {NORM: "../x.safetensors"}),
        "in '../x.safetensors', which is not the name of a safetensors file inside",
    ),
    "absolute": (
        mapped(lambda file_of: file_of | {NORM: "/etc/x.safetensors"}),
        "in '/etc/x.safetensors', which is not the name",
    ),
    "a-pickle": (mapped(lambda file_of: file_of | {NORM: "pytorch_model.bin"}), "in 'pytorch_model.bin', which is not the name"),
    "not-json": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{") and None,
        "cannot be read: Expecting property name",
    ),
}


@roads
@pytest.mark.parametrize(("break_it", "message"), SHARDED.values(), ids=SHARDED)
def test_an_index_that_contradicts_its_files_is_an_error(
    tmp_path: Path, opened: Callable[[Path], object], break_it: Callable[[Path], None], message: str
) -> None:
    folder = write_model(tmp_path / "model", LLAMA, max_shard_size="50KB")
    (tmp_path / "x.safetensors").write_bytes(shard_of(folder, NORM).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(shard_of(folder, NORM).read_bytes())
    opened(folder)
    break_it(folder)
    with pytest.raises(ModelError, match=message):
        opened(folder)


@roads
def test_files_that_the_index_does_not_list_are_ignored(tmp_path: Path, opened: Callable[[Path], object]) -> None:
    folder = write_model(tmp_path / "model", LLAMA, max_shard_size="50KB")
    before = teacher_fingerprint(folder)
    save_file({NORM: torch.zeros(48)}, folder / "consolidated.safetensors")
    opened(folder)
    assert teacher_fingerprint(folder) == before


# ---- faults of a file


def header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """The numbers stay as they are."""

    def broken(file: Path) -> None:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].decode().rstrip()).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return broken


def cut(at: int) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(file.read_bytes()[:at]) and None


def lfs_pointer(file: Path) -> None:
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n")


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "git-lfs": (lfs_pointer, "is a Git LFS pointer, .* Run `git lfs pull` in its folder"),
    "cut-off": (cut(-1), r"the file has 3\d\d,\d{3} bytes, but 3\d\d,\d{3} by its header"),
    "cut-off-in-the-header": (cut(100), r"the header claims [\d,]+ bytes, but the file has only 100\. Was"),
    "empty": (cut(0), "the file has 0 bytes"),
    "a-byte-more": (lambda file: file.write_bytes(file.read_bytes() + b"x") and None, "by its header. Was something added"),
    "huge-header": (
        lambda file: file.write_bytes(bytes([255] * 7 + [127]) + file.read_bytes()[8:]) and None,
        "the header claims 9,223,372,036,854,775,807 bytes",
    ),
    "no-json": (header(lambda text: "x" + text), "damaged: its header is not JSON: Expecting value"),
    "a-list": (header(lambda text: f"[{text}]"), "damaged: its header is a list, not an object"),
    "no-text": (lambda file: file.write_bytes(file.read_bytes()[:8] + b"\xff" + file.read_bytes()[9:]) and None, "not JSON"),
    "twice-in-the-header": (
        header(lambda text: text.replace(f'"{NORM}"', f'"{NORM}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},"{NORM}"')),
        f"damaged: its header has {NORM} twice",
    ),
    "no-offsets": (header(lambda text: text.replace('"data_offsets"', '"offsets"')), "damaged: "),
    "another-shape": (header(lambda text: text.replace("[211,48]", "[211,49]")), "damaged: "),
    "no-such-type": (header(lambda text: text.replace('"F32"', '"F33"')), "damaged: "),
}


@roads
@pytest.mark.parametrize(("break_it", "message"), FILES.values(), ids=FILES)
def test_a_damaged_file_is_an_error(
    tmp_path: Path, opened: Callable[[Path], object], break_it: Callable[[Path], None], message: str
) -> None:
    folder = write_model(tmp_path / "model", LLAMA)
    file = folder / "model.safetensors"
    before = file.read_bytes()
    break_it(file)
    assert file.read_bytes() != before
    with pytest.raises(ModelError, match=message):
        opened(folder)


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_configuration_that_is_no_object_has_no_fingerprint(tmp_path: Path, content: str) -> None:
    folder = write_model(tmp_path / "model", LLAMA)
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be read as a model"):
        teacher_fingerprint(folder)


def test_the_fingerprint_of_a_whole_folder_is_that_of_earlier_versions(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(20_000, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert teacher_fingerprint(tmp_path) == "27add3906f65b4a14f7a0e92338db1c77abdb6a46e8b2387a8911be1bf5d45d1"


@pytest.mark.parametrize("content", [b"GGML....", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_gguf_file_has_no_fingerprint_and_is_not_converted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"x.gguf is (not a GGUF file|a Git LFS pointer)"):
        teacher_fingerprint(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"x.gguf is (not a GGUF file|a Git LFS pointer)"):
        teacher_folder(tmp_path / "x.gguf")


@pytest.mark.parametrize("lost", [1, 100, 5_000])
def test_a_gguf_file_that_was_cut_off_is_not_converted(tmp_path: Path, lost: int) -> None:
    source = write_gguf(tmp_path / "x.gguf")
    source.write_bytes(source.read_bytes()[:-lost])
    with pytest.raises(ModelError, match="cannot read the model in"):
        teacher_folder(source, tmp_path / "cache")


# ---- types of numbers


def retyped(folder: Path, name: str, dtype: torch.dtype) -> Path:
    file = folder / "model.safetensors"
    state = load_file(file)
    state[name] = (state[name] * 10).to(dtype)
    save_file(state, file, metadata={"format": "pt"})
    return folder


NO_WEIGHTS = [
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@models
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@pytest.mark.parametrize("name", [QUERY, NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", NO_WEIGHTS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_weights_are_real_floating_point_numbers_of_16_bits_or_more(
    tmp_path: Path, opened: Callable[[Path], object], dtype: torch.dtype, name: str
) -> None:
    folder = retyped(write_model(tmp_path / "model", LLAMA), name, dtype)
    kind = PretrainedWeights(folder).dtype(name)
    with pytest.raises(ModelError, match=rf"the type of {name} is {kind}, but a llama model needs floating-point numbers"):
        opened(folder)


@models
def test_an_integer_embedding_is_an_error_even_if_the_configuration_ties_the_head(
    tmp_path: Path, opened: Callable[[Path], object]
) -> None:
    folder = retyped(write_model(tmp_path / "model", LLAMA), "model.embed_tokens.weight", torch.int8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"the type of model.embed_tokens.weight is I8"):
        opened(folder)


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "expert": ({"model_type": "mixtral", "num_local_experts": 2}, "model.layers.1.block_sparse_moe.experts.1.w1.weight"),
    "bias": ({"model_type": "qwen2"}, "model.layers.1.self_attn.q_proj.bias"),
    "tied head": ({"model_type": "llama", "tie_word_embeddings": True}, "lm_head.weight"),
}


@pytest.mark.parametrize(("spec", "name"), PARTS.values(), ids=PARTS)
def test_every_part_of_a_model_is_of_floating_point_numbers(tmp_path: Path, spec: dict[str, Any], name: str) -> None:
    folder = write_model(tmp_path / "model", {**SIZES, **spec})
    file = folder / "model.safetensors"
    state = load_file(file)
    like = state.get(name, state["model.embed_tokens.weight"])
    save_file(state | {name: like.clone()}, file, metadata={"format": "pt"})
    check_weights(PretrainedWeights(folder), read_config(folder))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        retyped(folder, name, dtype)
        with pytest.raises(ModelError, match=f"the type of {name} is "):
            check_weights(PretrainedWeights(folder), read_config(folder))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8])
def test_masks_of_old_folders_may_be_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 211, "n_positions": 64}
    folder = write_model(tmp_path / "model", spec)
    add(folder / "model.safetensors", "transformer.h.0.attn.bias", torch.ones(1, 1, 64, 64).to(dtype))
    as_teacher(folder)
    retyped(folder, "transformer.h.0.attn.c_attn.weight", dtype)
    with pytest.raises(ModelError, match=r"c_attn.weight is (BOOL|U8|I8)"):
        as_teacher(folder)


@pytest.mark.parametrize("named", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_keep_their_type_if_the_configuration_has_another(tmp_path: Path, dtype: torch.dtype, named: str) -> None:
    folder = write_model(tmp_path / "model", LLAMA)
    exact = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({name: tensor.float() for name, tensor in exact.items()}, folder / "model.safetensors")
    ids_BS, target_BS = batch(2, 16)
    expected = open_teacher(folder, torch.float32, "cpu").loss(ids_BS, target_BS)
    save_file(exact, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {named: "float16" if dtype == torch.float64 else "float32"}))
    assert torch.equal(open_teacher(folder, torch.float32, "cpu").loss(ids_BS, target_BS), expected)
    assert expected.sum() / (target_BS >= 0).sum() > 0.5 * math.log(SIZES["vocab_size"])
    student = Student(student_config(folder), seed=0)
    student.load(PretrainedWeights(folder))
    assert torch.allclose(student(ids_BS, target_BS), expected, atol=1e-4)
