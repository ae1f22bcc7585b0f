"""User errors are refused before anything is written, with both values, a likely cause and exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_vocagno.batch.loader import Layout
from megatron_vocagno.engine.settings import batch_layout, precision, read_settings
from megatron_vocagno.errors import RunError
from megatron_vocagno.pretrain import main
from tests.runs import Case, metrics, spawn, spawn_each, write_settings


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
    "keep = 0": (["guidance.keep=0"], {}, "'guidance.keep': must be above 0, not 0"),
    "no dataset": (["data.train=/nowhere"], {}, "error: data.train: /nowhere is not a dataset: the path does not exist"),
    "a truncated dataset": (["data.train={cut_off}"], {}, "student.bin: "),
    "no teacher": (["teacher.path=/nowhere"], {}, "error: teacher.path: no model at /nowhere: the path does not exist"),
    "no student": (
        ["student.pretrained=/nowhere"],
        {},
        "error: student.pretrained: no model at /nowhere: the path does not exist",
    ),
    "another teacher's dataset": (
        ["teacher.path={other_tokenizer}"],
        {},
        "its teacher ids were made with another tokenizer",
    ),
    "a vocabulary larger than the embedding": (
        ["student.config.vocab_size=999"],
        {},
        "the tokenizer has 1,000 tokens, the student model has 999",
    ),
    "rows longer than the student": (
        ["data.row_length=256"],
        {},
        "rows have 256 tokens (data.row_length), but the student reads at most 128",
    ),
    "ZeRO-2 in a pipeline": (
        ["parallel.pipeline_stages=1"],
        {"zero_optimization": {"stage": 2}},
        "ZeRO-2 cannot run in a pipeline",
    ),
    "a batch that does not divide": ([], {"train_batch_size": 7}, "train_batch_size is 7, but 2 rows per micro-batch"),
    "too few processes": (["parallel.pipeline_stages=2"], {}, "1 process cannot form pipelines of 2 stages"),
    "no optimizer": ([], {"optimizer": None}, "'optimizer' with a 'type' is missing"),
}


MISTAKES = """
import contextlib, io, json, sys
from megatron_vocagno.pretrain import main
answers = {}
for mistake, command in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        answers[mistake] = (main(command), said.getvalue())
print("ANSWERS " + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(case: Case, cut_off: Path, other_tokenizer: Path) -> dict[str, tuple[int, str]]:
    """Exit code and words for each mistake; all made in one process, for the time that its start takes."""
    commands = {}
    for mistake, (overrides, settings, _) in BAD.items():
        overrides = [override.format(cut_off=cut_off, other_tokenizer=other_tokenizer) for override in overrides]
        commands[mistake] = case.command(mistake.replace(" ", "-").replace("'", ""), overrides, settings)
    finished = spawn(1, [json.dumps(commands)], ("-c", MISTAKES))
    assert finished.returncode == 0, finished.stdout[-3000:]
    answers: dict[str, tuple[int, str]] = json.loads(finished.stdout.split("ANSWERS ")[1])
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_explained_and_nothing_is_written(case: Case, answers: dict[str, tuple[int, str]], mistake: str) -> None:
    code, said = answers[mistake]
    assert code == 2
    assert said.startswith("error: ") and BAD[mistake][2] in said, said
    assert not case.out(mistake.replace(" ", "-").replace("'", "")).exists()


@pytest.mark.slow
def test_a_mistake_is_the_exit_code_of_the_command(case: Case) -> None:
    finished = spawn(1, case.command("exit-code", ["guidance.kep=0.4"]))
    assert finished.returncode == 2 and finished.stdout.count("error: ") == 1 and "Traceback" not in finished.stdout


@pytest.mark.slow
def test_plain_language_modeling_never_opens_a_teacher(case: Case) -> None:
    output = case.run("clm", 1, ["guidance.objective=clm", "teacher.path=/nowhere", "training.steps=2"])
    lines = [line for line in metrics(output) if "loss/train" in line]
    assert len(lines) == 2
    assert lines[0]["loss/train"] == pytest.approx(lines[0]["loss/all_tokens"], rel=1e-6)
    assert not any(name.startswith(("teacher/", "guidance/")) for line in lines for name in line)


@pytest.mark.slow
def test_a_warm_up_that_outlasts_the_run_is_told_where_it_starts(case: Case) -> None:
    changes = ["guidance.objective=clm", "training.steps=1", "training.schedule.warmup_steps=9"]
    finished = spawn(1, case.command("warm-up", changes))
    assert finished.returncode == 0
    assert "note: training.schedule.warmup_steps is 9, the run has 1 step: the learning rate never reaches" in finished.stdout


@pytest.mark.slow
def test_keeping_all_tokens_is_plain_language_modeling(case: Case) -> None:
    everything = case.run("keep-all", 1, ["guidance.keep=1.0", "training.steps=3"])
    plain = case.run("keep-plain", 1, ["guidance.objective=clm", "training.steps=3"])
    losses = [[line["loss/train"] for line in metrics(output) if "loss/train" in line] for output in (everything, plain)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_one_error_message_for_all_ranks(case: Case) -> None:
    codes, said = spawn_each([case.command("two-ranks", ["data.train=/nowhere"])] * 2)
    assert codes == [2, 2]
    assert said.count("error: ") == said.count("error: data.train: /nowhere is not a dataset: the path does not exist") == 1


def test_settings_that_cannot_work_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no DeepSpeed configuration at"):
        read_settings(tmp_path / "absent.json", 0, "cpu")
    for text, complaint in (
        ("{", "is not JSON"),
        ("null", "expected a JSON object"),
        ("{}", "'optimizer' with a 'type' is missing"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RunError, match=complaint):
            read_settings(tmp_path / "bad.json", 0, "cpu")
    for changes, stages, complaint in (
        ({"optimizer": {}}, 0, "'optimizer' with a 'type' is missing"),
        ({"scheduler": {}}, 0, r"in the run file"),
        ({"tensor_parallel": {"autotp_size": 2}}, 0, r"'tensor_parallel' is not supported"),
        ({"zero_optimization": {"stage": 0}}, 0, "Stage 0 makes steps with gradients that are not finite"),
        ({"zero_optimization": None}, 2, r"zero_optimization\.stage is 0"),
    ):
        with pytest.raises(RunError, match=complaint):
            read_settings(write_settings(tmp_path / "settings.json", **changes), stages, "cpu")
    settings = read_settings(write_settings(tmp_path / "bf16.json", bf16={"enabled": True}), 0, "cpu")
    assert settings["optimizer"]["params"]["torch_adam"] is True
    assert precision(settings) == "bf16"


def test_the_global_batch_is_dealt_as_the_settings_say() -> None:
    rows, total, accumulate = "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"
    assert batch_layout({rows: 2, total: 16}, 4, 2) == Layout(2, 4, 2)
    assert batch_layout({rows: 2, accumulate: 3}, 4, 0) == Layout(2, 3, 4)
    assert batch_layout({rows: 1, total: 8, accumulate: 8}, 1, 0) == Layout(1, 8, 1)
    # in 16 bits one micro-batch is not summed with any other
    assert batch_layout({rows: 2, total: 8, "bf16": {"enabled": True}}, 4, 0) == Layout(2, 1, 4)
    fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    for stages in (0, 2):
        assert batch_layout({rows: 2, total: 16, "bf16": {"enabled": True}} | fp32, 4, stages).micro_batches > 1
    for settings, complaint in (
        ({rows: 2}, "must give train_micro_batch_size_per_gpu, and train_batch_size or gradient_accumulation_steps"),
        ({total: 8}, "must give"),
        ({rows: 0, total: 8}, "train_micro_batch_size_per_gpu = 0: expected a whole number above 0"),
        ({rows: "auto", total: 8}, "train_micro_batch_size_per_gpu = 'auto': expected a whole number"),
        ({rows: 2, total: 9}, r"train_batch_size is 9, but 2 rows per micro-batch .* is 8.\n  It must be a multiple of 2, "),
    ):
        with pytest.raises(RunError, match=complaint):
            batch_layout(settings, 1, 0)


def test_a_batch_that_does_not_divide_is_told_with_the_nearest_numbers_that_divide_it() -> None:
    rows, total, accumulate = "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"
    for settings, world, stages, near in (
        ({rows: 4, total: 512}, 3, 0, "2 or 4 processes."),
        ({rows: 4, total: 512}, 1024, 0, "128 processes."),
        ({rows: 4, total: 512}, 6, 2, "4 or 8 processes."),
        ({rows: 4, total: 4}, 2, 0, "1 process."),
        ({rows: 4, total: 512, accumulate: 16}, 4, 0, "8 processes."),
        ({rows: 4, total: 512, accumulate: 16}, 4, 2, "16 processes."),
    ):
        with pytest.raises(RunError) as refusal:
            batch_layout(settings, world, stages)
        assert str(refusal.value).endswith(f".\n  It can be divided among {near}")
        # and to these it is dealt
        numbers = [int(word) for word in near.split() if word.isdigit()]
        assert [batch_layout(settings, number, stages).rows for number in numbers] == [settings[total]] * len(numbers)
    with pytest.raises(
        RunError, match=r"4 rows .* \* 1 micro-batch .* \* 1024 data-parallel ranks \(1024 processes / 1 stage\) is 4096"
    ):
        batch_layout({rows: 4, total: 512}, 1024, 0)
    with pytest.raises(RunError, match="multiple of 12, train_micro_batch_size_per_gpu \\* gradient_accumulation_steps"):
        batch_layout({rows: 4, total: 512, accumulate: 3}, 2, 0)


def test_print_config_shows_what_a_run_resolves_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples/quickstart.toml", "--set", "guidance.keep=0.6", "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["guidance"] == {
        "objective": "guided",
        "aggregate": "max",
        "unit": "token",
        "weighting": "top_k",
        "threshold": 2.0,
        "strength": 0.25,
        "clip": 4.0,
        "keep": 0.6,
        "scope": "microbatch",
        "unmapped": "include",
        "require_positive": False,
        "combine": "min",
        "equal_parts": None,
        "distance_weight": 1.0,
    }
    assert shown["training"]["schedule"]["warmup_steps"] == 6


def test_a_run_needs_a_deepspeed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples/quickstart.toml"]) == 2
    assert "--deepspeed_config is missing" in capsys.readouterr().err
