"""Execute the Python of docs/reference.md in the order of the page, and compare its output with the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno import corpus, objective
from tests.library.naive import Naive
from tests.runs import REPOSITORY

PAGE = REPOSITORY / "docs" / "reference.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(
    demo: Path, naive: Naive, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    monkeypatch.syspath_prepend(REPOSITORY)  # as `python` from the repository's root would have it
    names: dict[str, Any] = {}
    printed, compared = "", 0
    for kind, content in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "text":
            assert printed == content
            compared += 1
        else:
            capsys.readouterr()
            exec(compile(content, PAGE.name, "exec"), names)
            printed = capsys.readouterr().out
    assert compared == 3

    # the first batch of the loop in plain torch, before any update
    kept = naive.kept([example["text"] for example in names["texts"][:4]])
    assert names["losses"][0] == pytest.approx(sum(kept).item() / len(kept), rel=1e-5)
    # the second batch: the update on the first one must have lowered its loss
    untaught = naive.kept([example["text"] for example in names["texts"][4:8]])
    assert len(names["losses"]) == 2 and names["losses"][1] < sum(untaught).item() / len(untaught) - 1e-3


def test_the_page_uses_only_the_stable_interface() -> None:
    page = PAGE.read_text(encoding="utf-8")
    stable = set(re.findall(r"^\| `(megatron_vocagno\.[\w.]+)` \|", page.split("\n## ")[2], re.MULTILINE))
    imported = re.findall(r"^from (megatron_vocagno\S*) import (.+)$", page, re.MULTILINE)
    assert {module for module, _ in imported} == stable
    named = {name for module, names in imported if module.count(".") == 1 for name in names.split(", ")}
    assert named <= {*objective.__all__, *corpus.__all__} and len(named) > 8
