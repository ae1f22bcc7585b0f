"""What a user can get wrong is refused before anything is written: what, where, both values, likely cause, exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_vocagno.config import RunError
from megatron_vocagno.train import NonFiniteGuard, main
from tests.runs import Case, launch, metrics, spawn, write_settings


@pytest.fixture(scope="module")
def cut_off(case: Case) -> Path:
    """The training dataset with a file that lost its end."""
    folder = case.folder / "cut-off"
    shutil.copytree(case.train, folder)
    victim = folder / "shards" / "0000" / "student.bin"
    victim.write_bytes(victim.read_bytes()[:-10])
    return folder


@pytest.fixture(scope="module")
def other_tokenizer(case: Case) -> Path:
    """The teacher with a tokenizer in which two tokens have changed places."""
    folder = case.folder / "other-tokenizer"
    shutil.copytree(case.teacher, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


BAD = {
    "an unknown key": (["guidance.kep=0.4"], {}, "no field 'guidance.kep'; did you mean 'guidance.keep'?"),
    "keep = 0": (["guidance.keep=0"], {}, "'guidance.keep': Input should be greater than 0, not 0"),
    "no dataset": (["data.train=/nowhere"], {}, "/nowhere/dataset.json is missing"),
    "a truncated dataset": (["data.train={cut_off}"], {}, "student.bin: "),
    "no teacher": (["teacher.path=/nowhere"], {}, "no model at /nowhere: the path does not exist"),
    "another teacher's dataset": (["teacher.path={other_tokenizer}"], {}, "its teacher ids were made with tokenizer "),
    "a vocabulary larger than the embedding": (
        ["student.config.vocab_size=31000"],
        {},
        "the tokenizer has 32,000 tokens, the student model has 31,000",
    ),
    "rows longer than the student": (["data.row_length=256"], {}, "rows have 256 tokens, the student reads 128"),
    "ZeRO-2 in a pipeline": (
        ["parallel.pipeline_stages=1"],
        {"zero_optimization": {"stage": 2}},
        "ZeRO-2 cannot run in a pipeline",
    ),
    "a batch that does not divide": ([], {"train_batch_size": 7}, "train_batch_size is 7, but 2 rows a micro-batch"),
    "too few processes": (["parallel.pipeline_stages=2"], {}, "1 processes cannot form pipelines of 2 stages"),
    "no optimizer": ([], {"optimizer": None}, "no 'optimizer'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_explained_and_nothing_is_written(case: Case, cut_off: Path, other_tokenizer: Path, mistake: str) -> None:
    overrides, settings, complaint = BAD[mistake]
    name = mistake.replace(" ", "-").replace("'", "")
    arguments = case.command(name, [o.format(cut_off=cut_off, other_tokenizer=other_tokenizer) for o in overrides], settings)
    finished = spawn(1, arguments)
    assert finished.returncode == 2, finished.stdout[-3000:]
    assert "error: " in finished.stdout and complaint in finished.stdout, finished.stdout[-3000:]
    assert "Traceback" not in finished.stdout
    assert not case.out(name).exists()


@pytest.mark.slow
def test_plain_language_modeling_never_opens_a_teacher(case: Case) -> None:
    output = case.run("clm", 1, ["guidance.objective=clm", "teacher.path=/nowhere", "training.steps=2"])
    lines = [line for line in metrics(output) if "loss/train" in line]
    assert len(lines) == 2
    assert lines[0]["loss/train"] == pytest.approx(lines[0]["loss/all_tokens"], rel=1e-6)
    assert not any(name.startswith(("teacher/", "guidance/")) for line in lines for name in line)


@pytest.mark.slow
def test_keeping_all_tokens_is_plain_language_modeling(case: Case) -> None:
    everything = case.run("keep-all", 1, ["guidance.keep=1.0", "training.steps=3"])
    plain = case.run("keep-plain", 1, ["guidance.objective=clm", "training.steps=3"])
    losses = [[line["loss/train"] for line in metrics(output) if "loss/train" in line] for output in (everything, plain)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_one_error_message_for_all_ranks(case: Case) -> None:
    finished = launch(2, case.command("two-ranks", ["data.train=/nowhere"]))
    assert finished.returncode != 0
    assert finished.stdout.count("error: /nowhere/dataset.json is missing") == 1


def test_the_guard_stops_after_steps_in_a_row_and_forgives_single_ones() -> None:
    good = {"loss/train": 2.0, "optimizer/grad_norm": 1.0, "optimizer/skipped_steps": 0.0, "loss/nonfinite_tokens": 0.0}
    bad = [
        good | {"loss/train": float("nan")},
        good | {"optimizer/grad_norm": float("inf")},
        good | {"loss/nonfinite_tokens": 3.0},
        good | {"optimizer/skipped_steps": 1.0},
    ]
    guard = NonFiniteGuard(3)
    for step, numbers in enumerate([bad[0], bad[1], good, bad[2], bad[0]]):
        guard.check(step, numbers)
    with pytest.raises(RunError, match="3 steps in a row were not finite, last step 9"):
        guard.check(9, bad[3])


def test_settings_that_are_no_file_or_no_json_are_refused(tmp_path: Path) -> None:
    from megatron_vocagno.engine.settings import read_settings

    with pytest.raises(RunError, match="no DeepSpeed configuration at"):
        read_settings(tmp_path / "absent.json", 0, "cpu")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match="is not JSON"):
        read_settings(tmp_path / "bad.json", 0, "cpu")
    path = write_settings(tmp_path / "bf16.json", bf16={"enabled": True})
    with pytest.raises(RunError, match=r"needs data_types\.grad_accum_dtype = 'fp32', not None"):
        read_settings(path, 2, "cpu")
    with pytest.raises(RunError, match="ZeRO-0 leaves the other stages out of the gradient norm"):
        read_settings(write_settings(tmp_path / "zero0.json", zero_optimization={"stage": 0}), 2, "cpu")
    assert read_settings(path, 0, "cpu")["optimizer"]["params"]["torch_adam"] is True


def test_print_config_shows_what_a_run_resolves_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples/quickstart.toml", "--set", "guidance.keep=0.6", "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["guidance"] == {
        "objective": "guided",
        "aggregate": "max",
        "keep": 0.6,
        "scope": "microbatch",
        "unmapped": "include",
        "require_positive": False,
    }
    assert shown["training"]["schedule"]["warmup_steps"] == 6


def test_a_run_needs_a_deepspeed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples/quickstart.toml"]) == 2
    assert "--deepspeed_config is missing" in capsys.readouterr().err
