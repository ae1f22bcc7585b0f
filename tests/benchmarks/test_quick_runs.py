"""Every benchmark runs in its quick form, and the documentation has the lines that it writes."""

from __future__ import annotations

import multiprocessing
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import (
    engine,
    head,
    loader,
    numerics,
    page,
    preprocess,
    score_memory,
    scoring,
    sequence,
    startup,
    step,
)
from tests.tokenizers_for_tests import package_folder

long = pytest.mark.long
slow = pytest.mark.slow


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a benchmark are forked from one that has imported what they need."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.engine_arms", "benchmarks.step_arms", "tests.forked"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


def labels(text: str) -> set[str]:
    """The first cell of each line of the tables, with # for every number."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    return {re.sub(r"\d[\d.,]*", "#", line.split(" | ")[0]) for line in lines}


def documented(name: str) -> str:
    text = "".join(file.read_text(encoding="utf-8") for file in (page.PAGE, page.APPENDIX))
    return text.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]


def check(name: str, written: str, lines: int) -> None:
    assert len(labels(written)) >= lines
    assert labels(written) <= labels(documented(name))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="older torch has no fused loss")
def test_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    for constant, value in (("N", 256), ("H", 32), ("V", 500), ("KEPT", 102)):
        monkeypatch.setattr(numerics, constant, value)
    table = numerics.table()
    check("numerics", table, 4)
    assert re.search(r"float32 logits \| \de-0[5-9] \| 0 \|", table)


@long
@slow
@pytest.mark.usefixtures("forks")
def test_preprocess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.md"
    small = replace(preprocess.QUICK, corpus=preprocess.MB, slow=preprocess.MB // 4, long_line=preprocess.MB // 4)
    monkeypatch.setattr(preprocess, "QUICK", small)
    # a teacher with a small vocabulary, because it is opened fifteen times, and without user-defined pieces, for gigatoken
    teacher = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
    preprocess.main(["--quick", "--teacher", str(teacher), "--scratch", str(tmp_path), "--page", str(file)])
    written = file.read_text(encoding="utf-8")
    check("preprocess", written, 12)
    assert str(tmp_path) not in written and str(teacher.parent.parent) not in written


@long
@slow
def test_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.md"
    for constant, value in (("PAGE", file), ("DOCUMENTS", 1000 * loader.SHARDS), ("ROWS", 100), ("ROUNDS", 1)):
        monkeypatch.setattr(loader, constant, value)
    loader.main(["--quick", "--write"])
    check("loader", file.read_text(encoding="utf-8"), 3)


@long
@slow
def test_startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.md"
    monkeypatch.setattr(startup, "PAGE", file)
    monkeypatch.setattr(startup, "demo", list)
    startup.main(["--quick", "--write"])
    written = file.read_text(encoding="utf-8")
    check("startup", written, 4)
    assert "the first step" in written


@long
@slow
@pytest.mark.usefixtures("forks")
def test_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.md"
    monkeypatch.setattr(head, "CASES", [replace(head.CASES[0], peers=())])
    monkeypatch.setattr(head, "APPENDIX", file)
    head.main(["--quick", "--write"])
    check("head", file.read_text(encoding="utf-8"), 2)


@long
@slow
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("benchmark", "lines"), [(step, 8), (engine, 5)], ids=["step", "engine"])
def test_step_and_engine(benchmark: ModuleType, lines: int, tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    benchmark.main(["--quick", "--write", str(file)])
    written = file.read_text(encoding="utf-8")
    check(benchmark.__name__.removeprefix("benchmarks."), written, lines)
    assert str(tmp_path) not in written


@long
@slow
def test_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "RANKS", (1, 2))
    figures = sequence.measure(512)
    check("sequence", page.markdown(figures), 2)
    assert 0.4 < float(figures[1].measured.split(" ×")[0]) < 1


@long
@slow
def test_scoring(tmp_path: Path) -> None:
    figures = scoring.scoring_figures(tmp_path, None, rounds=1, quick=True) + scoring.reading_figures(tmp_path, quick=True)
    check("scoring", page.markdown(figures), 7)
    assert 0.2 < float(figures[1].measured.split(" ×")[0]) < 2


@long
@slow
def test_score_memory(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    assert score_memory.main(["--quick", "--write", str(file)]) == 0
    check("score_memory", file.read_text(encoding="utf-8"), 1)
