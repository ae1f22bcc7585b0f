"""The README's run file, in pieces on the page, is one that loads; its order of sections is the one it promises."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from megatron_vocagno.run_file import load_run
from tests.runs import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_pieces_of_a_run_file_make_one(tmp_path: Path) -> None:
    pieces = re.findall(r"```toml\n(.*?)```", README, re.S)
    assert len(pieces) == 3
    text = "".join(pieces)
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    run = load_run(tmp_path / "run.toml")
    assert run.teacher[0].path == Path(tomllib.loads(text)["teacher"]["path"])
    assert (run.data.row_length, run.training.tokens, run.parallel.pipeline_stages) == (2048, 15_000_000_000, 0)


def test_bringing_ones_own_takes_five_lines_each() -> None:
    section = README.split("## Bring your own")[1].split("\n## ")[0]
    subjects = re.findall(r"\*\*A (corpus|teacher|student)\*\*.*?```\w*\n(.*?)```", section, re.S)
    assert [subject for subject, _ in subjects] == ["corpus", "teacher", "student"]
    assert all(len(lines.splitlines()) <= 5 for _, lines in subjects)
