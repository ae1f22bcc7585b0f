"""One document in the terminal."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import defaultdict

import pytest
from rich.cells import cell_len

from tests.tools.signs import NOT_THE_TEXT, text_of
from tools.preprocess import interlinear
from tools.preprocess.colored_lines import shown
from tools.preprocess.interlinear import Interlinear
from tools.preprocess.show_document import main


def rows_of(lines, side: str) -> str:
    """All rows of one side, without their names and positions."""
    rows = [re.match(rf"(?:{side}|{side[0]}) +(?:[\d,]+)? (.*)", line, re.DOTALL) for line in lines]
    return "".join(row[1] for row in rows if row)


def lines_of(opened: Interlinear, document: int, width: int = 100) -> list[str]:
    return [line.plain for line in shown(opened, document, 0, None, width)]


def test_rows_without_brackets_are_the_text(opened, texts):
    met = 0
    for i, text in enumerate(texts):
        if NOT_THE_TEXT in text:
            continue
        lines = lines_of(opened, i)
        for side in ("student", "teacher"):
            assert text_of(rows_of(lines, side)) == text, (i, side)
            met += 1
    assert met > 80


def test_what_stands_beneath_a_token_is_its_span(opened, texts):
    mapped = shared = unmapped = 0
    for i, text in enumerate(texts):
        if NOT_THE_TEXT in text:
            continue
        beneath, above = defaultdict(set), defaultdict(set)
        for cell in itertools.chain.from_iterable(opened.blocks(i)):
            if cell.student and cell.teacher and cell.student.mapped:
                assert cell.teacher.mapped
                beneath[cell.student.token].add(cell.teacher.token)
                above[cell.teacher.token].add(cell.student.token)
        spans = opened.dataset.spans(i)
        for token, (first, last) in enumerate(zip(spans.first.tolist(), spans.last.tolist(), strict=True)):
            assert beneath[token] == set(range(first, last))
            unmapped += first == last
        mapped += sum(map(len, beneath.values()))
        shared += sum(len(tokens) > 1 for tokens in above.values())
    assert mapped > 5_000
    assert unmapped >= len(texts) - 1
    assert shared > 200 or opened.dataset.student_tokenizer.fingerprint == opened.dataset.teacher_tokenizer.fingerprint


def test_brackets_pair_and_unmapped_tokens_have_their_own(opened, texts):
    for i in range(len(texts)):
        lines = lines_of(opened, i)
        for side, lengths in (("student", opened.dataset.student_lengths), ("teacher", opened.dataset.teacher_lengths)):
            row = rows_of(lines, side)
            brackets = re.sub(r"[^⟦⟧⟪⟫]", "", row)
            assert re.fullmatch(r"(⟦⟧|⟪⟫)*", brackets)
            assert len(brackets) == 2 * lengths[i]
            assert row.rstrip().endswith("⟫"), "the end of the document"


def test_tokens_have_the_bytes_of_the_dataset(opened, texts):
    sides = opened.student, opened.teacher
    for side, table in zip(sides, (opened.dataset.student_byte_lengths, opened.dataset.teacher_byte_lengths), strict=True):
        assert [len(text) for text in side.bytes] == table.tolist()
    met = 0
    for i, text in enumerate(texts):
        for side, ids in zip(sides, (opened.dataset.student(i), opened.dataset.teacher(i)), strict=True):
            if NOT_THE_TEXT not in text:
                read = b"".join(side.bytes[token] for token in ids.tolist())
                assert read.removeprefix(b" " if side.prefixes == (True,) else b"") == text.encode()
                met += len(ids)
    assert met > 10_000


@pytest.mark.parametrize("width", [20, 40, 61, 200])
def test_no_line_is_wider_than_the_terminal(small, texts, width):
    narrow = 0
    for i, text in enumerate(texts[:40]):
        lines = lines_of(small, i, width)
        assert max(map(cell_len, lines)) <= width, i
        narrow += len(lines)
        if NOT_THE_TEXT not in text and width > 20:  # there, signs are broken too
            assert text_of(rows_of(lines, "student")) == text
    assert narrow > 200


def test_pairs_of_rows_have_one_width(small, texts):
    met = 0
    for i in range(len(texts)):
        for above, beneath in itertools.pairwise(lines_of(small, i)):
            if above.startswith("student ") and beneath.startswith("teacher "):
                assert cell_len(above) == cell_len(beneath)
                met += 1
    assert met > 500


def test_nothing_that_a_document_holds_reaches_the_terminal_raw(small, texts):
    met = 0
    for i, text in enumerate(texts):
        for line in lines_of(small, i):
            assert not any(unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp") for character in line), line
        met += any(unicodedata.category(character) in ("Cc", "Cf") for character in text)
    assert met > 5


def test_a_part_is_cut_at_common_boundaries_and_shows_what_the_whole_shows(small, texts):
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))
    whole = list(small.blocks(longest))
    n = int(small.dataset.student_lengths[longest])
    assert n > interlinear.WINDOW, "more than one window"
    for start, stop in [(0, 1), (1, 2), (100, 150), (4090, 4100), (n - 1, n), (0, n), (7, 7)]:
        part = list(small.blocks(longest, start, stop))
        tokens = [cell.student.token for block in part for cell in block if cell.student]
        assert set(range(start, stop)) <= set(tokens)
        assert len(part) <= stop - start
        assert part == [block for block in whole if block[0].student and block[0].student.token in tokens]


def test_windows_leave_no_trace(small, texts, monkeypatch):
    whole = [list(small.blocks(i)) for i in range(len(texts))]
    widest = max(len(block) for blocks in whole for block in blocks)
    assert widest > 1000, "a run of one letter, which the two cut at different places"
    monkeypatch.setattr(interlinear, "WINDOW", 400)
    for i in range(len(texts)):
        assert list(small.blocks(i)) == whole[i]


def test_a_text_that_the_student_changes_is_shown_side_by_side(small, texts):
    i = next(i for i, text in enumerate(texts) if NOT_THE_TEXT in text)
    lines = lines_of(small, i)
    assert text_of(rows_of(lines, "teacher")) == texts[i]
    assert text_of(rows_of(lines, "student")).lstrip() == texts[i].replace(NOT_THE_TEXT, " ").lstrip()


# ---- the command


def test_piped_output_has_the_same_text_without_color(small, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([str(small.dataset.path), "3"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main([str(small.dataset.path), "3"]) == 0
    colored = capsys.readouterr().out
    assert colored.count("\x1b") > 20
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


def test_it_names_the_document_and_its_counts(small, capsys):
    assert main([str(small.dataset.path), "5", "--start", "0", "--stop", "2"]) == 0
    out = capsys.readouterr().out
    n, m = int(small.dataset.student_lengths[5]), int(small.dataset.teacher_lengths[5])
    assert f"document 5 of {len(small.dataset)}: {n:,} student tokens, {m:,} teacher tokens" in out
    assert main([str(small.dataset.path), "--random"]) == 0
    number = int(re.match(r"document (\d+) of", capsys.readouterr().out)[1])
    assert 0 <= number < len(small.dataset)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1000"], "no document 1000. There are 46, and the first one is 0"),
        (["-1"], "no document -1"),
        (["0", "--start", "5", "--stop", "3"], "[5, 3) is out of range"),
        (["0", "--stop", "100000"], "[0, 100,000) is out of range"),
        (["--id", "a"], "built without --id-key"),
    ],
)
def test_a_missing_document_or_dataset_is_an_error(small, capsys, arguments, said):
    assert main([str(small.dataset.path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err
    assert out == ""


def test_a_document_is_found_by_its_id(with_ids, capsys):
    assert main([str(with_ids.path), "--id", "\x1b[31m[red]"]) == 0
    assert capsys.readouterr().out.startswith("document 2 of 3, ␛[31m[red]: ")
    assert main([str(with_ids.path), "--id", "<i"]) == 2
    assert "none of its 3 documents has the id '<i'" in capsys.readouterr().err


def test_a_folder_without_a_dataset_is_said(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "is not a dataset: the folder has no dataset.json" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "1"])
@pytest.mark.parametrize("other", [["--id", "x"], ["--random"]])
def test_a_number_and_another_choice_are_refused(number, other, small, capsys):
    with pytest.raises(SystemExit) as left:
        main([str(small.dataset.path), number, *other])
    assert left.value.code == 2 and "not allowed with argument INDEX" in capsys.readouterr().err
