"""What is said of models: folders, students, teachers, GGUF files, and what the Hub does not give."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from inline_snapshot import snapshot
from torch import nn
from transformers import AutoConfig

from megatron_vocagno import hub
from megatron_vocagno.model import folder as folders
from megatron_vocagno.model import gguf
from megatron_vocagno.model.attention import check_documents, resolve_attention
from megatron_vocagno.model.configuration import check_row_length, student_config
from megatron_vocagno.model.folder import PretrainedWeights, model_folder, to_hugging_face
from megatron_vocagno.model.gguf import dequantize
from megatron_vocagno.model.quantized import quantize
from megatron_vocagno.model.student import Student
from megatron_vocagno.model.teacher import Teacher, open_teacher
from megatron_vocagno.model.ulysses import check_ulysses
from tests.errors.models import LLAMA, change, model
from tests.errors.telling import told
from tests.model.tiny_gguf import skip_if_unreadable

__all__ = ["model"]


def test_a_folder_that_is_no_model(model: Path, tmp_path: Path) -> None:
    with told(
        snapshot(
            "no model at DIR/nowhere: the path does not exist. The name counts as a path, because a Hub id has the form org/name or org/name@revision."
        ),
        DIR=tmp_path,
    ):
        model_folder(tmp_path / "nowhere")
    with told(snapshot("no model at DIR: it has no config.json. Is it a Hugging Face model folder?"), DIR=tmp_path):
        model_folder(tmp_path)
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    with told(
        snapshot(
            "no weights in DIR/model: neither model.safetensors nor model.safetensors.index.json. Was the download complete?"
        ),
        DIR=tmp_path,
    ):
        model_folder(model)
    (model / "pytorch_model.bin").touch()
    with told(
        snapshot(
            "no weights in DIR/model: neither model.safetensors nor model.safetensors.index.json. It has pytorch_model.bin, which can run code when it is loaded. On a machine where that risk is acceptable, convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        ),
        DIR=tmp_path,
    ):
        model_folder(model)
    index = model / "model.safetensors.index.json"
    index.write_text(
        '{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    with told(
        snapshot(
            "DIR/model/model.safetensors.index.json lists 2 files that do not exist, for example model-00001-of-00002.safetensors. Was the download complete?"
        ),
        DIR=tmp_path,
    ):
        model_folder(model)
    index.write_text("{}")
    with told(
        snapshot("DIR/model/model.safetensors.index.json cannot be read: it has no 'weight_map'. Was the download complete?"),
        DIR=tmp_path,
    ):
        model_folder(model)
    weights.write_bytes(whole)
    change(model, model_type="lama")
    with told(
        snapshot(
            "DIR/model/config.json is not a configuration that transformers can read: The checkpoint you are trying to load has model type `lama` but Transformers does not recognize this architecture. This could be because of an issue with the checkpoint, or because your version of Transformers is out of date."
        ),
        DIR=tmp_path,
    ):
        student_config(model)


STUDENTS: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "gpt2"},
        snapshot(
            "student models of type 'gpt2' are not supported; supported types: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text"
        ),
    ),
    (
        {"model_type": None},
        snapshot("student.config has no 'model_type'; supported types: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text"),
    ),
    (
        {"model_type": None, "model_typ": "llama"},
        snapshot(
            "student.config has no 'model_type' (is 'model_typ' a misspelling of it?); supported types: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text"
        ),
    ),
    (
        {"num_hiden_layers": 2},
        snapshot("student.config: no field 'num_hiden_layers' in a llama model; did you mean 'num_hidden_layers'?"),
    ),
    (
        {"num_hidden_layers": 0},
        snapshot("student.config: a llama model with num_hidden_layers = 0: expected a whole number above 0"),
    ),
    (
        {"num_key_value_heads": 3, "num_attention_heads": 4},
        snapshot("student.config: not a valid llama model: num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
    ),
    (
        {"hidden_size": "many"},
        snapshot(
            """\
student.config: not a valid llama model: Validation error for field 'hidden_size':
    TypeError: Field 'hidden_size' expected int, got str (value: 'many')\
"""
        ),
    ),
    (
        {"vocab_size": 5},
        snapshot(
            "the tokenizer has 10 tokens, the student model has 5: some ids would have no embedding. Is this the tokenizer that the model was trained with?"
        ),
    ),
    (
        {"attention_dropout": 0.1},
        snapshot(
            "attention_dropout is 0.1; set it to 0. With dropout, a resumed run would differ from an uninterrupted one, and losses would depend on the parallel layout."
        ),
    ),
]


@pytest.mark.parametrize(("changes", "message"), STUDENTS, ids=[str(changes) for changes, _ in STUDENTS])
def test_a_student_that_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with told(message):
        student_config(LLAMA | changes, vocab_size=10)


HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
DIVIDED: list[tuple[dict[str, Any], int, str]] = [
    (
        HEADS,
        3,
        snapshot(
            "parallel.sequence is 3, but the student has 8 attention heads and 4 key heads: the heads are divided among the ranks. Use a number that divides the attention heads, and that divides the key heads or is a multiple of them."
        ),
    ),
    (
        HEADS | {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
        3,
        snapshot(
            "parallel.sequence is 3, but the student has 6 attention heads and 2 key heads: the heads are divided among the ranks. Use a number that divides the attention heads, and that divides the key heads or is a multiple of them."
        ),
    ),
    (
        HEADS | {"model_type": "gemma2", "head_dim": 8},
        2,
        snapshot(
            "parallel.sequence is 2, but sdpa cannot compute the attention of a gemma2 model. Rows can only be divided among ranks with sdpa: set parallel.sequence to 1."
        ),
    ),
    (
        HEADS | {"model_type": "mistral", "sliding_window": 63},
        2,
        snapshot(
            "parallel.sequence is 2, but the student attends to windows of 63 tokens, and data.row_length is 64. Rows that are divided among ranks are attended as a whole: use rows that are not longer than the window, or set parallel.sequence to 1."
        ),
    ),
    (
        HEADS | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        2,
        snapshot(
            "parallel.sequence is 2, but the student's RoPE has the type 'dynamic', which depends on the length of a row: each rank would compute it from its part of the row. Set parallel.sequence to 1."
        ),
    ),
]


@pytest.mark.parametrize(("changes", "ranks", "message"), DIVIDED)
def test_a_student_whose_rows_cannot_be_divided(changes: dict[str, Any], ranks: int, message: str) -> None:
    with told(message):
        check_ulysses(student_config(LLAMA | changes), ranks, 64)


def test_students_whose_rows_can_be_divided() -> None:
    for ranks in (1, 2, 4, 8):
        check_ulysses(student_config(LLAMA | HEADS), ranks, 64)
    # a window as long as a row excludes nothing
    check_ulysses(student_config(LLAMA | HEADS | {"model_type": "mistral", "sliding_window": 64}), 2, 64)
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 32}
    check_ulysses(student_config(LLAMA | HEADS | {"rope_parameters": scaled}), 2, 64)


def test_a_student_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    with told(snapshot("the student model has no vocab_size, and there is no tokenizer to take it from")):
        student_config({name: value for name, value in LLAMA.items() if name != "vocab_size"})
    with told(
        snapshot(
            "rows have 2,048 tokens (data.row_length), but the student reads at most 64 (max_position_embeddings). Use shorter rows or a model with a longer context."
        )
    ):
        check_row_length(student_config(LLAMA), 2048)

    def load(**changes: Any) -> None:
        Student(student_config(LLAMA | changes), 0).load(PretrainedWeights(model))

    with told(
        snapshot("DIR/model has no tensor model.layers.1.self_attn.q_proj.weight: its model does not match the configuration."),
        DIR=tmp_path,
    ):
        load(num_hidden_layers=2)
    with told(
        snapshot(
            "vocabulary mismatch at model.embed_tokens.weight: DIR/model has 10 tokens (10, 8), the student 12 (12, 8). Use the vocabulary size of the pretrained weights."
        ),
        DIR=tmp_path,
    ):
        load(vocab_size=12)
    with told(
        snapshot(
            "shape mismatch at model.layers.0.mlp.gate_proj.weight: DIR/model has (16, 8), the student (32, 8). "
            "Do the configurations differ?"
        ),
        DIR=tmp_path,
    ):
        load(intermediate_size=32)


def test_weights_that_are_not_those_of_the_configuration(tmp_path: Path) -> None:
    config = student_config(LLAMA)
    with told(
        snapshot(
            "cannot write the model: 11 tensors are missing ['model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight', 'model.layers.0.mlp.down_proj.weight'], 1 unknown ['model.norm']. Is this the configuration that the weights were trained with?"
        )
    ):
        to_hugging_face(config, {"model.norm": torch.zeros(8)}, tmp_path)
    state = {name: torch.zeros(tensor.shape) for name, tensor in folders.skeleton(config).state_dict().items()}
    with told(snapshot("cannot write the model: the shape of model.norm.weight is (9,), the configuration requires (8,)")):
        to_hugging_face(config, state | {"model.norm.weight": torch.zeros(9)}, tmp_path)


def test_teachers_that_cannot_teach(model: Path) -> None:
    teacher = open_teacher(model, torch.float32, "cpu")
    row = torch.zeros(1, 65, dtype=torch.long)
    with told(
        snapshot(
            "a row has 65 teacher tokens, but the teacher reads at most 64. Use shorter rows (data.row_length): a text can have more teacher tokens than student tokens."
        )
    ):
        teacher.loss(row, row)
    gemma = AutoConfig.for_model("gemma2", use_bidirectional_attention=True)
    with told(
        snapshot(
            "this gemma2 model lets tokens see the tokens after them (use_bidirectional_attention), so it predicts none of them"
        )
    ):
        resolve_attention(gemma, "auto", torch.float32, "cpu")
    with told(snapshot("sdpa cannot compute the attention of a gemma2 model. Use attention = 'auto'.")):
        resolve_attention(AutoConfig.for_model("gemma2"), "sdpa", torch.float32, "cpu")
    with told(
        snapshot("a mamba teacher cannot cut its attention at document borders: use data.attention = 'row', for both models")
    ):
        check_documents(nn.Identity(), AutoConfig.for_model("mamba"), torch.device("cpu"))

    class WithBias(nn.Module):
        config, dtype = student_config(LLAMA), torch.float32
        bias: bool = True

        def get_output_embeddings(self) -> nn.Module | None:
            return nn.Linear(8, 10) if self.bias else None

        def get_decoder(self) -> None:
            return None

    with told(snapshot("this llama teacher has a bias in its head, which is not supported yet")):
        Teacher(WithBias())
    WithBias.bias = False
    with told(snapshot("this llama teacher has no separate decoder and head")):
        Teacher(WithBias())


def test_a_teacher_in_8_bits_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with told(snapshot("teacher.quantization = 'int8': the teacher's decoder has no torch linear layers. Use 'none'")):
        quantize(nn.Embedding(2, 2), "int8", "cpu")
    linear = nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with told(
        snapshot(
            "teacher.quantization = 'int8' needs torchao (import of torchao.quantization halted; None in sys.modules): pip install torchao, or use 'none'"
        )
    ):
        quantize(linear, "int8", "cpu")
    linear.weight.ds_id = 0  # type: ignore[assignment]
    with told(
        snapshot(
            "teacher.quantization = 'fp8' with teacher.placement = 'zero3': quantized weights cannot be sharded. Use placement 'replicated', or quantization 'none'."
        )
    ):
        quantize(linear, "fp8", "cpu")


def test_gguf_files_that_cannot_be_converted(tmp_path: Path) -> None:
    with told(snapshot("no GGUF file at DIR/no.gguf"), DIR=tmp_path):
        dequantize(tmp_path / "no.gguf", tmp_path / "out")
    with told(snapshot("DIR is a folder, not a GGUF file"), DIR=tmp_path):
        dequantize(tmp_path, tmp_path / "out")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"<htm")
    with told(snapshot("DIR/x.gguf is not a GGUF file: it begins with b'<htm'. Was the download complete?"), DIR=tmp_path):
        dequantize(file, tmp_path / "out")
    skip_if_unreadable()
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with told(snapshot("cannot write DIR: it exists. Remove it, or write to another folder"), DIR=tmp_path):
        dequantize(file, tmp_path)
    with told(
        snapshot("transformers cannot read the model in DIR/x.gguf: DIR/x.gguf has no `general.architecture` in its metadata."),
        DIR=tmp_path,
    ):
        dequantize(file, tmp_path / "out")


def test_a_gguf_file_that_cannot_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Directory not empty")

    skip_if_unreadable()
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "_write_model", lambda *_: None)
    monkeypatch.setattr(gguf.AutoTokenizer, "from_pretrained", refuse)
    with told(snapshot("transformers cannot read the tokenizer in DIR/x.gguf: Directory not empty"), DIR=tmp_path):
        dequantize(file, tmp_path / "out")
    monkeypatch.setattr(gguf, "_write_tokenizer", lambda *_: None)
    monkeypatch.setattr(gguf, "_write_origin", lambda *_: None)
    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with told(
        snapshot("cannot write DIR/out: Directory not empty. Did another process write it at the same time?"), DIR=tmp_path
    ):
        dequantize(file, tmp_path / "out")


def test_what_the_hub_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def answer(error: Exception) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)

    def of(kind: type[Exception]) -> Exception:
        error = kind.__new__(kind)
        Exception.__init__(error, "a page of the library's own words")
        return error

    answer(of(hub_errors.GatedRepoError))
    with told(snapshot("org/name is gated: accept its terms on the Hub, and set HF_TOKEN to a token of that account")):
        hub.snapshot("org/name")
    answer(of(hub_errors.RepositoryNotFoundError))
    with told(snapshot("the Hub has no org/name, or it is private and HF_TOKEN does not give access to it")):
        hub.snapshot("org/name")
    answer(of(hub_errors.RevisionNotFoundError))
    with told(snapshot("org/name has no revision 'v2' on the Hub")):
        hub.snapshot("org/name@v2")
    answer(of(hub_errors.LocalEntryNotFoundError))
    with told(
        snapshot(
            "org/name@v2 is missing or incomplete in the Hub's cache CACHE, and the Hub does not answer. Download it on a machine with a network: hf download org/name --revision v2 --exclude '*.bin'."
        )
    ):
        hub.snapshot("org/name@v2")
    answer(OSError(28, "No space left on device"))
    with told(snapshot("org/name cannot be downloaded: OSError: [Errno 28] No space left on device")):
        hub.snapshot("org/name")
    with told(
        snapshot(
            "no model at org/name: the path does not exist, and as a Hub id: org/name cannot be downloaded: "
            "OSError: [Errno 28] No space left on device"
        )
    ):
        model_folder("org/name")
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["config.json"])
    with told(
        snapshot(
            "org/name is missing or incomplete in the Hub's cache CACHE, and the Hub did not answer when the other files were requested, although it does now. Download it on a machine with a network: hf download org/name --exclude '*.bin'."
        )
    ):
        hub.require_unlisted("org/name", ["config.json"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["pytorch_model.bin"])
    with told(
        snapshot(
            'no weights in org/name: on the Hub it has no config.json, or neither model.safetensors nor model.safetensors.index.json. Pickled weights are not downloaded, because they can run code when they are loaded. If the Community tab offers a conversion ("Adding `safetensors` variant"), use its revision: org/name@refs/pr/1.'
        )
    ):
        model_folder("org/name")
    (tmp_path / "pins.json").write_text('{"org/name": "org/name@main"}')
    with told(
        snapshot(
            "DIR/pins.json, the record of the commits of Hub ids, cannot be read: a name without a commit. If you delete it, the current commits are used."
        ),
        DIR=tmp_path,
    ):
        folders.pinned([Path("org/name")], tmp_path / "pins.json")
