"""The page: it renders from recorded rows, says of how many seeds it speaks, and knows no NaN."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.evidence import __main__ as command
from examples.evidence import report
from examples.evidence.report import Results, arms_table
from examples.evidence.running import ARMS, EXPERIMENTS

PUBLISHED = report.PAGE.with_suffix("")
KEPT = {"kept_clean": 0.9, "kept_wrong": 0.1, "kept_key": 0.2, "kept_sign": 0.3, "IoS": 1.0, "IoU": 0.7}


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
ROWS += [row("chunk-16", 1, 20, 1.9), row("keep-0.2", 1, 20, 1.5)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evidence")
    (root / "results").mkdir()
    (root / "results" / "mechanism.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = {"teacher": "600 steps", "lines": "68,266", "facts": "200", "steps": "600"}
    note = {"command": "python -m examples.evidence run mechanism", "runs": 11, "circumstances": "2026.", "words": words}
    (root / "results" / "mechanism.json").write_text(json.dumps(note))
    report.write(root, root / "docs" / "evidence.md")
    return root / "docs" / "evidence.md"


def test_the_page_renders_without_a_number_that_is_none(page: Path) -> None:
    text = page.read_text()
    assert "## 1. Mechanism" in text and "make evidence" in text and "python -m examples.evidence run mechanism" in text
    assert not re.search(r"\b[nN]a[nN]\b|\bNone\b|\binf\b", text)
    for arm in ARMS.glob("*.toml"):
        assert f"| `{arm.stem}` |" in text


def test_every_link_leads_to_a_plot_that_is_no_accident(page: Path) -> None:
    links = re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    assert len(links) == 4
    for link in links:
        assert "<svg" in (page.parent / link).read_text()
    before = {link: (page.parent / link).read_bytes() for link in links}
    report.write(page.parent.parent, page)
    assert {link: (page.parent / link).read_bytes() for link in links} == before


def test_a_table_says_n_and_pairs_seeds(tmp_path: Path) -> None:
    results = Results({"mechanism": ROWS}, tmp_path)
    text = results.comparison("mechanism", "random-0.6", "answer_nats", False, {"kept_wrong": "kept: wrong"})
    lines = {line.split(" | ")[0].strip("| `"): line for line in text.splitlines()}
    # seeds 1, 2, 3 at step 20: level + 0.1, 0.2, 0.3 - 0.2; differences between arms do not depend on the seed
    assert "2.000 ± 0.100 (n=3)" in lines["clm"] and "| – | −0.500 ± 0.000 (n=3; 3 of 3 −)" in lines["clm"]
    assert "−0.300 ± 0.000 (n=3; 3 of 3 −) | −0.800 ± 0.000 (n=3; 3 of 3 −)" in lines["guided"]
    # at step 10 guided is at level 1.7 + seed / 10 - 0.1: as good as clm's last already
    assert "step 10, 1e+10 + 2e+08 of the teacher FLOPs (3 of 3)" in lines["guided"]
    assert "never (0 of 3)" in lines["random"]
    assert "1.900 (n=1) | −0.000 (n=1) |" in lines["chunk-16"] or "1.900 (n=1) | +0.000 (n=1) |" in lines["chunk-16"]
    assert all("(n=" in line for line in text.splitlines()[2:])


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    results = Results({"mechanism": [row("guided", 1, 10, 1.0)]}, tmp_path)
    text = results.comparison("mechanism", "random-0.6", "answer_nats", False, {"never_scored": "other"})
    assert text.splitlines()[-1] == "| `guided` | 0.002 | 1.000 (n=1) | – | – | – | – |"
    assert results.curves("mechanism", "random-0.6", "never_scored", "nothing") == "" and not list(tmp_path.iterdir())


def test_conclusions_stand_on_the_page_of_the_numbers_that_they_speak_of_alone(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "CONCLUSIONS", tmp_path / "conclusions")
    root = page.parent.parent
    assert page.read_text().count("Nothing has been concluded of these results") == 2
    for path in report.write(root, page):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"It works, says {path.stem}.\n")
    assert report.write(root, page) == []
    text = page.read_text()
    assert "It works, says summary-" in text and "It works, says mechanism-" in text and "Nothing has been concluded" not in text

    def others(field: str, value: Any) -> int:
        """How many conclusions are lacking where one number is another one."""
        (tmp_path / "results").mkdir(exist_ok=True)
        changed = [*ROWS[:-1], ROWS[-1] | {field: {**ROWS[-1][field], **value}}]
        (tmp_path / "results" / "mechanism.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        (tmp_path / "results" / "mechanism.json").write_bytes((root / "results" / "mechanism.json").read_bytes())
        return len(report.write(tmp_path, tmp_path / "evidence.md"))

    assert others("scores", {"answer_nats": 1.4999}) == 2 and "It works" not in (tmp_path / "evidence.md").read_text()
    assert others("costs", {"teacher_flops": 1.0}) == 0 and "It works" in (tmp_path / "evidence.md").read_text()


def test_conclusions_in_the_repository_speak_of_the_numbers_in_the_repository() -> None:
    results = {path.stem: report.load(path) for name in EXPERIMENTS if (path := PUBLISHED / f"{name}.jsonl").exists()}
    expected = {f"{name}-{report.digest(rows)}.md" for name, rows in results.items()}
    expected.add(f"summary-{report.digest([row for rows in results.values() for row in rows])}.md")
    assert {path.name for path in report.CONCLUSIONS.glob("*.md")} == expected
    assert "Nothing has been concluded" not in report.PAGE.read_text()


def test_without_results_there_is_no_page_and_the_old_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "evidence.md"
    page.write_text("what was found before")
    with pytest.raises(report.NoResults, match=r"typo/results has no results"):
        report.write(tmp_path / "typo", page)
    assert page.read_text() == "what was found before"
    monkeypatch.setattr(report, "PAGE", page)
    assert command.main(["report", "--root", str(tmp_path / "typo")]) == 2
    assert "typo/results has no results" in capsys.readouterr().err and page.read_text() == "what was found before"


@pytest.mark.parametrize("option", ["--workers", "--seeds"])
@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_no_workers_or_seeds_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["run", option, value])
    assert f"argument {option}: a number of at least 1, not {value!r}" in capsys.readouterr().err


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


def test_the_table_of_arms_quotes_their_files() -> None:
    table = arms_table()
    assert "| `keep-0.2` | A fifth is kept. | `keep = 0.2`, teacher `cached` |" in table
    assert len(table.splitlines()) == 2 + len(list(ARMS.glob("*.toml")))
