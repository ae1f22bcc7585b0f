"""The dry run: every student and teacher family passes on the meta device, and a run that does not fit exits with code 2."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot
from transformers import AutoConfig

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.errors import UserError
from megatron_vocagno.model.configuration import SUPPORTED
from megatron_vocagno.model.gguf import cached_folder
from megatron_vocagno.pretrain import main
from tests.errors.telling import refused, told
from tests.model.test_gguf import VOCAB, write_gguf
from tests.runs import Case, write_settings

ROW = 64
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": ROW // 2,
}
OTHERS = ["gpt2", "phi3", "olmo2", "qwen2_moe"]
"""Teachers that no student's layers are like."""
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def keys(model_type: str) -> dict[str, Any]:
    known = {field.name for field in fields(type(AutoConfig.for_model(model_type)))}
    return {"model_type": model_type} | {name: value for name, value in SIZES.items() if name in known}


def folder(model_type: str, root: Path) -> Path:
    """With its configuration alone, which is all that a dry run reads of a model."""
    path = root / model_type
    path.mkdir(exist_ok=True)
    if model_type == "gemma3":  # a model of images and text, as the larger ones are published
        config: dict[str, Any] = {"model_type": "gemma3", "text_config": keys("gemma3_text")}
    else:
        config = keys(model_type)
    (path / "config.json").write_text(json.dumps(config))
    return path


def student(model_type: str, root: Path, pretrained: bool) -> str:
    if pretrained:
        return f'pretrained = "{folder(model_type, root)}"'
    return f"config = {{{', '.join(f'{name} = {json.dumps(value)}' for name, value in keys(model_type).items())}}}"


def arguments(root: Path, student: str, teacher: Path, stages: int = 0, **settings: Any) -> list[str]:
    (root / "run.toml").write_text(
        f'output = "{root}/out"\n[data]\ntrain = "{root}/data"\nrow_length = {ROW}\n[student]\n{student}\n'
        f'[teacher]\npath = "{teacher}"\n[parallel]\npipeline_stages = {stages}\n[training]\nsteps = 10\n'
    )
    settings = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2} | settings
    return [
        f"{root}/run.toml",
        "--deepspeed_config",
        str(write_settings(root / "ds.json", **settings)),
        "--dry-run",
        "--gpus",
        "2",
    ]


@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize("pretrained", [False, True], ids=["from nothing", "pretrained"])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_student_and_a_teacher_of_every_family_pass(
    model_type: str, pretrained: bool, stages: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = "gemma3" if stages == 1 else SUPPORTED[(SUPPORTED.index(model_type) + stages) % len(SUPPORTED)]
    words = arguments(tmp_path, student(model_type, tmp_path, pretrained), folder(teacher, tmp_path), stages, **BF16)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"| student            |   [2, {ROW}] |   [2, {ROW}, 64] | [1000, 64] |   [2, {ROW}] |" in printed
    # with a position for what stands in front of text, which no tokenizer tells here
    rows, row = 16_384 // (ROW + 1), ROW + 1
    assert f"| teacher            | [{rows}, {row}] | [{rows}, {row}, 64] | [1000, 64] | [{rows}, {row}] |" in printed
    assert printed.endswith("The dry run found no errors.\n")


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_teacher_that_cannot_be_counted_is_checked_all_the_same(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(tmp_path, student("llama", tmp_path, True), folder(model_type, tmp_path), **BF16)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"note: no plan: cannot plan a teacher of type '{model_type}'" in printed and "GB" not in printed
    assert "| student " in printed and printed.endswith("The dry run found no errors.\n")


def test_more_stages_than_layers_are_refused(tmp_path: Path) -> None:
    words = arguments(tmp_path, student("llama", tmp_path, True), folder("llama", tmp_path), 5, **BF16)
    with told(snapshot("parallel.pipeline_stages is 5, but the student has 4 decoder layers")):
        refused(main, *words[:-1], "5")


def memory(printed: str) -> dict[str, float]:
    """Columns of the last table."""
    header, _, row = [line for line in printed.splitlines() if line.startswith("|")][-3:]
    cells = zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)), strict=True)
    return {name: float(cell) for name, cell in cells if re.fullmatch(r"[\d.]+", cell)}


def test_a_float32_run_has_its_memory_and_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32_000}
    config = tmp_path / "large.json"
    config.write_text(json.dumps(keys("llama") | large))
    held = {}
    for name, settings in (("fp32", {}), ("bf16", {"bf16": {"enabled": True}})):
        words = arguments(tmp_path, student("llama", tmp_path, True), folder("llama", tmp_path), train_batch_size=4, **settings)
        assert main([*words, "--student-config", str(config)]) == 0
        printed = capsys.readouterr().out
        assert ("hours" in printed) == ("tokens/s" in printed) == (name == "bf16")
        assert ("note: no times. The run computes in float32" in printed) == (name == "fp32")
        held[name] = memory(printed)
    assert held["bf16"]["weights"] > 1
    for part in ("weights", "gradients"):
        assert held["fp32"][part] == pytest.approx(2 * held["bf16"][part], abs=0.1)
    assert held["fp32"]["optimizer"] == held["bf16"]["optimizer"]


@pytest.mark.parametrize("settings", [{}, BF16], ids=["fp32", "bf16"])
def test_a_run_that_does_not_fit_is_a_fault(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(tmp_path, student("llama", tmp_path, True), folder("llama", tmp_path), **settings)
    assert main([*words, "--memory-share", "0.00001"]) == 2
    printed = capsys.readouterr().out
    assert "the run does not fit" in printed and "The largest part is" in printed
    assert printed.endswith("The dry run found an error: the run does not fit into memory, see above.\n")
    assert main(words) == 0


def test_a_gguf_teacher_is_planned_as_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATRON_VOCAGNO_CACHE", str(tmp_path / "cache"))
    source, printed = write_gguf(tmp_path / "tiny.gguf"), []

    def plan(teacher: Path) -> None:
        words = arguments(tmp_path, student("llama", tmp_path, True), teacher, **BF16)
        assert main(words) == 0
        told = capsys.readouterr().out
        printed.append(re.sub(r"(?m)^teacher: .*(?=, bfloat16)", "teacher", told))

    plan(source)
    assert not (tmp_path / "cache").exists(), "nothing is converted"
    converted = cached_folder(source)
    plan(converted)
    read = AutoConfig.from_pretrained

    def read_json(path: Path, **options: Any) -> Any:
        assert "gguf_file" not in options, "a converted file is not read again"
        return read(path, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", read_json)
    plan(source)
    assert printed[0] == printed[1] == printed[2] and f"[{len(VOCAB)}, 32]" in printed[0]


def test_a_gguf_file_that_cannot_be_planned_with(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"<html>")
    with told(snapshot("DIR/broken.gguf is not a GGUF file: it begins with b'<htm'. Was the download complete?"), DIR=tmp_path):
        refused(main, *arguments(tmp_path, student("llama", tmp_path, True), broken))
    broken.write_bytes(b"GGUF" + bytes(20))
    with told(
        snapshot(
            "transformers cannot read the configuration in DIR/broken.gguf: DIR/broken.gguf is GGUF v0; this reader handles v2 and "
            "v3."
        ),
        DIR=tmp_path,
    ):
        refused(main, *arguments(tmp_path, student("llama", tmp_path, True), broken))
    whole = write_gguf(tmp_path / "tiny.gguf")
    with told(
        snapshot(
            """\
student.pretrained: tiny.gguf is a GGUF file, and only a teacher can be one. Convert the file, and use the folder:
  python -m tools.convert.gguf_to_safetensors DIR/tiny.gguf --out DIR/tiny\
"""
        ),
        DIR=tmp_path,
    ):
        refused(main, *arguments(tmp_path, f'pretrained = "{whole}"', whole))


def test_a_dataset_of_another_tokenizer_is_refused(
    dataset: AlignedDataset, teacher_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = folder("llama", tmp_path)
    (one / "config.json").write_text(json.dumps(keys("llama") | {"vocab_size": 50_000}))
    words = [*arguments(tmp_path, student("gpt2", tmp_path, False), one), "--set", f"data.train={dataset.path}"]
    words += ["--set", f"student.pretrained={one}"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "note: the student model" in printed and "note: the teacher model" in printed, "neither has a tokenizer"
    shutil.copy(teacher_tokenizer / "tokenizer.json", one)
    with pytest.raises(UserError, match="its student ids were made with another tokenizer than that of the student model"):
        refused(main, *words)


def test_a_held_out_dataset_of_other_tokenizers_is_refused(dataset: AlignedDataset, small_case: Case, tmp_path: Path) -> None:
    words = [*arguments(tmp_path, student("llama", tmp_path, False), folder("llama", tmp_path), **BF16)]
    words += ["--set", f"data.train={small_case.train}", "--set", f"data.valid={dataset.path}"]
    with pytest.raises(UserError, match=rf"(?s){dataset.path}.*{small_case.train}|{small_case.train}.*{dataset.path}"):
        refused(main, *words)


def test_a_misspelled_dataset_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "text.jsonl").touch()
    words = arguments(tmp_path, student("llama", tmp_path, False), folder("llama", tmp_path), **BF16)
    assert main([*words, "--set", f"data.train={tmp_path}/data/trian"]) == 0
    *_, warning, end = capsys.readouterr().out.split("\n\n")
    assert warning == f"warning: data.train does not exist: {tmp_path}/data/trian.\n  Did you mean {tmp_path}/data/train?"
    assert end == "The dry run found no errors, but see the warning above.\n"
    with told(
        snapshot(
            "data.train: DIR/data/text.jsonl is a file, not a dataset. Build a dataset with: python -m tools.preprocess.build_dataset …"
        ),
        DIR=tmp_path,
    ):
        refused(main, *words, "--set", f"data.train={tmp_path}/data/text.jsonl")
    assert main([*words, "--set", f"data.valid={tmp_path}/data/trian"]) == 0
    assert f"warning: data.valid does not exist: {tmp_path}/data/trian.\n  Did you mean" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.valid: .*text\.jsonl is a file, not a dataset"):
        refused(main, *words, "--set", f"data.valid={tmp_path}/data/text.jsonl")
    without = student("llama", tmp_path, False).replace('"vocab_size": 1000, ', "").replace("vocab_size = 1000, ", "")
    words = arguments(tmp_path, without, folder("llama", tmp_path), **BF16)
    with told(
        snapshot("""\
student.config has no vocab_size, and it cannot be taken from the dataset: data.train does not exist yet: DIR/data/trian
  Did you mean DIR/data/train?\
"""),
        DIR=tmp_path,
    ):
        refused(main, *words, "--set", f"data.train={tmp_path}/data/trian")


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = arguments(tmp_path, student("llama", tmp_path, True), folder("qwen2", tmp_path), **BF16)
    run = Path(words[0])
    run.write_text(run.read_text().replace(f'path = "{tmp_path}', 'path = "~'))
    assert main(words) == 0 and "teacher: ~/qwen2, bfloat16, replicated\n" in capsys.readouterr().out
