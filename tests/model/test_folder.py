"""Folders are read safely and lazily, and what is wrong with one is said."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_vocagno.errors import ModelError
from megatron_vocagno.model.configuration import student_config
from megatron_vocagno.model.folder import PretrainedWeights, model_folder, to_hugging_face
from tests.model.tiny import SIZES, write_model

LLAMA = {"model_type": "llama", **SIZES}


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    whole = PretrainedWeights(write_model(tmp_path / "whole", LLAMA))
    parts = PretrainedWeights(write_model(tmp_path / "parts", LLAMA, max_shard_size="50KB"))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    names = set(whole)
    assert names == set(parts) and len(names) == 3 * 9 + 3
    for name in names:
        assert whole.shape(name) == parts.shape(name) == tuple(whole.tensor(name).shape)
        assert torch.equal(whole.tensor(name), parts.tensor(name))


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path, LLAMA, max_shard_size="50KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"lists 1 files that do not exist, for example {lost.name}"):
        PretrainedWeights(folder)


def test_what_is_not_a_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        model_folder(tmp_path)
    folder = write_model(tmp_path / "model", LLAMA)
    assert model_folder(folder) == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="download complete"):
        model_folder(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which can run code.*convert it"):
        PretrainedWeights(folder)


def test_an_incomplete_state_is_not_written(tmp_path: Path) -> None:
    config = student_config(write_model(tmp_path / "model", LLAMA))
    weights = PretrainedWeights(tmp_path / "model")
    state = {name: weights.tensor(name) for name in weights}
    with pytest.raises(ModelError, match=r"1 .*\['model.norm.weight'\], 1 .*\['norm.weight'\]"):
        to_hugging_face(config, {name.replace("model.norm", "norm"): tensor for name, tensor in state.items()}, tmp_path / "out")
    with pytest.raises(ModelError, match=r"model.norm.weight is \(47,\), .* \(48,\)"):
        to_hugging_face(config, state | {"model.norm.weight": torch.ones(47)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_written_over_an_older_one(tmp_path: Path) -> None:
    config = student_config(write_model(tmp_path / "model", LLAMA))
    weights = PretrainedWeights(tmp_path / "model")
    write_model(tmp_path / "out", {**LLAMA, "num_hidden_layers": 1}, seed=5, max_shard_size="50KB")
    to_hugging_face(config, {name: weights.tensor(name) for name in weights}, tmp_path / "out")
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers) == 3
    assert set(PretrainedWeights(tmp_path / "out")) == set(weights)


def test_every_rank_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = student_config(write_model(tmp_path / "model", LLAMA))
    weights = PretrainedWeights(tmp_path / "model")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 1)
    to_hugging_face(config, {name: weights.tensor(name) for name in weights}, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
