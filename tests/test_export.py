"""What is exported is what was trained, and training goes on from it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from megatron_vocagno.batch.front import Front
from megatron_vocagno.batch.loader import IGNORE, Layout, evaluation_batches
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.engine.manifest import MANIFEST, PRETRAINED, newest_checkpoint
from megatron_vocagno.export import main
from tests import tokenizers_for_tests as real
from tests.runs import Case, metrics, spawn

pytestmark = pytest.mark.slow


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def evaluations(output) -> list[float]:
    return [line["eval/loss"] for line in metrics(output) if "eval/loss" in line]


@pytest.mark.parametrize(("tied", "stages"), [pytest.param(True, 2, marks=pytest.mark.long), (False, 0)])
def test_the_exported_model_scores_as_the_engine_did_and_trains_on(
    case: Case, tied: bool, stages: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"export-tied-{tied}"
    tie = f"student.config.tie_word_embeddings={str(tied).lower()}"
    processes, layout = max(stages, 1), f"parallel.pipeline_stages={stages}"
    output = case.run(name, processes, [layout, tie, "training.steps=2"])
    out = case.folder / f"{name}-hf"
    with monkeypatch.context() as patched:
        # between the weights and the configuration
        patched.setattr(PretrainedConfig, "save_pretrained", interrupt)
        assert main([str(output), "--out", str(out)]) == 130 and list(out.iterdir()) == []
        assert capsys.readouterr().err == "interrupted; nothing was written\n"
    if tied:
        command = [sys.executable, "-m", "megatron_vocagno.export", str(output), "--out", str(out)]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.count(str(out)) == 1
    else:
        assert main([str(output), "--out", str(out)]) == 0 and capsys.readouterr().out.count(str(out)) == 1
    readable = {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert readable["model.safetensors"] == readable["config.json"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied

    # an independent road: transformers' own model and torch's own cross entropy on the evaluation's rows
    valid = AlignedDataset.open(case.valid)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for step in evaluation_batches(valid, valid.student_byte_lengths, 64, Layout(2, 1, 1), 0, 12, Front((real.MISTRAL_BOS,))):
            (batch,) = step.batches
            logits_BSV = model(input_ids=batch.input_BS).logits
            total += F.cross_entropy(
                logits_BSV.flatten(0, 1), batch.target_BS.flatten(), ignore_index=IGNORE, reduction="sum"
            ).item()
            tokens += step.tokens
    assert tokens > 500
    assert total / tokens == pytest.approx(evaluations(output)[-1], rel=1e-5)
    assert total / tokens < math.log(32_000)

    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = valid.student(0)
    assert (
        tokenizer.decode(ids[:-1]).strip()
        == tokenizer.decode(tokenizer(tokenizer.decode(ids[:-1]), add_special_tokens=False).input_ids).strip()
    )
    assert tokenizer.eos_token_id == model.config.eos_token_id == ids[-1]

    if tied:
        give_belongings(out, int(ids[-1]))
    arguments = case.command(f"{name}-on", [layout, "training.steps=1"])
    path = case.folder / f"{name}-on" / "run.toml"
    text = path.read_text()
    start, end = text.index("[student.config]"), text.index("[teacher]")
    path.write_text(text[:start] + f'[student]\npretrained = "{out}"\n' + text[end:])
    finished = spawn(processes, arguments)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert evaluations(case.out(f"{name}-on"))[0] == pytest.approx(evaluations(output)[-1], rel=1e-6)
    if tied:
        check_belongings(case.out(f"{name}-on"), out, int(ids[-1]), capsys)


def give_belongings(folder: Path, eos: int) -> None:
    """What an instruct model has beside its weights."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools: {{ messages | length }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 5], "temperature": 0.7, "do_sample": True}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left", "eos_token": "<unk>"}))


def check_belongings(run: Path, student: Path, eos: int, capsys: pytest.CaptureFixture[str]) -> None:
    """They outlive training and export; the EOS is the one that the documents ended with."""
    (student / "chat_template.jinja").unlink()  # a checkpoint needs its student's folder no more
    out = run.parent / f"{run.name}-hf"
    assert main([str(run), "--out", str(out)]) == 0
    told = capsys.readouterr().err
    assert "additional_chat_templates/tools.jinja, chat_template.jinja, generation_config.json, tokenizer.json" in told
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    assert tokenizer.apply_chat_template([{}], chat_template="tools", tokenize=False) == "tools: 1"
    assert tokenizer.padding_side == "left" and tokenizer.eos_token_id == eos
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.temperature == 0.7 and model.generation_config.eos_token_id == [eos, 5]

    # a checkpoint of an older release has none of it, and says so
    checkpoint = newest_checkpoint(run, print)
    assert checkpoint is not None
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    manifest["files"] = {name: file for name, file in manifest["files"].items() if not name.startswith(f"{PRETRAINED}/")}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    shutil.rmtree(checkpoint / PRETRAINED)
    assert main([str(run), "--out", f"{out}-old"]) == 0
    assert f"note: {checkpoint} has no chat template and no generation settings of {student}" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(f"{out}-old").chat_template is None


@pytest.mark.parametrize("half", [True, False])
def test_an_average_is_the_mean_of_the_last_checkpoints_float32_weights(
    small_case: Case, half: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if half else {}
    overrides = ["training.steps=4", "checkpoint.every=1", "checkpoint.keep_last=4", "eval.rows=2"]
    output = small_case.run(f"average-{half}", 1, overrides, settings)
    sums: dict[str, NDArray[np.float64]] = {}
    for step in (2, 3, 4):
        for file in (output / "checkpoints" / f"step-{step:08d}").glob(f"{'optimizer' if half else 'student'}/*.safetensors"):
            for name, tensor in load_file(file).items():
                if not half or name.endswith(".master"):
                    key = name.removesuffix(".master")
                    sums[key] = sums.get(key, np.float64(0)) + tensor.numpy().astype(np.float64)
    means = {name: total / 3 for name, total in sums.items()}
    for dtype in ("float32", None):
        out = tmp_path / str(dtype)
        assert main([str(output), "--out", str(out), "--average", "3", *(["--dtype", dtype] if dtype else [])]) == 0
        assert capsys.readouterr().out == f"mean of 3 checkpoints of {output}, steps 2, 3, 4 -> {out}\n"
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == means.keys() and len(exported) > 20
        expected = torch.bfloat16 if half and dtype is None else torch.float32
        assert all(tensor.dtype == expected for tensor in exported.values())
        for name, tensor in exported.items():
            error = abs(tensor.double().numpy() - means[name])
            assert (error <= (2**-8 if expected == torch.bfloat16 else 2**-22) * abs(means[name]) + 1e-7).all(), name
    newest = load_file(output / "checkpoints" / "step-00000004" / "student" / "layer_0001.safetensors")
    assert any(not torch.equal(tensor.float(), torch.tensor(means[name]).float()) for name, tensor in newest.items())


def test_export_refuses_what_it_would_spoil_or_cannot_find(case: Case, tmp_path, capsys) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    assert main([str(case.folder), "--out", str(tmp_path / "taken")]) == 2
    assert "is not empty: exporting would mix two models" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "new")]) == 2
    assert "no complete checkpoint in" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
