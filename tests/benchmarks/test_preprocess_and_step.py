"""The benchmarks' corpus, their page, and that those of preprocessing and of a step run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from tokenizers import Tokenizer

from benchmarks import corpus, preprocess, step, step_arms, step_memory
from benchmarks.page import write_section
from tests.tokenizers_for_tests import package_folder

SIZE = 300_000


@pytest.fixture(scope="module")
def texts() -> list[corpus.Text]:
    return list(itertools.islice(corpus.installed(), 1000))


def test_a_corpus_holds_each_text_once_in_an_order_of_its_own(tmp_path: Path, texts: list[corpus.Text]) -> None:
    content = corpus.write(tmp_path / "a.jsonl", texts, SIZE)
    corpus.write(tmp_path / "b.jsonl", [*reversed(texts), *texts[:500]], SIZE)
    rows = [orjson.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert rows == [orjson.loads(line)["text"] for line in (tmp_path / "b.jsonl").read_bytes().splitlines()]
    assert len(set(rows)) == len(rows) == content.documents > 20
    assert SIZE <= sum(len(row.encode()) for row in rows) == content.total < 1.5 * SIZE
    assert rows != sorted(rows)


def test_a_corpus_that_cannot_be_had_is_refused(tmp_path: Path, texts: list[corpus.Text]) -> None:
    with pytest.raises(ValueError, match=r"MB of text were found, 1,000\.0 were asked for"):
        corpus.write(tmp_path / "c.jsonl", texts, 1_000_000_000)


def test_markup_is_taken_off_and_long_texts_are_cut() -> None:
    page = "<head><title>no</title></head><body><p>Three &lt; five &eacute;</p><script>x = 1</script>\n\n\n\n<b>end</b>"
    assert corpus._plain("a.html", page) == "Three < five é\n\nend"
    assert corpus._plain("ls.1", '.\\" comment\n.SH NAME\nls \\- \\fBlist\\fR files') == "NAME\nls - list files"
    parts = list(corpus._cut("A paragraph of words.\n\n" * 20_000))
    assert len(parts) > 50 and max(map(len, parts)) <= corpus.LONGEST
    assert sum(part.count("paragraph") for part in parts) == 20_000


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for name, text in (("one", "first"), ("two", "second"), ("one", r"third \1")):
        write_section(name, text, page)
    written = page.read_text()
    assert "first" not in written and written.count("<!-- one -->") == 1
    assert written.index(r"third \1") < written.index("second")


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_of_preprocessing_writes_its_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    # a small vocabulary as teacher: it is opened fifteen times. Without user-defined pieces, which gigatoken does not read
    teacher = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
    preprocess.main(["--quick", "--teacher", str(teacher), "--scratch", str(tmp_path), "--page", str(page)])
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) >= 12
    assert sum("≤" in row or "≥" in row for row in rows) == 10
    assert str(tmp_path) not in page.read_text() and str(teacher.parent.parent) not in page.read_text()


def test_peak_memory_is_that_of_the_stretch_alone() -> None:
    size = 100_000_000
    np.ones(2 * size, np.uint8)
    before = step_memory.start()
    np.ones(size, np.uint8)
    assert 0.95 * size < step_memory.peak() - before < 1.2 * size


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[step_arms.Case, step_arms.Case]:
    return step.prepare(tmp_path_factory.mktemp("step"), step.QUICK)


@pytest.mark.slow
def test_the_steps_that_are_compared_have_the_same_losses(cases: tuple[step_arms.Case, step_arms.Case]) -> None:
    case = cases[0]
    students = step_arms._student(case), step_arms._hugging_face(case.student, torch.float32)
    teachers = step_arms._teacher(case), step_arms._hugging_face(case.teacher, torch.float32)
    for inputs in step_arms.inputs_of(case):
        read = (
            (*students, inputs.batch.input_BS, inputs.batch.target_BS),
            (*teachers, inputs.teacher_input_BU, inputs.teacher_target_BU),
        )
        for ours, theirs, ids, target in read:
            with torch.no_grad():
                loss = ours(ids, target)
                dense = step_arms._dense_loss(theirs(ids).logits, target, "none").view_as(target)
            assert (target != -100).sum() > 150
            assert loss.std() > 0.01  # not the same for every token
            torch.testing.assert_close(loss, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_texts_for_another_trainer_are_those_of_the_rows(cases: tuple[step_arms.Case, step_arms.Case]) -> None:
    case = cases[0]
    student = Tokenizer.from_file(str(case.student / "tokenizer.json"))
    rows = [row for inputs in step_arms.inputs_of(case) for row in inputs.batch.input_BS.tolist()]
    assert len(rows) == case.rows * case.steps
    for text, row in zip(step.row_texts(case), rows, strict=True):
        again = student.encode(text, add_special_tokens=False).ids
        # the row's first and last token may be cut otherwise, and it is padded
        assert SequenceMatcher(None, again, row, autojunk=False).ratio() > 0.85


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_of_a_step_writes_its_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    step.main(["--quick", "--write", str(page)])
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 9
    assert sum(" × (" in row and "≤" in row for row in rows) == 7
    assert str(tmp_path) not in page.read_text()


def test_all_ways_to_the_heads_loss_agree() -> None:
    """What is compared is the same: losses, and gradients where tokens are learned."""
    from benchmarks import head

    case = replace(head.CASES[0], tokens=40, size=16, vocabulary=300)
    want: list[torch.Tensor] = []
    for arm in ("dense", "ours", "rows", "torch", "as is"):
        one = head.Head(case)
        one.step(arm)
        assert one.hidden.grad is not None and one.head.grad is not None and one.head.grad.any()
        want = want or [one.hidden.grad, one.head.grad]
        for mine, theirs in zip([one.hidden.grad, one.head.grad], want, strict=True):
            torch.testing.assert_close(mine, theirs)
