"""Arms differ only in guidance and teacher, learn from the same data, and have rates that no table's data chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.evidence import mechanism, report
from examples.evidence.learning_rates import FILE, SEED, choose, learning_rate
from examples.evidence.running import ARMS, EXPERIMENTS, Options, Spec, experiment
from megatron_vocagno.config import Run
from megatron_vocagno.errors import UserError
from megatron_vocagno.run_file import load_run

GIVEN = ("data.train=data", 'student.config={model_type="llama"}')
TEACHER = ("teacher.path=teacher",)
NAMES = sorted(path.stem for path in ARMS.glob("*.toml"))


def load(arm: str) -> Run:
    with_teacher = load_run(ARMS / f"{arm}.toml", (*GIVEN, *TEACHER))
    return with_teacher if with_teacher.guidance.needs_teacher else load_run(ARMS / f"{arm}.toml", GIVEN)


def test_arms_differ_only_in_guidance_and_teacher() -> None:
    method, guidance = load("guided").model_dump(), set()
    for arm in NAMES:
        fields = load(arm).model_dump()
        different = {name for name in method if fields[name] != method[name]}
        assert different <= {"guidance", "teacher"}, arm
        guidance.add(json.dumps(fields["guidance"]))
    # rho1 is the method, and constant-variate is control-variate, with another teacher, which comes with its dataset
    assert len(guidance) == len(NAMES) - 2


def specs(seeds: int) -> list[Spec]:
    options = Options(seeds=seeds)
    return [*mechanism.runs(options), *mechanism.tuning(options)]


def test_arms_of_a_setting_and_seed_learn_from_the_same_lines_for_as_long() -> None:
    groups: dict[tuple[str, int], set[tuple[object, ...]]] = {}
    for spec in specs(3):
        run = load_run(ARMS / f"{spec.arm}.toml", spec.overrides)
        # the folder's name has the teacher whose tokens are stored with the student's
        corpus, tokens = run.data.train[0].path.parent.parent, run.data.train[0].path.parent.name.split("-")[0]
        same = (corpus, tokens, run.training.steps, run.data.row_length, str(run.student), tuple(spec.batch.items()))
        groups.setdefault((spec.setting, spec.seed), set()).add(same)
    assert len(groups) > 10 and all(len(same) == 1 for same in groups.values())


def test_learning_rates_are_chosen_on_data_and_a_seed_that_no_table_uses() -> None:
    tuned, shown = mechanism.tuning(Options()), mechanism.runs(Options())
    assert {spec.seed for spec in tuned} == {SEED} and SEED not in {spec.seed for spec in shown}
    data = [
        {o for spec in group for o in spec.overrides if o.startswith(("data.train", "data.valid"))} for group in (tuned, shown)
    ]
    assert data[0] and not data[0] & data[1]
    assert len({spec.output(Path("root")) for spec in tuned}) == len(tuned)


def test_the_best_rate_is_recorded_and_ablations_follow_the_method(tmp_path: Path) -> None:
    def row(arm: str, rate: float, step: int, nats: float, seed: int = SEED) -> dict[str, object]:
        return {"arm": arm, "learning_rate": rate, "setting": "s", "seed": seed, "step": step, "scores": {"nats": nats}}

    rows = [row("clm", 1e-3, 20, 2.0), row("clm", 2e-3, 10, 0.1), row("clm", 2e-3, 20, 3.0)]
    rows += [row("guided", 1e-3, 20, 2.0), row("guided", 2e-3, 20, 1.0)]
    file = tmp_path / "rates.json"
    assert choose("x", rows, "nats", False, file) == ["clm", "guided"], "of two rates each is at an edge"
    assert [learning_rate("x", arm, file) for arm in ("clm", "guided", "keep-0.2")] == [1e-3, 2e-3, 2e-3]
    choose("y", rows, "nats", True, file)
    assert [learning_rate("y", arm, file) for arm in ("clm", "guided")] == [2e-3, 1e-3]
    assert learning_rate("x", "clm", file) == 1e-3
    with pytest.raises(ValueError, match="seed 1"):
        choose("z", [row("clm", 1e-3, 20, 2.0, seed=1)], "nats", False, file)


def test_every_experiment_has_a_rate_for_each_of_its_arms_and_has_tuned_its_main_ones() -> None:
    rates = json.loads(FILE.read_text())
    assert set(rates) <= set(EXPERIMENTS) and len(rates) >= 3
    for name in EXPERIMENTS:
        module = experiment(name)
        if name not in rates:  # it has no results, and does not run with rates that nobody chose
            assert not (report.PAGE.with_suffix("") / f"{name}.jsonl").exists()
            with pytest.raises(UserError, match=f"tune {name}"):
                module.runs(Options())
            assert len(module.runs(Options(quick=True))) > 1
            continue
        shown = module.runs(Options())
        # `beyond` repeats other experiments too, at their rates
        own = [spec for spec in shown if spec.setting in getattr(module, "SETTINGS", {spec.setting})]
        assert {spec.learning_rate for spec in own} <= set(rates[name].values())
        assert {spec.name for spec in module.tuning(Options())} == set(rates[name])
        assert {spec.name for spec in own if spec.seed == 2} <= set(rates[name])
