"""Runs in this folder have small vocabularies."""

from __future__ import annotations

import pytest

from tests.runs import Case


@pytest.fixture(scope="session")
def case(small_case: Case) -> Case:
    return small_case
