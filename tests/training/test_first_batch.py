"""The line about the first batch, and the warnings about models that are not as good as they should be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vocagno.batch.text_losses import BatchTextLosses, TextLoss
from megatron_vocagno.run_file import load_run
from megatron_vocagno.training.first_batch import FirstBatch, ModelFacts, describe, warnings
from megatron_vocagno.training.monitor import Monitor
from megatron_vocagno.training.tensorboard import layout
from tests.runs import REPOSITORY

CHANCE = math.log(1000)
STUDENT, NOTHING = ModelFacts(1000, 50), ModelFacts(1000, 50, trained=False)


def loss(nats: float, bits: float) -> TextLoss:
    """Means over many tokens, of about as many bytes as make the bits."""
    if not math.isfinite(nats):
        return TextLoss(nats, 10_000, 40_000)
    return TextLoss(10_000 * nats, 10_000, round(10_000 * nats / math.log(2) / bits))


def findings(teacher: TextLoss, facts: ModelFacts, student: TextLoss, learner: ModelFacts = NOTHING) -> list[str]:
    """The first lines of all warnings."""
    lines = "\n".join(warnings(BatchTextLosses(student, (teacher,)), learner, [facts])).splitlines()
    return [line for line in lines if line.startswith("warning: ")]


def test_the_line_names_every_model_that_has_text() -> None:
    one, two, student, nothing = loss(2.714, 2.1), loss(3, 2.5), loss(3.1, 2.9), TextLoss(0.0, 0, 0)
    assert describe(BatchTextLosses(student, (one,))) == (
        "first batch: teacher 2.71, student 3.10 nats per token, 2.10 and 2.90 bits per byte"
    )
    assert describe(BatchTextLosses(student, (one, two))) == (
        "first batch: teacher 1 2.71, teacher 2 3.00, student 3.10 nats per token, 2.10, 2.50 and 2.90 bits per byte"
    )
    assert describe(BatchTextLosses(student, ())) == "first batch: student 3.10 nats per token, 2.90 bits per byte"
    assert describe(BatchTextLosses(nothing, (nothing,))) is None and not findings(nothing, ModelFacts(1000, 99), nothing)


def test_no_warning_for_a_teacher_that_knows_the_text() -> None:
    for facts in (ModelFacts(1000, 99), ModelFacts(1000, 10), ModelFacts(1000, None)):
        assert findings(loss(3, 2), facts, loss(6.9, 4)) == findings(loss(3, 2), facts, loss(3.1, 2.1), STUDENT) == []


@pytest.mark.parametrize(("parameters", "warned"), [(99, True), (50, True), (49, False), (None, True)])
@pytest.mark.parametrize("bits", [2.0, 2.6])
def test_a_teacher_is_compared_with_a_student_that_is_not_larger(parameters: int | None, warned: bool, bits: float) -> None:
    """Also if teacher and student are equally good."""
    lines = findings(loss(3, bits), ModelFacts(1000, parameters), loss(3, 2.0), STUDENT)
    assert len(lines) == warned
    if warned:
        assert f"is no better than its student on the first batch: {bits:.2f} and 2.00 bits per byte. " in lines[0]
        assert ("its size is not known here" in lines[0]) == (parameters is None)
        assert (f"({parameters} parameters, its student 50)" in lines[0]) == (parameters is not None)


@pytest.mark.parametrize(("share", "warned"), [(0.88, False), (0.92, True), (1.3, True)])
def test_a_teacher_is_compared_with_chance(share: float, warned: bool) -> None:
    """Also a teacher smaller than its student, and a pretrained student. A student from scratch is at chance by design."""
    near = loss(share * CHANCE, 3)
    assert len(findings(near, ModelFacts(1000, 10), loss(4, 2))) == warned
    for learner, expected in ((STUDENT, warned), (NOTHING, False)):
        lines = findings(loss(2, 1), ModelFacts(1000, 99), near, learner)
        assert len(lines) == expected
        assert all(line.startswith("warning: the student is hardly better than chance on the first batch: ") for line in lines)
        assert all("a guess among its 1,000 tokens costs 6.91" in line for line in lines)


@pytest.mark.parametrize("nats", [math.nan, math.inf])
def test_losses_that_are_not_finite_give_one_warning(nats: float) -> None:
    [line] = findings(loss(nats, 1), ModelFacts(1000, 99), loss(3, 2), STUDENT)
    assert line == "warning: the teacher has losses that are not finite on the first batch: does its dtype overflow?"


def test_each_of_several_teachers_is_checked() -> None:
    losses = BatchTextLosses(loss(3, 2), (loss(2, 1.5), loss(3, 2.5)))
    [warning] = warnings(losses, STUDENT, [ModelFacts(1000, None)] * 2)
    assert warning.startswith("warning: teacher 2 is no better than its student") and warning.count("Likely causes") == 1


def test_the_advice_names_the_option_of_the_model_that_reads_wrongly() -> None:
    at_chance = BatchTextLosses(loss(CHANCE, 3), (loss(CHANCE, 3),))
    teacher, student = warnings(at_chance, STUDENT, [ModelFacts(1000, 10)])
    assert "a wrong prefix (teacher.bos)" in teacher and "student.bos" not in teacher
    assert "a wrong prefix (student.bos)" in student and "teacher.bos" not in student


@pytest.mark.parametrize("quiet", [False, True])
def test_a_quiet_run_prints_warnings_and_both_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monitor = Monitor(tmp_path, every=1, last_step=9, quiet=quiet)
    with monitor.writing(4):
        FirstBatch(STUDENT, [ModelFacts(1000, 99)]).report(5, BatchTextLosses(loss(3, 2), (loss(3, 2.5),)), monitor)
    printed = capsys.readouterr().out
    assert ("first batch: teacher 3.00, student 3.00" in printed) != quiet and printed.count("warning: ") == 1
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    [event] = board.Tensors("first_batch/text_summary")
    [text] = event.tensor_proto.string_val
    assert event.step == 5 and text.startswith(b"first batch: ") and b"\n\nwarning: the teacher (99 parameters" in text


def test_one_chart_has_both_models_in_one_unit() -> None:
    path, two = REPOSITORY / "examples" / "quickstart.toml", 'teacher=[{placement="cached"}, {placement="cached", data=["x"]}]'
    for overrides, teachers in (([], ["teacher"]), ([two], ["teacher_1", "teacher_2"]), (["guidance.objective=clm"], [])):
        run = load_run(path, overrides)
        charts = layout(run.guidance, len(run.teacher), True)["1. Is it learning?"].values()
        nats, bits = ([f"loss/{name}_{unit}" for name in teachers] for unit in ("all_tokens", "bits_per_byte"))
        assert ["loss/train", "loss/all_tokens", *nats] in charts and ["loss/bits_per_byte", *bits] in charts
