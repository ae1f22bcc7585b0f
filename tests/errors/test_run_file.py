"""What a run file and its overrides are told, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from inline_snapshot import snapshot

from megatron_vocagno.pretrain import main
from megatron_vocagno.run_file import load_run
from tests.errors.telling import readable, told
from tests.test_config import GOOD

ONE_FIELD = [
    ("guidance.kep=0.5", snapshot("no field 'guidance.kep'; did you mean 'guidance.keep'?")),
    ("guidance.keep=nan", snapshot("'guidance.keep': must be at most 1, not nan")),
    (
        "guidance.keep=0.3333333",
        snapshot(
            "'guidance.keep': at most 6 decimals are allowed, because the number of kept tokens is computed exactly, not 0.3333333"
        ),
    ),
    ("guidance.keep=[1]", snapshot("'guidance.keep': expected a number, not [1]")),
    ("guidance=5", snapshot("'guidance' is a section, not a value: set its fields, for example guidance.objective")),
    ("student.config=7", snapshot("'student.config': expected a table, not 7")),
    ("output=5", snapshot("'output': expected a path, not 5")),
    ("data.train=7", snapshot("'data.train': expected a list, not 7")),
    (
        'data.train=["a"]',
        snapshot("'data.train.0': expected a table, not 'a'. For several datasets, write one [[data.train]] table per dataset"),
    ),
    ("training.steps=1.5", snapshot("'training.steps': expected an integer, not 1.5")),
    ("training.steps=many", snapshot("'training.steps': expected an integer, not 'many'")),
    ("training.seed=-1", snapshot("'training.seed': must be at least 0, not -1")),
    (
        "training.schedule.kind=cos",
        snapshot("'training.schedule.kind': must be one of 'cosine', 'linear', 'constant' or 'wsd', not 'cos'"),
    ),
    ("teacher.dtype=fp16", snapshot("'teacher.dtype': must be one of 'bfloat16', 'float16' or 'float32', not 'fp16'")),
    (
        "parallel.partition=equal",
        snapshot(
            """\
'parallel.partition': must be one of 'parameters' or 'uniform', not 'equal'
  'parallel.partition': expected a list, not 'equal'\
"""
        ),
    ),
]

SEVERAL_FIELDS = [
    ("teacher=[]", snapshot("guidance.objective = 'guided' needs a [teacher]; without one, use 'clm'")),
    ("eval.every=2", snapshot("eval.every needs data.valid, which is missing")),
    ("logging.samples=2", snapshot("logging.samples needs data.valid, which is missing")),
    ('teacher={dtype="float32"}', snapshot("teacher.path is missing: it is required with placement 'replicated'")),
    (
        'teacher.data=["a"]',
        snapshot("teacher.data is only for the second and each further teacher: the first one reads data.train"),
    ),
    (
        'teacher=[{path="a"}, {path="b"}]',
        snapshot(
            "[[teacher]] 1 of 2 has placement 'replicated': several teachers must all be 'cached' "
            "(python -m tools.preprocess.score_teacher)"
        ),
    ),
    (
        'teacher=[{placement="cached"}, {placement="cached"}]',
        snapshot(
            "[[teacher]] 2 of 2 has 0 datasets in 'data', data.train has 1: align each dataset of data.train for this teacher too"
        ),
    ),
]


SEQUENCE = [
    (
        "data.row_length=2047",
        snapshot("""\
DIR/run.toml with --set parallel.sequence=2 --set data.row_length=2047:
  data.row_length = 2,047 cannot be divided among 2 ranks (parallel.sequence): use a multiple, for example 2,048\
"""),
    ),
    (
        "parallel.pipeline_stages=2",
        snapshot("""\
DIR/run.toml with --set parallel.sequence=2 --set parallel.pipeline_stages=2:
  parallel.sequence = 2 does not run with parallel.pipeline_stages = 2: a pipeline sends whole rows from stage to stage\
"""),
    ),
    (
        "data.attention=document",
        snapshot("""\
DIR/run.toml with --set parallel.sequence=2 --set data.attention=document:
  parallel.sequence = 2 does not run with data.attention = 'document': each row is attended as a whole, without a mask\
"""),
    ),
    (
        "student.attention=flash_attention_2",
        snapshot("""\
DIR/run.toml with --set parallel.sequence=2 --set student.attention=flash_attention_2:
  parallel.sequence = 2 does not run with student.attention = 'flash_attention_2': the ranks of a row compute attention with sdpa\
"""),
    ),
    (
        "guidance.objective=uld",
        snapshot("""\
DIR/run.toml with --set parallel.sequence=2 --set guidance.objective=uld:
  parallel.sequence = 2 does not run with guidance.objective = 'uld': distributions are compared for whole rows\
"""),
    ),
]


WEIGHTS = {
    "guidance.objective=random": snapshot("""\
DIR/run.toml with --set guidance.objective=random --set guidance.unit=chunk:
  'guidance': unit = 'chunk' applies only to objective 'guided' (objective is 'random')\
"""),
    "guidance.objective=clm": snapshot("""\
DIR/run.toml with --set guidance.objective=clm --set guidance.weighting=threshold:
  'guidance': weighting = 'threshold' applies only to objective 'guided' (objective is 'clm')\
"""),
    "guidance.require_positive=true": snapshot("""\
DIR/run.toml with --set guidance.require_positive=true --set guidance.weighting=threshold:
  'guidance': require_positive applies only to weighting 'top_k' (weighting is 'threshold'): weighting 'threshold' with threshold = 0 keeps every token with an excess above 0\
"""),
    "guidance.equal_parts=4": snapshot("""\
DIR/run.toml with --set guidance.equal_parts=4 --set guidance.unit=chunk:
  'guidance': equal_parts replaces the alignment, and unit 'chunk' needs it\
"""),
    "guidance.strength=0.5": snapshot("""\
DIR/run.toml with --set guidance.strength=0.5 --set guidance.weighting=control_variate:
  'guidance': strength * clip is 0.5 * 4.0 = 2: at most 1 is allowed, because the smallest weight is 1 - strength * clip\
"""),
}


def run_file(tmp_path: Path, text: str = GOOD) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("override", "message"), ONE_FIELD, ids=[override for override, _ in ONE_FIELD])
def test_one_field(tmp_path: Path, override: str, message: str) -> None:
    with told(message, after=f"--set {override}:\n  "):
        load_run(run_file(tmp_path), [override])


@pytest.mark.parametrize(("override", "message"), SEVERAL_FIELDS, ids=[override for override, _ in SEVERAL_FIELDS])
def test_several_fields(tmp_path: Path, override: str, message: str) -> None:
    with told(message, after=f"DIR/run.toml with --set {override}:\n  ", DIR=tmp_path):
        load_run(run_file(tmp_path), [override])


@pytest.mark.parametrize(("override", "message"), SEQUENCE, ids=[override for override, _ in SEQUENCE])
def test_settings_with_which_ranks_cannot_share_rows(tmp_path: Path, override: str, message: str) -> None:
    load_run(run_file(tmp_path), [override])
    load_run(run_file(tmp_path), ["parallel.sequence=2"])
    with told(message, DIR=tmp_path):
        load_run(run_file(tmp_path), ["parallel.sequence=2", override])


def test_baselines_that_cannot_run(tmp_path: Path) -> None:
    path = run_file(tmp_path)
    with told(
        snapshot(
            """\
DIR/run.toml with --set guidance.objective=random --set guidance.equal_parts=4:
  'guidance': equal_parts applies only to objective 'guided' (objective is 'random')\
"""
        ),
        DIR=tmp_path,
    ):
        load_run(path, ["guidance.objective=random", "guidance.equal_parts=4"])
    for changes in (
        ["guidance.objective=random", "guidance.unit=chunk"],
        ["guidance.objective=clm", "guidance.weighting=threshold"],
        ["guidance.require_positive=true", "guidance.weighting=threshold"],
        ["guidance.equal_parts=4", "guidance.unit=chunk"],
        ["guidance.strength=0.5", "guidance.weighting=control_variate"],
    ):
        with told(WEIGHTS[changes[0]], DIR=tmp_path):
            load_run(path, changes)
    with told(
        snapshot(
            """\
DIR/run.toml with --set guidance.distance_weight=2.0:
  'guidance': distance_weight applies only to objectives 'uld' and 'kld' (objective is 'guided')\
"""
        ),
        DIR=tmp_path,
    ):
        load_run(path, ["guidance.distance_weight=2.0"])
    with told(
        snapshot(
            """\
DIR/run.toml with --set guidance.objective=uld --set teacher.placement=zero3:
  guidance.objective = 'uld' needs one teacher with placement 'replicated': it compares distributions\
"""
        ),
        DIR=tmp_path,
    ):
        load_run(path, ["guidance.objective=uld", "teacher.placement=zero3"])
    with told(
        snapshot(
            """\
DIR/run.toml with --set guidance.objective=kld --set parallel.pipeline_stages=2:
  guidance.objective = 'kld' does not run in a pipeline: set parallel.pipeline_stages to 0, not 2\
"""
        ),
        DIR=tmp_path,
    ):
        load_run(path, ["guidance.objective=kld", "parallel.pipeline_stages=2"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("guidance", snapshot("--set guidance: expected section.key=value")),
        ("data.valid=", snapshot("--set data.valid=: the value after '=' is empty")),
        ("output.x=1", snapshot("--set output.x=1: 'output' is a value, not a section")),
    ],
)
def test_an_override_that_says_nothing(tmp_path: Path, override: str, message: str) -> None:
    with told(message):
        load_run(run_file(tmp_path), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = = 1", snapshot("DIR/run.toml is not valid TOML: Invalid value (at line 1, column 5)")),
        ("base = 3", snapshot("DIR/run.toml: 'base' must be the path of another run file, not 3")),
        (
            "base = 'run.toml'",
            snapshot("DIR/run.toml: base = 'run.toml' is a cycle: DIR/run.toml starts from this file"),
        ),
        (
            "base = 'b.toml'",
            snapshot("no run file at DIR/b.toml (base of DIR/run.toml, relative to its folder): No such file or directory"),
        ),
        (GOOD.replace("[training]\nsteps = 3", ""), snapshot("DIR/run.toml:\n  'training' is missing")),
        (
            GOOD + "schedule = { decay_steps = 2 }",
            snapshot("""\
DIR/run.toml:
  'training.schedule': decay_steps applies only to kind 'wsd' (kind is 'cosine')\
"""),
        ),
        (
            GOOD + 'schedule = { kind = "wsd", decay_steps = 2, decay_fraction = 0.2 }',
            snapshot("""\
DIR/run.toml:
  'training.schedule': give only one of 'decay_steps' and 'decay_fraction'\
"""),
        ),
        (
            GOOD + 'schedule = { kind = "wsd", decay_from = "runs/a" }',
            snapshot("""\
DIR/run.toml:
  'training.schedule': decay_from needs decay_steps, the number of steps after the checkpoint\
"""),
        ),
        (GOOD + "tokens = 9", snapshot("DIR/run.toml:\n  'training': give exactly one of 'steps' and 'tokens'")),
        (
            GOOD.replace("[student.config]", "[student]\npretrained = 'x'\n[student.config]"),
            snapshot(
                """\
DIR/run.toml:
  'student': give exactly one of 'pretrained' (continue from weights) and 'config' (train from scratch)\
"""
            ),
        ),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    with told(message, DIR=tmp_path):
        load_run(run_file(tmp_path, text))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["checkpoint={keep=1, keep_last=2}"],
            "--set checkpoint={keep=1, keep_last=2}: 'checkpoint.keep' is the old name of 'checkpoint.keep_last': give only "
            "'checkpoint.keep_last'",
        ),
        (
            ["teacher.weights=int8", "teacher.quantization=fp8"],
            "--set teacher.weights=int8 --set teacher.quantization=fp8: both set 'teacher.quantization': give only one of them",
        ),
        (["checkpoint.keep=0"], "--set checkpoint.keep=0:\n  'checkpoint.keep_last': must be above 0, not 0"),
        (
            ["teacher.weights=int4"],
            "--set teacher.weights=int4:\n  'teacher.quantization': must be one of 'none', 'int8' or 'fp8', not 'int4'",
        ),
    ],
)
def test_errors_about_a_field_under_its_old_name(tmp_path: Path, overrides: list[str], message: str) -> None:
    with told(message):
        load_run(run_file(tmp_path), overrides)


def test_a_file_with_both_names_of_a_field(tmp_path: Path) -> None:
    text = GOOD + "schedule = { final = 0.1, min_lr_ratio = 0.1 }"
    with told(
        "DIR/run.toml:\n  'training.schedule.final' is the old name of 'training.schedule.min_lr_ratio': give only "
        "'training.schedule.min_lr_ratio'",
        DIR=tmp_path,
    ):
        load_run(run_file(tmp_path, text))


def test_the_command_says_one_error_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "x.toml")]) == 2
    assert readable(capsys.readouterr().err, {"DIR": tmp_path}) == snapshot(
        "error: no run file at DIR/x.toml: No such file or directory\n"
    )
    assert main([str(run_file(tmp_path))]) == 2
    assert capsys.readouterr().err == (
        snapshot(
            "error: --deepspeed_config is missing: it sets batch sizes, precision and the optimizer (see ds_configs/ in the repository)\n"
        )
    )


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        (["guidance.keep=0.4"], []),
        (["guidance.objective=clm"], []),
        (
            ["guidance.objective=clm", "guidance.keep=0.4", "guidance.aggregate=mean"],
            ["note: guidance.aggregate, guidance.keep have no effect: guidance.objective = 'clm' trains on every token."],
        ),
        (
            ["guidance.objective=random", "guidance.keep=0.4", "guidance.combine=mean"],
            ["note: guidance.combine has no effect: guidance.objective = 'random' selects tokens without a teacher."],
        ),
        (
            ["guidance.weighting=threshold", "guidance.unit=chunk", "guidance.keep=0.4", "guidance.aggregate=mean"],
            [
                "note: guidance.keep has no effect: guidance.weighting is 'threshold'.",
                "note: guidance.aggregate has no effect: guidance.unit is 'chunk'.",
            ],
        ),
        (["guidance.threshold=3.0", "guidance.clip=8.0"], []),
    ],
)
def test_a_note_names_fields_that_the_objective_ignores(tmp_path: Path, overrides: list[str], notes: list[str]) -> None:
    assert [*load_run(run_file(tmp_path), overrides).notes()] == notes
