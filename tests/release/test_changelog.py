"""The version has one owner, and the changelog knows it."""

from __future__ import annotations

import re
from datetime import date

import megatron_vocagno
from tests.runs import REPOSITORY

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def test_the_newest_release_of_the_changelog_is_the_version() -> None:
    unreleased, newest, *_ = HEADING.findall((REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"))
    version, day = newest.split(" - ")
    assert (unreleased, version) == ("Unreleased", megatron_vocagno.__version__)
    assert date.fromisoformat(day)


def test_no_other_file_repeats_the_version() -> None:
    assert megatron_vocagno.__version__ not in (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", megatron_vocagno.__version__)
