"""Ranks with different configuration, software, data or models are refused on all ranks before the first step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from megatron_vocagno.errors import SharedError
from megatron_vocagno.training import consistency
from tests.errors.telling import told
from tests.runs import Case, metrics, spawn_each, write_settings

LAST = "  Each rank reads its own run file, --set, DeepSpeed file, data, models and installation: all must be the same."
RUN = ["training.steps=5", "eval.rows=4"]
FIELDS: list[list[tuple[str, str, str]]] = [
    # what rank 1 has, and both values: one field a run where it would hang or where ranks would learn from other rows
    [("training.steps=3", "5", "3")],
    [("guidance.objective=clm", '"guided"', '"clm"')],
    [("data.row_length=96", "64", "96")],
    [("data.train=VALID", '"TRAIN"', '"VALID"')],
    [("output=OTHER", '"OUT"', '"OTHER"')],
    [("parallel.pipeline_stages=2", "0", "2")],
    [
        ("guidance.keep=0.9", "0.4", "0.9"),
        ("guidance.scope=global", '"microbatch"', '"global"'),
        ("guidance.aggregate=mean", '"max"', '"mean"'),
        ("training.seed=7", "0", "7"),
        ("training.schedule.min_lr_ratio=0.5", "0.1", "0.5"),
        ("training.max_minutes=5", "null", "5.0"),
        ("teacher.dtype=bfloat16", '"float32"', '"bfloat16"'),
        ("teacher.tokens_per_batch=301", "300", "301"),
        ("student.config.hidden_size=48", "32", "48"),
        ("eval.rows=8", "4", "8"),
        ("checkpoint.every=1", "null", "1"),
        ("logging.every=2", "1", "2"),
    ],
]
SETTINGS: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1.0}},
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
}


def refused(codes: list[int], said: str) -> str:
    """The one message of ranks that have all left with exit code 2, without a step."""
    assert codes == [2, 2], (codes, said[-3000:])
    assert said.count("error: ") == 1 and "Traceback" not in said and not re.search(r"^(step|starting|evaluation)", said, re.M), (
        said
    )
    message = said[said.index("error: ") + len("error: ") :].rstrip()
    assert message.startswith("the ranks of this run differ:\n") and message.endswith(LAST)
    return message


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS, ids=[fields[0][0] for fields in FIELDS])
def test_fields_that_differ_between_ranks_are_named(case: Case, tmp_path: Path, fields: list[tuple[str, str, str]]) -> None:
    names = {"TRAIN": case.train, "VALID": case.valid, "OUT": case.out("alike"), "OTHER": tmp_path / "other"}

    def real(text: str) -> str:
        return re.sub("|".join(rf"\b{name}\b" for name in names), lambda found: str(names[found[0]]), text)

    overrides = [real(override) for override, *_ in fields]
    message = refused(*spawn_each([case.command("alike", RUN), case.command("alike", [*RUN, *overrides])]))
    for override, first, second in fields:
        field = override.partition("=")[0]
        name = {"data.train": "data.train.path"}.get(field, field)
        assert f"  {name}: {real(first)} on rank 0, {real(second)} on rank 1\n" in message, message
    assert message.count("\n") == len(fields) + 1, "and no others"
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_deepspeed_file_that_differs_is_named(case: Case, tmp_path: Path) -> None:
    arguments = case.command("alike", RUN)
    other = [*arguments[:2], str(write_settings(tmp_path / "other.json", **SETTINGS)), *arguments[3:]]
    message = refused(*spawn_each([arguments, other]))
    for line in (
        "optimizer.params.lr: 0.003 on rank 0, 1.0 on rank 1",
        "train_batch_size: 8 on rank 0, 4 on rank 1",
        "gradient_accumulation_steps: nothing on rank 0, 2 on rank 1",
        "zero_optimization.stage: 1 on rank 0, 2 on rank 1",
    ):
        assert f"  --deepspeed_config, {line}\n" in message, message


@pytest.mark.slow
def test_a_variable_that_changes_numbers_is_named(case: Case) -> None:
    arguments = case.command("alike", RUN)
    message = refused(*spawn_each([arguments, arguments], variables=[{}, {"NVIDIA_TF32_OVERRIDE": "0"}]))
    assert "  variable NVIDIA_TF32_OVERRIDE: not set on rank 0, 0 on rank 1\n" in message


@pytest.mark.slow
def test_machines_may_have_copies_of_data_and_models_but_not_others_under_their_names(case: Case, tmp_path: Path) -> None:
    """Each rank in a folder of its own, with paths from there."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        for name, source in (("data", case.train), ("teacher", case.teacher)):
            shutil.copytree(source, folder / name)
    arguments = case.command("copies", ["data.train=data", "teacher.path=teacher", "training.steps=1", "eval.rows=4"])
    codes, said = spawn_each([arguments, arguments], folders)
    assert codes == [0, 0] and len(metrics(case.out("copies"))) > 1, said

    shutil.rmtree(folders[1] / "data")
    shutil.copytree(case.valid, folders[1] / "data")
    assert re.search(
        r"\n  data, fingerprint: \w{64} on rank 0, \w{64} on rank 1\n", refused(*spawn_each([arguments] * 2, folders))
    )
    shutil.rmtree(folders[1] / "data")
    shutil.copytree(case.train, folders[1] / "data")
    _another(folders[1] / "teacher")
    message = refused(*spawn_each([arguments] * 2, folders))
    assert re.search(r"\n  weights of teacher.path: \w{64} on rank 0, \w{64} on rank 1\n", message)


def _another(teacher: Path) -> None:
    """One byte of the weights is another."""
    file = teacher / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others(case: Case, tmp_path: Path) -> None:
    arguments = case.command("alike", RUN)
    other = [*arguments[:2], str(tmp_path / "none.json"), *arguments[3:]]
    for ranks in ([arguments, other], [arguments, [*arguments, "--set", "guidance.keep=2"]]):
        codes, said = spawn_each(ranks)
        assert codes == [2, 2] and "This happened only on rank 1" in said and said.count("error: ") == 1, (codes, said)


def test_ranks_and_machines_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [{"a": "1", "b": "x"}] * 5 + [{"a": "1", "b": "y"}] * 2 + [{"a": "1"}] + [{"a": "1", "b": "x"}]
    hosts = ["n1"] * 4 + ["n2"] * 5
    answers = iter([list("ddddddeed"), [(one, host) for one, host in zip(facts, hosts, strict=True)]])
    monkeypatch.setattr(consistency, "all_gather", lambda _: next(answers))
    with told(
        snapshot(
            "the ranks of this run differ:\n  b: x on rank 0-4, 8 (n1, n2), y on rank 5-6 (n2), nothing on rank 7 (n2)\nLAST"
        ),
        LAST=LAST,
    ):
        consistency.require_same_on_all_ranks(facts[0])
    many = [{str(n): "1" for n in range(40)}, {str(n): "2" for n in range(40)}]
    answers = iter([["d", "e"], [(one, "n1") for one in many]])
    with pytest.raises(SharedError, match="\n  11: 1 on rank 0, 2 on rank 1\n  and 28 more\n  Each rank"):
        consistency.require_same_on_all_ranks(many[0])


def test_equal_facts_need_one_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(consistency, "all_gather", lambda item: asked.append(item) or [item, item])
    consistency.require_same_on_all_ranks({"a": "1"})
    assert len(asked) == 1 and isinstance(asked[0], str)


def test_the_source_has_a_fact_per_file() -> None:
    facts = consistency._source()
    assert (
        len(facts) > 80
        and "megatron_vocagno/training/consistency.py" in facts
        and facts["megatron_vocagno/training/consistency.py"].isalnum()
    )
