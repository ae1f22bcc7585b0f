"""The recipes: every command that their headers and their page show is dry-run here, with the configurations that ship."""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from megatron_vocagno import command
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.planning import dry_run
from megatron_vocagno.planning.shapes import ForwardShapes, forward_shapes
from megatron_vocagno.pretrain import main
from megatron_vocagno.run_file import load_run
from tests.runs import REPOSITORY

RECIPES = REPOSITORY / "examples/recipes"
SCRIPT = "python examples/pretrain_vocagno.py "
QWEN = ["examples/recipes/qwen2.5-math-instruct.toml", "--deepspeed_config", "ds_configs/gpu_zero1_bf16.json", "--dry-run"]
QWEN += ["--student-config", "examples/plan/TinyLlama-1.1B.json", "--teacher-config", "examples/plan/Qwen2.5-Math-7B.json"]


def shown(text: str) -> list[str]:
    """Commands in a page or in comments, their continued lines joined."""
    lines = re.sub(r"(?m)^#\s*", "", text).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


FROM_HEADERS = [(path.name, line) for path in sorted(RECIPES.glob("*.toml")) for line in shown(path.read_text())]
FROM_PAGE = [("README.md", line) for line in shown((RECIPES / "README.md").read_text())]
DRY_RUNS = [(where, line) for where, line in FROM_HEADERS + FROM_PAGE if line.startswith(SCRIPT) and "--dry-run" in line]


SHAPES: dict[tuple[object, ...], ForwardShapes] = {}


@pytest.fixture(autouse=True)
def one_forward_of_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass on the meta device takes a second, and the recipes have few models."""

    def remember(config: PretrainedConfig, *sizes: Any) -> ForwardShapes:
        key = (config.to_json_string(), *sizes)
        return SHAPES.get(key) or SHAPES.setdefault(key, forward_shapes(config, *sizes))

    monkeypatch.setattr(dry_run, "forward_shapes", remember)


@pytest.fixture(autouse=True)
def in_the_repository_and_without_a_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(REPOSITORY)
    asked: list[object] = []

    def refuse(*what: object, **_: object) -> None:
        asked.append(what)
        raise OSError("a dry run asks no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


@pytest.mark.parametrize(("where", "line"), DRY_RUNS, ids=lambda text: text.removeprefix(SCRIPT).split(" --dry-run ")[-1][:40])
def test_every_command_that_is_shown_dry_runs(where: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(line.removeprefix(SCRIPT))
    assert main(arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    run = load_run(Path(arguments[0]), [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"])
    assert "512 rows of up to 2,048 tokens" in printed and "learning rate 8e-05, cosine" in printed
    assert "| student            | [4, 2048] | [4, 2048, 2048] |" in printed and "The dry run found no errors." in printed
    configs = [Path(arguments[i + 1]) for i, word in enumerate(arguments) if word == "--teacher-config"]
    assert len(configs) == run.guidance.needs_teacher
    for config in configs:
        fields = json.loads(config.read_text())
        assert f"[{fields['vocab_size']}, {fields['hidden_size']}]" in printed


def test_each_recipe_shows_its_commands_and_all_are_one_experiment() -> None:
    recipes = sorted(path.name for path in RECIPES.glob("*.toml"))
    assert len(recipes) == 10 and {where for where, _ in DRY_RUNS} == {*recipes, "README.md"}
    cpt = load_run(RECIPES / "cpt.toml")
    outputs = {"runs/cpt"}
    for name in recipes:
        run = load_run(RECIPES / name)
        assert run.student == cpt.student and run.training == cpt.training and run.data.row_length == 2048
        outputs.add(str(run.output))
        [launch] = [line for where, line in FROM_HEADERS if where == name and line.startswith("deepspeed --num_gpus 8 ")]
        assert f"examples/recipes/{name} --deepspeed_config" in launch
    assert len(outputs) == len(recipes)  # none writes into another's folder


def test_files_that_the_page_names_are_there() -> None:
    text = (RECIPES / "README.md").read_text()
    names = set(re.findall(r"(?<![\w/])(?:examples|ds_configs|docs)/[\w./-]+\w", text))
    assert len(names) > 5
    assert [name for name in names if not (REPOSITORY / name).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", text)
    assert links and [link for link in links if not (RECIPES / link).exists()] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "data.row_length=4096"], "rows have 4,096 tokens (data.row_length), but the student reads at most 2,048"),
        (["--gpus", "24"], "train_batch_size is 512, but 4 rows per micro-batch"),
        (["--gpus", "3"], "is 504.\n  It can be divided among 2 or 4 processes.\n"),
        (["--set", "guidance.keep=1.5"], "error: --set guidance.keep=1.5:\n  'guidance.keep': must be at most 1"),
        (["--gpus", "9", "--set", "parallel.pipeline_stages=2"], "number, for example --gpus 10\n"),
        (["--set", "parallel.pipeline_stages=2", "--set", "parallel.partition=[10,11]"], "there are 2 stages and 22 layers"),
        (["--student-config", "examples/plan"], "no such file: examples/plan/config.json (--student-config)"),
        (["--set", "guidance.kep=0.4"], "did you mean 'guidance.keep'"),
    ],
)
def test_a_misfit_is_told_before_anything_starts(change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QWEN, "--gpus", "8", *change]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_nowhere_yet_asks_for_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QWEN[:4], "--gpus", "8"]) == 2
    assert re.search(r"no configuration of the student at TinyLlama/[\s\S]*--student-config", capsys.readouterr().err)


def test_what_may_be_a_mistake_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()

    def notes(*settings: str) -> list[str]:
        assert main([*QWEN, "--gpus", "8", *(part for text in settings for part in ("--set", text))]) == 0
        printed = capsys.readouterr().out
        assert "The dry run found no errors." in printed
        told = [line.removeprefix("note: ") for line in printed.splitlines() if line.startswith("note: ")]
        # the recipe's fields of the method mean nothing to a baseline: tests/errors
        return [line for line in told if "no data" not in line and "no effect" not in line]

    here = [f"student.pretrained={tmp_path / 'model'}", f"teacher.path={tmp_path / 'model'}"]
    assert notes(*here) == [] == notes(here[0], "teacher.placement=cached") == notes(here[0], "guidance.objective=random")
    student, teacher = notes("teacher.path=models/Qwen", "student.pretrained=TinyLlama-1.1B")
    assert student.startswith(
        "student.pretrained: TinyLlama-1.1B does not exist. The name counts as a path, because a Hub id has the form org/name"
    )
    assert teacher.startswith(
        "teacher.path: models/Qwen is neither on disk nor in the Hub cache. The name counts as a Hub id, because"
    )
    assert teacher.endswith("`models` does not exist.")
    [path, commit] = notes("student.pretrained=docs/Tiny", f"teacher.path=docs/Tiny@{'1' * 40}")
    assert path.endswith("not as a Hub id, because `docs` exists.") and commit.endswith("because it ends with a commit.")
    [warm_up] = notes(*here, "training.schedule.warmup_steps=20000")
    assert "warmup_steps is 20,000, the run has 14,369 steps" in warm_up
    [two] = notes(*here, "guidance.objective=kld")
    assert "32,000 for the student, 152,064 for the teacher" in two and notes(*here, "guidance.objective=uld") == []


def test_of_the_ranks_of_a_launcher_the_first_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RANK0_SECONDS", 0.0)
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main([*QWEN, "--gpus", "8"]) == 0 and bool(capsys.readouterr().out) == speaks
        assert main([*QWEN, "--gpus", "3"]) == 2 and ("error: " in capsys.readouterr().err) == speaks


def test_data_that_is_there_is_checked_against_the_models(
    dataset: AlignedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QWEN, "--gpus", "8", "--set", f"data.train={dataset.path}"]) == 0
    small = tmp_path / "small.json"
    small.write_text(json.dumps(json.loads(Path(QWEN[-1]).read_text()) | {"vocab_size": 300}))
    assert main([*QWEN[:-1], str(small), "--gpus", "8", "--set", f"data.train={dataset.path}"]) == 2
    assert "the teacher tokenizer has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["guidance.objective=kld"], "compares distributions over one vocabulary"),
        (["teacher.placement=cached"], "has no losses of its teacher, and teacher.placement is 'cached'"),
    ],
)
def test_a_run_that_its_data_stops_is_not_called_faultless(
    change: list[str], message: str, dataset: AlignedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for text in (*change, f"data.train={dataset.path}") for part in ("--set", text)]
    assert main([*QWEN, "--gpus", "8", *settings]) == 2
    assert message in capsys.readouterr().err


def test_a_cached_teacher_is_its_losses_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QWEN, "--gpus", "8", "--set", "teacher.placement=cached"]) == 0
    assert "\nteacher: only its cached losses, of Qwen2.5-Math-7B-Instruct\n" in capsys.readouterr().out


def test_options_stand_in_any_order_and_those_without_an_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--local_rank=0", "--gpus", "8", QWEN[0], *QWEN[1:3], *QWEN[4:]]) == 0
    assert "no errors" in capsys.readouterr().out
    for wrong, message in (
        ([*QWEN, "--gpus", "8", "--json"], "unrecognized arguments: --json"),
        ([*QWEN, "--gpus", "8", "--print-config"], "unrecognized arguments: --print-config"),
        (QWEN, "the following arguments are required: --gpus"),
        ([*QWEN[:3], "--dry"], "unrecognized arguments: --dry"),
    ):
        with pytest.raises(SystemExit) as exit_of:
            main(wrong)
        told = capsys.readouterr().err
        assert exit_of.value.code == 2 and message in told and "megatron_vocagno.plan" not in told


def test_stages_are_shown_and_what_may_go_wrong_is_no_clean_bill(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QWEN, "--gpus", "8", "--gpu", "l40s", "--set", "parallel.pipeline_stages=2"]) == 0
    printed = capsys.readouterr().out
    assert "stage 0: embedding, 11 decoder layers;" in printed and "stage 1: 11 decoder layers, norm, head;" in printed
    assert main([*QWEN, "--gpus", "8", "--gpu", "a100-40gb", "--teacher-tokens", "3"]) == 2
    printed = capsys.readouterr().out
    assert "rows have about 6,144 teacher tokens, but the teacher reads at most 4,096" in printed and "does not fit" in printed
    assert "no errors" not in printed
    # it has looked at one layout alone
    assert "None of the layouts" not in printed and "megatron_vocagno.plan searches for a layout that fits" in printed


def test_options_of_the_plan_belong_to_a_dry_run() -> None:
    with pytest.raises(SystemExit) as exit_of:
        main([*QWEN[:3], "--gpus", "8"])
    assert exit_of.value.code == 2
