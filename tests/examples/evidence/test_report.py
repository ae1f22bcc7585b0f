"""The pages are those that the writer gives for the stored results, and findings belong to one set of numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.evidence import __main__ as command
from examples.evidence import plots, report
from examples.evidence.report import Results
from examples.evidence.running import EXPERIMENTS

PUBLISHED = report.PAGE.with_suffix("")
KEPT = {"kept_clean": 0.9, "kept_wrong": 0.1, "kept_key": 0.2, "kept_sign": 0.3, "IoS": 1.0, "IoU": 0.7}

DONE = [name for name in EXPERIMENTS if (report.PAGE.with_suffix("") / f"{name}.jsonl").exists()]
"""The experiments whose results are in the repository."""


def row(arm: str, seed: int, step: int, nats: float, setting: str = "random-0.6") -> dict[str, Any]:
    costs = {"student_tokens": 100 * step, "teacher_tokens": 50, "student_flops": 1e9 * step, "teacher_flops": 2e8}
    costs["teacher_flops"] = 0.0 if arm in ("clm", "random") else 2e8
    scores = {"answer_nats": nats, "accuracy": 1 - nats / 10, **KEPT}
    return {
        "experiment": "mechanism",
        "setting": setting,
        "arm": arm,
        "seed": seed,
        "learning_rate": 2e-3,
        "step": step,
        "scores": scores,
        "costs": costs,
    }


LEVELS = {"clm": 2.0, "random": 2.5, "guided": 1.7}
ROWS = [
    row(arm, seed, step, level + seed / 10 - step / 100)
    for arm, level in LEVELS.items()
    for seed in (1, 2, 3)
    for step in (10, 20)
]
ROWS += [row("equal-parts-16", 1, 20, 1.9), row("keep-0.2", 1, 20, 1.5)]


@pytest.fixture(scope="module", autouse=True)
def plots_of_one_line() -> Iterator[None]:
    """Drawing takes most of the time; test_running looks at real plots."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_bars", "draw_points"):
            patch.setattr(plots, name, lambda path, *_: path.write_text("<svg"))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the writer gives for the results in the repository."""
    page = tmp_path_factory.mktemp("docs") / report.PAGE.name
    assert report.write(PUBLISHED, page) == [], "results without findings"
    return page


def test_the_pages_in_the_repository_are_those_of_the_stored_results(written: Path) -> None:
    assert report.PAGE.read_text() == written.read_text()
    folder = written.with_suffix("")
    assert {path.name for path in PUBLISHED.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.suffix != ".svg":
            assert path.read_bytes() == (PUBLISHED / path.name).read_bytes(), f"{path.name}: run the report"
    findings = {path.name for path in report.CONCLUSIONS.glob("*.md")}
    assert len(findings) == len(DONE) + 1, "findings for numbers that are not in the repository"


def test_the_page_is_short_and_every_number_is_finite(written: Path) -> None:
    assert len(written.read_text().split()) <= 1200
    pages = [report.PAGE, *report.PAGE.with_suffix("").glob("*.md")]
    assert len(pages) == 2 + len(DONE)
    for page in pages:
        text = page.read_text()
        assert not re.search(r"\b[nN]a[nN]\b|\bNone\b|\binf\b|no written findings", text)
        for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert "<svg" in (page.parent / link).read_text()


def test_a_table_says_n_and_pairs_seeds(tmp_path: Path) -> None:
    results = Results({"mechanism": ROWS}, tmp_path)
    text = results.comparison("mechanism", "random-0.6", "answer_nats", False, {"kept_wrong": "kept: wrong"})
    lines = {line.split(" | ")[0].strip("| `"): line for line in text.splitlines()}
    # seeds 1, 2, 3 at step 20: level + 0.1, 0.2, 0.3 - 0.2; differences between arms do not depend on the seed
    assert "2.000 ± 0.100 (n=3)" in lines["clm"] and "| – | −0.500 ± 0.000 (n=3; 3 of 3 −)" in lines["clm"]
    assert lines["guided"].split(" | ")[3:5] == [f"−0.{tenths}00 ± 0.000 (n=3; 3 of 3 −)" for tenths in (3, 8)]
    # at step 10 guided is at level 1.7 + seed / 10 - 0.1: as good as clm's last already
    assert "step 10, 1e+10 + 2e+08 of the teacher FLOPs (3 of 3)" in lines["guided"]
    assert "never (0 of 3)" in lines["random"]
    assert "1.900 (n=1) | −0.000 (n=1) |" in lines["equal-parts-16"] or "1.900 (n=1) | +0.000 (n=1) |" in lines["equal-parts-16"]
    assert all("(n=" in line for line in text.splitlines()[2:])


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    results = Results({"mechanism": [row("guided", 1, 10, 1.0)]}, tmp_path)
    text = results.comparison("mechanism", "random-0.6", "answer_nats", False, {"never_scored": "other"})
    assert text.splitlines()[-1] == "| `guided` | 0.002 | 1.000 (n=1) | – | – | – | – |"
    assert results.curves("mechanism", "random-0.6", "never_scored", "nothing") == "" and not list(tmp_path.iterdir())


def test_an_arm_is_compared_with_the_control_that_keeps_as_many(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        *[row("keep-0.6", seed, 20, 1.0) for seed in (1, 2, 3)],
        *[row("random-0.6", seed, 20, 4.0) for seed in (1, 2, 3)],
    ]
    text = Results({"mechanism": rows}, tmp_path).comparison("mechanism", "random-0.6", "answer_nats", False)
    cells = {line.split(" | ")[0].strip("| `"): line.split(" | ")[4] for line in text.splitlines()}
    assert cells["keep-0.6"] == "−3.000 ± 0.000 (n=3; 3 of 3 −)" and cells["keep-0.2"] == "–"
    assert cells["guided"] == "−0.800 ± 0.000 (n=3; 3 of 3 −)"


def test_findings_are_left_out_if_a_score_changes_but_not_if_a_cost_does(tmp_path: Path) -> None:
    def without_findings(field: str, value: dict[str, float]) -> int:
        rows = report.load(PUBLISHED / "noise.jsonl")
        rows[-1][field] |= value
        (tmp_path / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "noise.json").write_bytes((PUBLISHED / "noise.json").read_bytes())
        missing = report.write(tmp_path, tmp_path / "page.md")
        page, tables = (tmp_path / name for name in ("page.md", "page/noise.md"))
        assert "no written findings" in page.read_text(), "its summary is of all experiments"
        assert ("no written findings" in tables.read_text()) == (len(missing) == 2)
        return len(missing)

    assert without_findings("costs", {"teacher_flops": 1.0}) == 1
    assert without_findings("scores", {"bits_per_byte": 1.4999}) == 2


def test_without_results_there_is_no_page_and_the_old_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("an older page")
    monkeypatch.setattr(report, "PAGE", page)
    assert command.main(["report", "--root", str(tmp_path / "typo")]) == 2
    assert "typo/results has no results" in capsys.readouterr().err and page.read_text() == "an older page"
