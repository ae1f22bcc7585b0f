"""One fake server for all tests of a process. Each test has a server of its own in it, by its name."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.preprocess.score import ScoringOptions, score
from tests.preprocess.scoring.conftest import (  # noqa: F401  fixtures
    CONTEXT,
    STRIDE,
    copy,
    corpus,
    settings,
    teacher,
    unscored,
)
from tests.runs import REPOSITORY, write_teacher

Serve = Callable[[str], str]
Copy = Callable[..., Path]


def start(folders: list[Path]) -> tuple[subprocess.Popen[str], int]:
    """A process that serves until its standard input ends, and its port."""
    command = [sys.executable, "-m", "tests.serving.fake_server", *map(str, folders)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.fixture(scope="session")
def other_teacher(tmp_path_factory: pytest.TempPathFactory, teacher_tokenizer: Path) -> Path:
    """Other weights of the same shape, which are surer."""
    return write_teacher(tmp_path_factory.mktemp("other") / "teacher", teacher_tokenizer, scale=2.0)


@pytest.fixture(scope="session")
def port(teacher: Path, other_teacher: Path) -> Iterator[int]:  # noqa: F811
    process, number = start([teacher, other_teacher])
    yield number
    process.communicate()


@pytest.fixture(scope="session")
def count() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def serve(port: int, count: Iterator[int]) -> Serve:
    """The URL of a new server: ENGINE+FAULT+FAULT=NUMBER."""

    def url(name: str) -> str:
        engine, plus, faults = name.partition("+")
        return f"http://127.0.0.1:{port}/{engine}-{next(count)}{plus}{faults}"

    return url


@pytest.fixture(scope="session")
def asked(teacher: Path) -> ScoringOptions:  # noqa: F811
    """One window per forward, as the server reads them."""
    return ScoringOptions(teacher, "float32", context=CONTEXT, stride=STRIDE, tokens_per_batch=1)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory, unscored: AlignedDataset, asked: ScoringOptions) -> Path:  # noqa: F811
    """Scored in this process, one window at a time."""
    folder = shutil.copytree(unscored.path, tmp_path_factory.mktemp("local") / "dataset")
    score(folder, asked)
    return folder


def losses_of(folder: Path) -> dict[str, bytes]:
    files = [*folder.rglob("teacher_loss.bin"), *folder.rglob("teacher_loss.idx")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
