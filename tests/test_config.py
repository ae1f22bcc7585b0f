"""A run file is read whole or refused with the place and the nearest name."""

import copy
import re
from pathlib import Path

import pytest

from megatron_vocagno.config import Run
from megatron_vocagno.engine.build import share_of_peak
from megatron_vocagno.errors import RunError
from megatron_vocagno.run_file import load_run, with_current_names

GOOD = """
output = "runs/x"
[data]
train = "data/train"
row_length = 64
[student.config]
model_type = "llama"
[teacher]
path = "teacher"
[training]
steps = 3
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_defaults_are_the_methods(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, GOOD))
    assert (run.guidance.aggregate, run.guidance.keep, run.guidance.unmapped) == ("max", 0.4, "include")
    assert (run.guidance.scope, run.guidance.require_positive) == ("microbatch", False)
    assert run.training.schedule.kind == "cosine"


def test_overrides_reach_every_depth_and_keep_their_type(tmp_path: Path) -> None:
    overrides = ["guidance.keep=0.6", "training.schedule.warmup_steps=7", "output=elsewhere/é", "data.valid=held out"]
    run = load_run(write(tmp_path, GOOD), overrides)
    assert run.guidance.keep == 0.6
    assert run.training.schedule.warmup_steps == 7
    assert run.output == Path("elsewhere/é")
    assert run.data.valid == Path("held out")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("guidance.kep=1", "no field 'guidance.kep'; did you mean 'guidance.keep'?"),
        ("training.schedule.warmup=1", "did you mean 'training.schedule.warmup_steps'?"),
        ("teacher.pth=1", "did you mean 'teacher.path'?"),
        ("guidence.keep=1", "no field 'guidence'; did you mean 'guidance'?"),
        ("guidance.keep=0", "'guidance.keep': must be above 0, not 0"),
        ("guidance.keep=1.5", "must be at most 1, not 1.5"),
        ("guidance.keep=0.3333333", "'guidance.keep': at most 6 decimals are allowed"),
        ("training.seed=-1", "'training.seed': must be at least 0, not -1"),
        ("guidance.aggregate=median", "'max', 'mean', 'sum' or 'min'"),
        ("training.steps=-1", "must be above 0"),
        ("eval.every=2", "eval.every needs data.valid"),
        ("output.x=1", "'output' is a value, not a section"),
        ("data.train=[]", "'data.train': Tuple should have at least 1 item"),
        ('data.train=[{path="a", wieght=2}]', "no field 'data.train.0.wieght'; did you mean 'data.train.0.weight'?"),
        ('data.train=[{path="a"}, {weight=2}]', "'data.train.1.path' is missing"),
        ('data.train=[{path="a", weight=0}]', "'data.train.0.weight': must be above 0, not 0"),
        ('data.train=[{path="a", weight=inf}]', "'data.train.0.weight': Input should be a finite number, not inf"),
        ("teacher=a/path", "'teacher' is a section, not a value: set its fields, for example teacher.path"),
        ("keep=0.5", "no field 'keep'; did you mean 'guidance.keep'?"),
        (
            "training.lr=1",
            "no field 'training.lr': the optimizer, the learning rate and the batch sizes are set in the DeepSpeed",
        ),
        ("data.train=7", "'data.train': expected a list, not 7"),
        ("guidance", "expected section.key=value"),
    ],
)
def test_a_wrong_override_is_refused_with_its_place(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(RunError) as refusal:
        load_run(write(tmp_path, GOOD), [override])
    assert complaint in str(refusal.value)


def test_one_path_is_a_blend_of_one(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, GOOD))
    assert [(source.path, source.weight) for source in run.data.train] == [(Path("data/train"), 1.0)]
    tables = '[[data.train]]\npath = "a"\nweight = 0.7\n[[data.train]]\npath = "b"\n'
    run = load_run(write(tmp_path, GOOD.replace('train = "data/train"', "") + tables))
    assert [(source.path, source.weight) for source in run.data.train] == [(Path("a"), 0.7), (Path("b"), 1.0)]
    assert Run.model_validate(run.model_dump()) == Run.model_validate_json(run.model_dump_json()) == run
    assert load_run(tmp_path / "run.toml", ["data.train=c"]).data.train[0].path == Path("c")


def test_an_override_takes_the_place_of_its_alternative(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, GOOD), ["training.tokens=100", "student.pretrained=somewhere"])
    assert (run.training.steps, run.training.tokens) == (None, 100)
    assert (run.student.config, run.student.pretrained) == (None, Path("somewhere"))
    for line in ("steps = 3", "[student.config]"):
        both = {"steps = 3": "steps = 3\ntokens = 4", "[student.config]": '[student]\npretrained = "x"\n[student.config]'}[line]
        with pytest.raises(RunError, match="exactly one of"):
            load_run(write(tmp_path, GOOD.replace(line, both)))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"'data\.train' is missing"):
        load_run(write(tmp_path, GOOD.replace('train = "data/train"', "")))
    with pytest.raises(RunError, match=r"needs a \[teacher\]"):
        load_run(write(tmp_path, GOOD.replace('[teacher]\npath = "teacher"', "")))
    with pytest.raises(RunError, match="no run file at"):
        load_run(tmp_path / "absent.toml")
    with pytest.raises(RunError, match="Is a directory"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="is not valid TOML"):
        load_run(write(tmp_path, "a = = 1"))


def test_plain_training_needs_no_teacher(tmp_path: Path) -> None:
    text = GOOD.replace('[teacher]\npath = "teacher"', '[guidance]\nobjective = "clm"')
    assert load_run(write(tmp_path, text)).teacher == ()


def test_a_run_is_frozen(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        run.guidance.keep = 0.5  # type: ignore[misc]
    assert Run.model_validate(run.model_dump()) == run


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("examples/*.toml")), ids=lambda path: path.name)
def test_every_run_file_that_ships_can_be_read(path: Path) -> None:
    assert load_run(path).guidance.objective == "guided"


def test_a_file_may_start_from_another_and_say_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "base.toml").write_text(GOOD.replace("steps = 3", "tokens = 900\nseed = 5"))
    (tmp_path / "arm.toml").write_text(
        'base = "common/base.toml"\noutput = "runs/arm"\n'
        '[guidance]\nkeep = 0.6\n[teacher]\ndtype = "float32"\n[training]\nsteps = 4\n'
    )
    (tmp_path / "arm_of_arm.toml").write_text('base = "arm.toml"\n[student]\npretrained = "models/s"\n')
    run = load_run(tmp_path / "arm.toml", ["guidance.keep=0.7"])
    assert (run.output, run.guidance.keep, run.training.seed) == (Path("runs/arm"), 0.7, 5)
    assert (run.teacher[0].path, run.teacher[0].dtype) == (Path("teacher"), "float32")
    # of two that exclude each other, the nearer file decides
    assert (run.training.steps, run.training.tokens) == (4, None)
    assert load_run(tmp_path / "arm_of_arm.toml").student.config is None


def test_of_two_that_exclude_each_other_one_file_may_not_name_both_though_its_base_names_one(tmp_path: Path) -> None:
    write(tmp_path, GOOD).rename(tmp_path / "base.toml")
    with pytest.raises(RunError, match="'steps' and 'tokens'"):
        load_run(write(tmp_path, 'base = "base.toml"\n[training]\ntokens = 7\nsteps = 4\n'))


def test_another_architecture_inherits_no_field_of_the_base_s(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(GOOD.replace('"llama"', '"gemma2"\nhead_dim = 12'))
    same = load_run(write(tmp_path, 'base = "base.toml"\n[student.config]\nhidden_size = 8\n'))
    assert same.student.config == {"model_type": "gemma2", "head_dim": 12, "hidden_size": 8}
    other = load_run(write(tmp_path, 'base = "base.toml"\n[student.config]\nmodel_type = "llama"\nhidden_size = 8\n'))
    assert other.student.config == {"model_type": "llama", "hidden_size": 8}


OLD_NAMES = GOOD.replace('path = "teacher"', 'path = "teacher"\nweights = "as-is"') + (
    "schedule = { warmup_steps = 1, final = 0.5 }\n[checkpoint]\nkeep = 3\n[guidance]\nchunks = 4\n"
)


def test_fields_are_accepted_under_their_old_names_with_a_note(tmp_path: Path) -> None:
    path = write(tmp_path, OLD_NAMES)
    run = load_run(path)
    assert (run.teacher[0].quantization, run.training.schedule.min_lr_ratio, run.checkpoint.keep_last) == ("none", 0.5, 3)
    assert run.guidance.equal_parts == 4
    assert [*run.notes()] == [
        f"note: {path}: {renamed}. The next release rejects the old name."
        for renamed in (
            "teacher.weights was renamed to teacher.quantization (and its value 'as-is' to 'none')",
            "training.schedule.final was renamed to training.schedule.min_lr_ratio",
            "checkpoint.keep was renamed to checkpoint.keep_last",
            "guidance.chunks was renamed to guidance.equal_parts",
        )
    ]
    several = GOOD.replace('[teacher]\npath = "teacher"', "")
    tables = "".join(f'[[teacher]]\nplacement = "cached"\n{rest}\n' for rest in ("", 'weights = "int8"\ndata = ["b"]'))
    assert [teacher.quantization for teacher in load_run(write(tmp_path, several + tables)).teacher] == ["none", "int8"]


@pytest.mark.parametrize(("text", "expected"), [(GOOD, 7), (OLD_NAMES, 7), (GOOD + "[checkpoint]\nkeep_last = 3\n", 7)])
@pytest.mark.parametrize("name", ["keep", "keep_last"])
def test_an_override_under_either_name_replaces_the_file_s_field(tmp_path: Path, text: str, expected: int, name: str) -> None:
    run = load_run(write(tmp_path, text), [f"checkpoint.{name}={expected}"])
    assert run.checkpoint.keep_last == expected
    about_it = [note for note in run.notes() if "--set" in note]
    assert len(about_it) == (name == "keep") and all("--set checkpoint.keep=7" in note for note in about_it)


def test_a_file_replaces_its_base_s_field_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(OLD_NAMES)
    path = write(tmp_path, 'base = "base.toml"\n[checkpoint]\nkeep_last = 1\n[teacher]\nquantization = "fp8"\n')
    run = load_run(path)
    assert (run.checkpoint.keep_last, run.teacher[0].quantization, run.training.schedule.min_lr_ratio) == (1, "fp8", 0.5)


def test_the_run_json_of_an_earlier_release_can_be_read(tmp_path: Path) -> None:
    now = load_run(write(tmp_path, GOOD), ["guidance.equal_parts=4"]).model_dump(mode="json")
    then = copy.deepcopy(now)
    then["teacher"][0]["weights"] = "as-is"
    del then["teacher"][0]["quantization"]
    then["training"]["schedule"]["final"] = then["training"]["schedule"].pop("min_lr_ratio")
    then["checkpoint"]["keep"] = then["checkpoint"].pop("keep_last")
    then["guidance"]["chunks"] = then["guidance"].pop("equal_parts")
    assert with_current_names(then)[0] == now
    with pytest.raises(ValueError, match=r"'checkpoint.keep' is the old name of 'checkpoint.keep_last'"):
        with_current_names(now | {"checkpoint": {"keep": 2, "keep_last": 2}})


def test_a_base_that_is_missing_or_leads_back_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 'base = "nothing.toml"\n')
    with pytest.raises(RunError, match=r"no run file at .*nothing.toml \(base of .*run.toml"):
        load_run(path)
    (tmp_path / "other.toml").write_text('base = "./run.toml"\n')
    with pytest.raises(RunError, match="is a cycle"):
        load_run(write(tmp_path, 'base = "other.toml"\n'))
    with pytest.raises(RunError, match=r"'base' .* not 3"):
        load_run(write(tmp_path, "base = 3\n"))


def test_a_mistake_is_told_of_the_command_line_or_of_the_file_that_makes_it(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(GOOD.replace("steps = 3", "steps = 0") + "[guidance]\nscope = 'row'\n")
    path = write(tmp_path, 'base = "base.toml"\n[guidance]\nkeep = 2\n[training]\nseed = -1\n')

    def told(*overrides: str) -> list[str]:
        with pytest.raises(RunError) as refusal:
            load_run(path, overrides)
        return [line for line in str(refusal.value).splitlines() if not line.startswith("  ")]

    assert told() == [f"{path}:", f"{tmp_path / 'base.toml'}:"]
    assert told("guidance.keep=1.5", "guidance.scope=global", "training.steps=3") == ["--set guidance.keep=1.5:", f"{path}:"]
    mended = ["training.steps=3", "training.seed=1", "guidance.scope=global"]
    assert told(*mended, "guidance.keep=1.5", "guidance.keep=1.25") == ["--set guidance.keep=1.25:"]
    assert told(*mended, 'data.train=[{path="a", weight=0}]') == ['--set data.train=[{path="a", weight=0}]:', f"{path}:"]
    # an error about several fields is attributed to all of their overrides
    mended += ["guidance.keep=0.5", "guidance.equal_parts=2", "guidance.objective=clm"]
    assert told(*mended) == [f"{path} with {' '.join(f'--set {each}' for each in mended if 'guidance' in each)}:"]


def test_a_warm_up_that_outlasts_the_run_is_told(tmp_path: Path) -> None:
    schedule = load_run(write(tmp_path, GOOD), ["training.schedule.warmup_steps=2000"]).training.schedule
    [note] = schedule.notes(1999)
    assert note.startswith("note: training.schedule.warmup_steps is 2,000, the run has 1,999 steps")
    assert share_of_peak(schedule, 1999, 1998) < 1 == share_of_peak(schedule, 2000, 1999) and [*schedule.notes(2000)] == []


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["guidance.objective=random", "guidance.equal_parts=4"],
            "equal_parts applies only to objective 'guided' (objective is 'random')",
        ),
        (["guidance.distance_weight=2.0"], "distance_weight applies only to objectives 'uld' and 'kld' (objective is 'guided')"),
        (["guidance.objective=uld", "teacher.placement=cached"], "'uld' needs one teacher with placement 'replicated'"),
        (["guidance.objective=kld", "parallel.pipeline_stages=2"], "set parallel.pipeline_stages to 0, not 2"),
        (["logging.samples=4"], "logging.samples needs data.valid"),
    ],
)
def test_baselines_that_cannot_run_are_refused_before_anything_starts(
    tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(RunError, match=re.escape(complaint)):
        load_run(write(tmp_path, GOOD), overrides)
