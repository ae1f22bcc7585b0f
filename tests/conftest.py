"""Fixtures that several folders of tests share; each is made once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.datasets import dataset, made_once, teacher_tokenizer
from tests.runs import Case, build_case, build_small_case

__all__ = ["dataset", "teacher_tokenizer"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell's `make test &` ignores Ctrl-C, and so would the commands whose Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is loaded
def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores, because a test that waits for processes or for time leaves its core to another."""
    return len(os.sched_getaffinity(0)) + 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that quick ones fill the end, when the first workers have nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Case:
    """A tiny student and a tiny teacher with real vocabularies, on real text; runs with a name are made once."""
    return Case.of(made_once(tmp_path_factory, "runs", lambda folder: build_case(folder, teacher_tokenizer)))


@pytest.fixture(scope="session")
def small_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The same with small vocabularies, for tests that compare runs: a run takes a fraction of the time."""
    return build_small_case(tmp_path_factory.mktemp("small_runs"))
