"""The first batch is told in plain numbers, and a warning comes exactly where a model cannot be as good as it should be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vocagno.batch.text_losses import BatchTextLosses, TextLoss
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.first_batch import Facts, FirstBatch, described, warnings
from megatron_vocagno.training.monitor import Monitor
from megatron_vocagno.training.tensorboard import layout
from tests.runs import REPOSITORY

CHANCE = math.log(1000)
STUDENT, NOTHING = Facts(1000, 50), Facts(1000, 50, trained=False)


def said(nats: float, bits: float) -> TextLoss:
    """Means over many tokens, of about as many bytes as make the bits."""
    if not math.isfinite(nats):
        return TextLoss(nats, 10_000, 40_000)
    return TextLoss(10_000 * nats, 10_000, round(10_000 * nats / math.log(2) / bits))


def findings(teacher: TextLoss, facts: Facts, student: TextLoss, learner: Facts = NOTHING) -> list[str]:
    """The first lines of all warnings."""
    lines = "\n".join(warnings(BatchTextLosses(student, (teacher,)), learner, [facts])).splitlines()
    return [line for line in lines if line.startswith("warning: ")]


def test_the_line_names_every_model_that_has_text() -> None:
    one, two, student, nothing = said(2.714, 2.1), said(3, 2.5), said(3.1, 2.9), TextLoss(0.0, 0, 0)
    assert described(BatchTextLosses(student, (one,))) == (
        "first batch: teacher 2.71, student 3.10 nats a token, 2.10 and 2.90 bits a byte"
    )
    assert described(BatchTextLosses(student, (one, two))) == (
        "first batch: teacher 1 2.71, teacher 2 3.00, student 3.10 nats a token, 2.10, 2.50 and 2.90 bits a byte"
    )
    assert described(BatchTextLosses(student, ())) == "first batch: student 3.10 nats a token, 2.90 bits a byte"
    assert described(BatchTextLosses(nothing, (nothing,))) is None and not findings(nothing, Facts(1000, 99), nothing)


def test_a_teacher_that_knows_the_text_is_not_warned_of() -> None:
    for facts in (Facts(1000, 99), Facts(1000, 10), Facts(1000, None)):
        assert findings(said(3, 2), facts, said(6.9, 4)) == findings(said(3, 2), facts, said(3.1, 2.1), STUDENT) == []


@pytest.mark.parametrize(("parameters", "told"), [(99, True), (50, True), (49, False), (None, True)])
@pytest.mark.parametrize("bits", [2.0, 2.6])
def test_a_teacher_is_held_against_a_student_that_is_no_larger(parameters: int | None, told: bool, bits: float) -> None:
    """One that is its own student too."""
    lines = findings(said(3, bits), Facts(1000, parameters), said(3, 2.0), STUDENT)
    assert len(lines) == told
    if told:
        assert f"is no better than its student on the first batch: {bits:.2f} and 2.00 bits a byte. " in lines[0]
        assert ("its size is not known here" in lines[0]) == (parameters is None)
        assert (f"({parameters} parameters, its student 50)" in lines[0]) == (parameters is not None)


@pytest.mark.parametrize(("share", "told"), [(0.88, False), (0.92, True), (1.3, True)])
def test_a_teacher_is_held_against_a_guess(share: float, told: bool) -> None:
    """A smaller one too; and a student that starts from weights, where one from nothing is a guess by right."""
    near = said(share * CHANCE, 3)
    assert len(findings(near, Facts(1000, 10), said(4, 2))) == told
    for learner, expected in ((STUDENT, told), (NOTHING, False)):
        lines = findings(said(2, 1), Facts(1000, 99), near, learner)
        assert len(lines) == expected
        assert all(line.startswith("warning: the student is hardly better than chance on the first batch: ") for line in lines)
        assert all("a guess among its 1,000 tokens costs 6.91" in line for line in lines)


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_told_once(nats: float) -> None:
    [line] = findings(said(nats, 1), Facts(1000, 99), said(3, 2), STUDENT)
    assert line == "warning: the teacher has losses that are not finite on the first batch: does its dtype overflow?"


def test_each_of_several_teachers_is_judged() -> None:
    heard = BatchTextLosses(said(3, 2), (said(2, 1.5), said(3, 2.5)))
    [warning] = warnings(heard, STUDENT, [Facts(1000, None)] * 2)
    assert warning.startswith("warning: teacher 2 is no better than its student") and warning.count("Likely causes") == 1


@pytest.mark.parametrize("quiet", [False, True])
def test_a_warning_is_said_though_a_run_is_quiet_and_both_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monitor = Monitor(tmp_path, every=1, last_step=9, quiet=quiet)
    with monitor.writing(4):
        FirstBatch(STUDENT, [Facts(1000, 99)]).report(5, BatchTextLosses(said(3, 2), (said(3, 2.5),)), monitor)
    told = capsys.readouterr().out
    assert ("first batch: teacher 3.00, student 3.00" in told) != quiet and told.count("warning: ") == 1
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    [event] = board.Tensors("first_batch/text_summary")
    [text] = event.tensor_proto.string_val
    assert event.step == 5 and text.startswith(b"first batch: ") and b"\n\nwarning: the teacher (99 parameters" in text


def test_one_chart_has_both_models_in_one_unit() -> None:
    path, two = REPOSITORY / "examples" / "quickstart.toml", 'teacher=[{placement="cached"}, {placement="cached", data=["x"]}]'
    for overrides, teachers in (([], ["teacher"]), ([two], ["teacher_1", "teacher_2"]), (["guidance.objective=clm"], [])):
        charts = layout(load_run(path, overrides))["1. Is it learning?"].values()
        nats, bits = ([f"loss/{name}_{unit}" for name in teachers] for unit in ("all_tokens", "bits_per_byte"))
        assert ["loss/train", "loss/all_tokens", *nats] in charts and ["loss/bits_per_byte", *bits] in charts
