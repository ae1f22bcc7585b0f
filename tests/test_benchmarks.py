"""The benchmarks' corpus, their page, and that the one of preprocessing runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import orjson
import pytest

from benchmarks import corpus, preprocess
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


@pytest.mark.slow
def test_the_benchmark_of_preprocessing_writes_its_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    # a small vocabulary as teacher: it is opened fifteen times
    teacher = package_folder("mistral_common") / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    preprocess.main(["--quick", "--teacher", str(teacher), "--scratch", str(tmp_path), "--page", str(page)])
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) >= 12
    assert sum("≤" in row or "≥" in row for row in rows) == 10
    assert str(tmp_path) not in page.read_text() and str(teacher.parent.parent) not in page.read_text()
