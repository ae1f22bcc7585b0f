"""The plan command: its section in the docs, its warnings and its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vocagno import plan
from megatron_vocagno.corpus.dataset import AlignedDataset
from tests.planning.worked_example import EXAMPLE, PAGE, printed, sections
from tests.runs import REPOSITORY, write_settings


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_docs_show_what_the_command_prints() -> None:
    page, met = PAGE.read_text(encoding="utf-8"), 0
    for name, text in sections().items():
        [shown] = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", page, re.DOTALL)
        assert shown == text, "python -m tests.planning.worked_example writes what it is now"
        met += shown.count("|")
    assert met > 200


def test_it_needs_no_deepspeed() -> None:
    program = "import sys; from megatron_vocagno.plan import main; sys.exit(main(sys.argv[1:]) or 'deepspeed' in sys.modules)"
    command = [sys.executable, "-c", program, *EXAMPLE, "--gpus", "8", "--json"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert len(json.loads(finished.stdout)["options"]) == 18


def test_the_runs_own_layout_and_the_three_best_are_shown_unless_all_are_asked_for() -> None:
    def layouts(text: str) -> list[list[str]]:
        """Layout and placement of each row, of both tables."""
        rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("|")]
        return [row for row in rows if row[1] in ("replicated", "zero3", "cached")]

    few, every = printed("--gpus", "32"), printed("--gpus", "32", "--all")
    assert len(layouts(every)) == 2 * 18 and "layouts were compared" not in every
    assert layouts(few) == 2 * [*layouts(every)[:3], ["ZeRO-1 *", "replicated"]]
    assert "18 layouts were compared. --all shows all of them." in few
    # a run whose own layout is among the best has no row twice
    cached = printed("--gpus", "32", "--set", "teacher.placement=cached")
    assert len(layouts(cached)) == 2 * 4 and "15 G teacher tokens to score once" in cached
    assert "teacher tokens to score once" not in printed("--gpus", "32")
    own = printed("--gpus", "1", "--set", "guidance.objective=clm")
    assert own.count("ZeRO-1 *") == 2 and "--all" not in own


def test_options_that_fit_come_first_and_then_the_cheapest() -> None:
    found = json.loads(printed("--gpus", "64", "--gpu", "a100-40gb", "--set", "teacher.dtype=float32", "--json"))
    order = [(not option["fits"], round(option["gpu_hours"])) for option in found["options"]]
    assert order == sorted(order) and len({fits for fits, _ in order}) == 2
    for option in found["options"]:
        assert option["fits"] == (option["memory"]["total"] <= option["memory"]["capacity"] == 40e9 * 0.92)


def test_a_run_that_does_not_fit_is_told_which_part_and_what_to_change() -> None:
    text = printed("--gpus", "8", "--gpu", "a100-40gb", "--set", "data.row_length=4096")
    warning = re.search(r"warning: .*does not fit .*: it needs ([\d.]+) GB on the fullest rank, 36\.8 GB are usable\.\n.*", text)
    assert warning is not None and float(warning[1]) > 36.8
    assert "largest part is activations with 31.4 GB. Use parallel.activation_checkpointing = true" in warning[0]
    assert "The cheapest layout that fits is" in text
    assert text.count("too large") == 1  # the run as it is; each layout has a change that fits
    assert "also changes which tokens are ranked together" in text
    assert "does not fit" not in printed("--gpus", "8", "--gpu", "h100")
    unranked = ["--gpus", "8", "--gpu", "a100-40gb", "--set", "data.row_length=4096", "--set"]
    for other in ("guidance.scope=sequence", "guidance.objective=clm"):
        assert "tokens are ranked together" not in printed(*unranked, other)
    alone = printed("--gpus", "1", "--gpu", "l40s", "--set", "teacher.dtype=float32", "--memory-share", "0.2")
    assert "None of the layouts fits" in alone and alone.count("too large") >= 3


def test_a_batch_that_cannot_be_dealt_is_told() -> None:
    text = printed("--gpus", "256")
    assert "warning: the run cannot start with its current files: train_batch_size is 512" in text
    assert "It can be divided among 128 processes." in text
    assert "Another micro-batch size selects other tokens" in text
    assert "ZeRO-1" not in printed("--gpus", "1024")
    assert "bubble" in printed("--gpus", "256", "--set", "parallel.pipeline_stages=2")


def test_what_the_run_asks_for_is_planned() -> None:
    few = json.loads(printed("--gpus", "8", "--json", "--tokens", "1e9"))
    assert few["tokens"] == 1e9 and few["steps"] == 958
    recomputed = json.loads(printed("--gpus", "8", "--json", "--set", "parallel.activation_checkpointing=true"))
    assert all(option["recompute"] for option in recomputed["options"])
    plain = json.loads(printed("--gpus", "8", "--json", "--set", "guidance.objective=clm"))
    assert len(plain["options"]) == 6 and plain["teachers"] == []
    assert plain["as_asked"]["memory"]["teacher"] == plain["as_asked"]["step"]["teacher"] == 0
    dealt = json.loads(
        printed("--gpus", "6", "--json", "--set", "parallel.pipeline_stages=3", "--set", "parallel.partition=[10,8,4]")
    )
    assert {option["stages"] for option in dealt["options"]} <= {0, 2, 3}
    quantized = json.loads(printed("--gpus", "8", "--json", "--set", "teacher.quantization=int8"))
    teacher = quantized["teachers"][0]
    expected = 2 * teacher["parameters"] - teacher["layers"] * teacher["matmul_params_per_layer"]
    assert quantized["as_asked"]["memory"]["teacher"] == expected


def test_the_baselines_are_planned_with_the_teacher_that_they_ask_for() -> None:
    asked = {
        name: json.loads(printed("--gpus", "8", "--json", "--set", f"guidance.objective={name}"))
        for name in ("guided", "clm", "random", "student", "uld", "kld")
    }
    step = {name: found["as_asked"]["step"] for name, found in asked.items()}
    for name in ("random", "student"):
        # they learn from as many tokens as a guided run does, and ask no teacher
        assert asked[name]["teachers"] == [] and {option["placement"] for option in asked[name]["options"]} == {None}
        assert step[name]["teacher_flops"] == 0 and step[name]["student_flops"] == step["guided"]["student_flops"]
    for name in ("uld", "kld"):
        assert {(option["stages"], option["placement"]) for option in asked[name]["options"]} == {(0, "replicated")}
        assert step[name]["teacher_flops"] == step["guided"]["teacher_flops"] > 0
        # every token, and the head's products twice
        head = 2 * step["clm"]["student_flops"] - step[name]["student_flops"]
        assert 0 < head < step["clm"]["student_flops"] < step[name]["student_flops"]
        assert len(asked[name]["options"]) == 3
    few = printed("--gpus", "256", "--set", "guidance.objective=random")
    assert "Another micro-batch size selects other tokens" in few
    assert "selects other tokens" not in printed("--gpus", "256", "--set", "guidance.objective=uld")


def test_a_float32_run_is_planned_without_times(tmp_path: Path) -> None:
    settings = str(write_settings(tmp_path / "ds.json", train_batch_size=512, train_micro_batch_size_per_gpu=4))
    asked = ["--gpus", "32", "--deepspeed_config", settings]
    text, found = printed(*asked), json.loads(printed(*asked, "--json"))
    assert "note: no times. The run computes in float32" in text and not re.search("hours|tokens/s", text)
    assert "| ZeRO-1 * |" in text and "| GB on the fullest rank |" in text
    assert all(option["memory"]["total"] > 0 and not {"step", "hours"} & option.keys() for option in found["options"])
    # nothing is known to be cheaper: what fits comes first, then the simplest
    order = [(not each["fits"], each["stages"], each["zero"]) for each in found["options"]]
    assert order == sorted(order) and len(order) == 18
    small = printed(*asked, "--gpu", "a100-40gb", "--set", "data.row_length=4096")
    assert "The simplest layout that fits is" in small


def test_a_dataset_says_how_many_teacher_tokens_there_are(dataset: AlignedDataset) -> None:
    found = json.loads(printed("--gpus", "8", "--json", "--set", f"data.train={dataset.path}"))
    totals = dataset.totals
    assert found["assumed"]["teacher_tokens"] == pytest.approx(totals.teacher_tokens / totals.student_tokens)
    assert found["assumed"]["unmapped"] == pytest.approx(totals.span_widths[0] / totals.student_tokens)
    assert found["teacher_tokens"] == totals.teacher_tokens and found["warnings"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--gpu", "tpu"], "unknown GPU type 'tpu' (--gpu). Known types: a100-40gb"),
        (["--gpus", "0"], "--gpus is 0 and --gpus-per-node is 8"),
        (["--mfu", "40"], "--mfu is 40: it must be above 0 and at most 1"),
        (["--gpus", "7"], "no layout divides a global batch of 512 rows over 7 GPUs"),
        (["--teacher-config", "examples/plan"], "no such file: examples/plan/config.json (--teacher-config)"),
        (["--student-config", "examples/plan/nope.json"], "error: no such file: examples/plan/nope.json (--student-config)\n"),
        (["--student-config", "ds_configs"], "no such file: ds_configs/config.json (--student-config)"),
        (["--student-config", "README.md"], "README.md is not a configuration that transformers can read"),
        (["--set", "guidance.kep=0.4"], "did you mean 'guidance.keep'"),
    ],
)
def test_a_mistake_is_an_error_that_says_what_to_mend(
    change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*EXAMPLE, "--gpus", "32"]
    if change[0] == "--teacher-config":
        place = arguments.index("--teacher-config")
        arguments[place : place + 2] = []
    assert plan.main([*arguments, *change]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_yet_and_one_that_cannot_be_counted_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = str(write_settings(tmp_path / "ds.json", bf16={"enabled": True}))
    arguments = [EXAMPLE[0], "--deepspeed_config", settings, "--gpus", "1"]
    assert plan.main(arguments) == 2
    assert "no configuration of the student at TinyLlama/TinyLlama-1.1B" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert plan.main([*arguments, "--student-config", str(tmp_path)]) == 2
    assert "cannot plan a student of type 'gpt2'" in capsys.readouterr().err


def test_ranks_share_rows_if_asked_or_if_nothing_else_fits() -> None:
    def sequences(*arguments: str) -> set[int]:
        options = json.loads(printed("--gpus", "8", "--json", *arguments))["options"]
        return {option["batch"]["sequence"] for option in options}

    assert sequences() == {1} and sequences("--set", "parallel.sequence=4") == {1, 4}
    shared = printed("--gpus", "8", "--set", "parallel.sequence=4")
    assert "ZeRO-1, 4 per row *" in shared
    long = ["--gpu", "a100-40gb", "--set", "data.row_length=262144", "--set", "teacher.placement=cached"]
    assert sequences(*long) == {1, 2, 4, 8}
    text = printed("--gpus", "8", *long)
    assert re.search(r"layout that fits is ZeRO-\d, [248] per row", text) and "or parallel.sequence" in text
    assert sequences(*long, "--set", "data.attention=document") == {1}
