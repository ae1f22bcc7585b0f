"""The run file of the README loads."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_vocagno.compat import tomllib
from megatron_vocagno.run_file import load_run
from tests.runs import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_run_file_is_one(tmp_path: Path) -> None:
    [text] = re.findall(r"```toml\n(.*?)```", README, re.S)
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    run = load_run(tmp_path / "run.toml")
    assert run.teacher[0].path == Path(tomllib.loads(text)["teacher"]["path"])
    assert (run.data.row_length, run.training.tokens, run.output) == (2048, 15_000_000_000, Path("runs/mine"))
