"""The page about a run's sample rows, read as a browser and a stranger would."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_vocagno.config import Guidance, Run
from megatron_vocagno.training.sample_files import SampleRows, SampleStep, summary, write_rows, write_step
from tests.sources import samples_of
from tools.preprocess import heat
from tools.preprocess.report import main, parse

ROWS, LENGTH, STEPS = 12, 128, (0, 10, 20, 30)
VOID = {"meta", "br", "input"}
TAGS = """html head meta title style script body header main section h1 p b dl div dt dd small svg polyline line span i br
          button input output fieldset legend label"""


class Reader(HTMLParser):
    """Tags, the text of scripts of data by id, and the tokens of the text with what stands before each."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.data: dict[str, str] = {}
        self.text = ""
        self.tokens: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "span" and dict(attrs).get("class") == "t":
            self.tokens.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.data[attributes.get("id") or "program"] = data
        elif tag != "style":
            self.text += data
        if tag == "span" and attributes.get("class") == "t":
            self.tokens[-1] += data


@pytest.fixture(scope="module")
def rows(small) -> SampleRows:
    """The first rows of hostile and awkward documents, as a run describes them."""
    return rows_of(small.dataset, LENGTH, ROWS)


def rows_of(dataset, length: int, count: int) -> SampleRows:
    run = Run.model_validate(
        {
            "output": "nowhere",
            "data": {"train": str(dataset.path), "valid": str(dataset.path), "row_length": length},
            "student": {"config": {"model_type": "llama"}},
            "guidance": {"objective": "clm"},
            "training": {"steps": 1},
            "logging": {"samples": count},
        }
    )
    return samples_of(run, [dataset], dataset).rows


def step_of(rows: SampleRows, step: int, guidance: Guidance) -> SampleStep:
    """Losses that nobody computed, and a choice that follows no rule: the page must show what the file says."""
    random, guides = np.random.default_rng(step), np.random.default_rng(99)
    loss = np.where(rows.valid_RS, random.gamma(2, 2, rows.valid_RS.shape), np.nan).astype(np.float32)
    guide = np.where(rows.mapped_RS, guides.gamma(2, 1.5, rows.valid_RS.shape), np.nan).astype(np.float32)
    guide[0, 3] = np.nan if guidance.needs_teacher else guide[0, 3]  # a teacher that gave NaN
    loss[0, 5] = np.inf
    weight = (rows.valid_RS & (~rows.mapped_RS | (random.random(rows.valid_RS.shape) < 0.4))).astype(np.float32)
    if not guidance.needs_teacher:
        guide[:] = np.nan
    return SampleStep(step, loss, guide, weight if guidance.selects else rows.valid_RS.astype(np.float32), guidance)


def written(folder: Path, rows: SampleRows, guidance: Guidance, steps=STEPS) -> tuple[Path, list[SampleStep]]:
    told = [step_of(rows, step, guidance) for step in steps]
    write_rows(folder, rows)
    for step in told:
        write_step(folder, step)
    return folder, told


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory) -> tuple[Path, list[SampleStep]]:
    return written(tmp_path_factory.mktemp("heat") / "<b>run</b>", rows, Guidance())


@pytest.fixture(scope="module")
def source(run) -> str:
    return heat.page(run[0])


@pytest.fixture(scope="module")
def read(source) -> Reader:
    return Reader(source)


def test_tags_are_closed_and_nothing_is_fetched(source, read):
    assert read.open == [] and read.tags <= set(TAGS.split())
    assert not any(name.startswith("on") or name in ("src", "href", "style") for name in read.attributes)
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"\b(fetch|import|XMLHttpRequest|WebSocket|eval|innerHTML)\b", read.data["program"])
    # texts hold addresses; what is ours does not
    ours = re.sub(r'<span class="t">.*?</span>|<script id=.*?</script>', "", source, flags=re.DOTALL)
    assert len(ours) > 10_000 and "://" not in ours, "an address"


def test_only_the_pages_own_script_runs(source, read):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)[1]
    own = b64encode(sha256(read.data["program"].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'"


def test_hostile_text_stays_text(source, read):
    assert source.count("<script") == 4 == source.count("</script>"), "a text that ends a script, or starts one"
    assert "<b>run" not in source and "<img" not in source
    told = "".join(read.tokens)
    assert "</script>" in told and "{{" in told and "onerror" in told
    for character in "\x1b\u202e\x9b":
        assert character not in source
    # the teacher's tokens of the same text lie in the data
    assert any("script" in name for row in json.loads(read.data["data"])["teacher"] for name in row)


def test_the_text_is_that_of_the_rows(small, rows, read):
    assert len(read.tokens) == int(rows.valid_RS.sum()) > 1000
    met = 0
    for token, id_, place in zip(read.tokens, rows.target_RS[rows.valid_RS], rows.token_RS[rows.valid_RS], strict=True):
        data = small.student.bytes[int(id_)]
        if data.isascii() and data.strip().isalnum() and place:
            assert token == data.decode().strip()
            met += 1
    assert met > 500


def test_numbers_are_those_of_the_files(run, rows, read):
    data, views = json.loads(read.data["data"]), run[1]
    assert json.loads(read.data["steps"]) == list(STEPS)
    assert len(data["guides"]) == 1, "a frozen teacher's guides stand there once"
    shown = rows.valid_RS
    missing = 0
    for told, view in zip(data["views"], views, strict=True):
        for written_, values in ((told["loss"], view.student_loss_RS), (data["guides"][told["guide"]], view.guide_RS)):
            for number, value in zip(written_, values[shown].tolist(), strict=True):
                assert number is None if not np.isfinite(value) else abs(number - 100 * value) <= 0.5
                missing += number is None
        assert told["weight"] == [100 * int(weight) for weight in view.weight_RS[shown]] and "excess" not in told
    assert missing > 20
    spans = list(zip(rows.first_RS[shown].tolist(), rows.last_RS[shown].tolist(), strict=True))
    assert data["spans"] == [list(span) for span in spans]
    assert data["kinds"] == "".join(map(str, rows.mapping_RS[shown].tolist())) and set(data["kinds"]) > {"0", "1"}


def test_the_headline_and_its_numbers_follow_the_steps(run, rows, source, read):
    headlines = json.loads(read.data["headlines"])
    texts = [json.loads(texts.replace("&#34;", '"')) for texts in re.findall(r'data-texts="([^"]*)"', source)]
    assert len(headlines) == len(STEPS) and [len(of) for of in texts] == [len(STEPS)] * 3
    for i, view in enumerate(run[1]):
        kept, mapped = rows.mapped_RS & (view.weight_RS > 0), rows.mapped_RS
        assert f"from {int(kept.sum()):,} of {int(mapped.sum()):,} mapped tokens" in headlines[i]
        assert texts[0][i] == f"{kept.sum() / mapped.sum():.1%}"
        for place, group in ((1, kept), (2, mapped & ~kept)):
            mean = view.student_loss_RS[group].astype(np.float64).mean()
            assert texts[place][i] == (f"{mean:.3f}" if np.isfinite(mean) else "–")
    assert headlines[0].startswith("Before the first step") and headlines[1].startswith("After step 10,")
    assert headlines[-1] in read.text and texts[0][-1] in read.text
    assert len(set(texts[0])) == len(STEPS)


def test_weights_between_0_and_1_and_the_excess_of_a_chunk(rows, tmp_path):
    rule = Guidance(unit="chunk", weighting="control_variate")
    view = step_of(rows, 10, rule)
    weight = np.where(view.weight_RS > 0, np.random.default_rng(0).random(view.weight_RS.shape), 0).astype(np.float32)
    view = replace(view, weight_RS=weight, guide_RS=np.where(np.isnan(view.guide_RS), np.nan, 1.5).astype(np.float32))
    write_rows(tmp_path, rows)
    write_step(tmp_path, view)
    read = Reader(heat.page(tmp_path))
    assert "with less weight on those on which it is not behind its teacher on the same chunk of text" in read.text
    assert "sum of the teacher losses of each chunk, control variate" in read.text and "Weight" in read.text
    shown, (told,) = rows.valid_RS, json.loads(read.data["data"])["views"]
    assert [w > 0 for w in told["weight"]] == (weight[shown] > 0).tolist()
    assert all(abs(w - 100 * x) <= 1 for w, x in zip(told["weight"], weight[shown].tolist(), strict=True))
    excess = dict(zip(zip(*np.nonzero(shown), strict=True), told["excess"], strict=True))
    met = 0
    for r, s in zip(*np.nonzero(rows.mapped_RS), strict=True):
        # the tokens around it that share a teacher token with their neighbor
        begin = end = s
        while begin and rows.mapped_RS[r, begin - 1] and rows.first_RS[r, begin] < rows.last_RS[r, begin - 1]:
            begin -= 1
        while end + 1 < LENGTH and rows.mapped_RS[r, end + 1] and rows.first_RS[r, end + 1] < rows.last_RS[r, end]:
            end += 1
        want = float((view.student_loss_RS[r, begin : end + 1] - view.guide_RS[r, begin : end + 1]).astype(np.float64).sum())
        assert excess[r, s] is None if not np.isfinite(want) else abs(excess[r, s] - 100 * want) <= 0.51
        met += end > begin
    assert met > 100


@pytest.mark.parametrize(
    ("objective", "words"), [("clm", "the loss covers every token"), ("random", "random ones"), ("student", "its highest losses")]
)
def test_what_guides_nothing_shows_no_guide(rows, tmp_path, objective, words):
    folder, _ = written(tmp_path, rows, Guidance(objective=objective))
    read = Reader(heat.page(folder))
    assert words in read.text and "Student loss" in read.text
    assert "Excess" not in read.text and "Guide" not in read.text
    assert "dropped" in read.text or objective == "clm"


def drawn(source: str) -> list[int]:
    """Of each number above the text, how many lines follow the slider."""
    return [tile.count("<polyline ") for tile in re.findall(r"<div><dt>.*?</dd></div>", source, re.DOTALL)]


def test_a_number_that_does_not_exist_has_no_line(rows, tmp_path):
    clm, told = written(tmp_path / "clm", rows, Guidance(objective="clm"))
    loss = np.where(np.isinf(told[0].student_loss_RS), 9, told[0].student_loss_RS).astype(np.float32)
    for view in told:
        write_step(clm, replace(view, student_loss_RS=loss + view.step))
    page = heat.page(clm)
    # the loss covers every token: nothing is dropped
    assert drawn(page) == [1, 1, 0] and page.count('class="spark"') == 2
    # a loss that is infinite in the midst parts the line in two
    write_step(clm, replace(told[1], student_loss_RS=np.where(rows.valid_RS, np.inf, loss)))
    write_step(clm, replace(told[3], student_loss_RS=loss, step=40))
    assert drawn(heat.page(clm)) == [1, 2, 0]
    points = re.findall(r'<polyline points="([^"]*)"', page)
    assert [len(line.split()) for line in points] == [len(STEPS)] * 2


@pytest.mark.parametrize(("parts", "words"), [(16, "cut into 16 equal parts instead of aligned"), (1, "cut into 1 part instead")])
def test_equal_parts_are_named_in_place_of_the_method(rows, read, tmp_path, parts, words):
    folder, _ = written(tmp_path, rows, Guidance(equal_parts=parts))
    told = Reader(heat.page(folder))
    assert words in told.text and f"guidance.equal_parts = {parts}, a baseline" in told.text
    assert all("over its teacher in the same part" in headline for headline in json.loads(told.data["headlines"]))
    assert "instead of aligned" not in read.text and "same part" not in read.data["headlines"]


def test_the_page_explains_mapped(rows, read, tmp_path):
    clm, _ = written(tmp_path, rows, Guidance(objective="clm"))
    for told in (read, Reader(heat.page(clm))):
        assert "A token is mapped if teacher tokens cover it." in told.text


def test_the_page_is_small_whatever_was_written(small, tmp_path, monkeypatch):
    rows = rows_of(small.dataset, LENGTH, 60)
    folder, _ = written(tmp_path, rows, Guidance(), range(0, 300, 10))
    monkeypatch.setattr(heat, "MOST_TOKENS", 1000)
    monkeypatch.setattr(heat, "MOST_LOSSES", 9_000)
    source = heat.page(folder)
    read = Reader(source)
    assert 700 < len(read.tokens) <= 1000 and len(source) < 250_000
    steps = json.loads(read.data["steps"])
    assert steps[0] == 0 and steps[-1] == 290 and 8 <= len(steps) <= 10
    assert "The first 8 of 60 rows are shown" in read.text and f"{len(steps)} of 30 evaluations" in read.text
    # a row longer than all the room is cut, not left out
    monkeypatch.setattr(heat, "MOST_TOKENS", 50)
    assert len(Reader(heat.page(folder)).tokens) == 50


def test_the_command_writes_the_page_and_explains_what_it_lacks(run, rows, source, with_ids, tmp_path, capsys):
    out = tmp_path / "heat.html"
    assert main(["--run", str(run[0]), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == source
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    assert main(["--run", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "the folder does not exist" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["--run", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "if logging.samples is set" in capsys.readouterr().err
    write_rows(tmp_path / "early", rows)
    assert main(["--run", str(tmp_path / "early"), "--out", str(out)]) == 2
    assert "no evaluation of its sample rows yet" in capsys.readouterr().err
    assert main(["--run", str(run[0]), "--data", str(with_ids.path), "--out", str(out)]) == 2
    assert "is not the dataset of the sample rows in" in capsys.readouterr().err
    broken = tmp_path / "broken" / "samples"
    broken.mkdir(parents=True)
    (broken / "rows.safetensors").write_bytes(b"\x00" * 30)
    assert main(["--run", str(broken.parent), "--out", str(out)]) == 2
    assert "is not a sample file of a run" in capsys.readouterr().err


def test_a_dataset_that_has_moved_is_named(run, rows, source, small, tmp_path, capsys):
    moved = replace(rows, dataset=str(tmp_path / "gone"))
    folder, _ = written(tmp_path / "<b>run</b>", moved, Guidance())
    command = ["--run", str(folder), "--out", str(tmp_path / "heat.html")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'gone'}" in told and "--data FOLDER" in told and f"{folder} has sample rows of this dataset" in told
    assert main([*command, "--data", str(small.dataset.path)]) == 0
    assert (tmp_path / "heat.html").read_text(encoding="utf-8") == source


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["DATASET", "--data", "X"], "--data is only for --run"),
        (["--run", "RUN", "--sample", "5"], "with --run nothing is sampled"),
        (["--run", "RUN", "--row-length", "4096"], "with --run nothing is sampled"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*arguments, "--out", "page.html"])
    assert words in capsys.readouterr().err


def test_widths_and_shares_add_up(run, rows):
    view = run[1][1]
    numbers = summary(rows, view)
    width, kept = rows.last_RS - rows.first_RS, view.weight_RS > 0
    named = {"width_1": width == 1, "width_2": width == 2, "width_3": width == 3, "width_4_or_more": width >= 4}
    total = 0
    for name, group in named.items():
        group = group & rows.mapped_RS
        assert numbers[f"samples/share_kept_{name}"] == pytest.approx(kept[group].sum() / group.sum())
        total += int(group.sum())
    assert total == rows.mapped_RS.sum() and (width >= 4).any()
