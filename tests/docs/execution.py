"""Commands of the documentation, executed as they are written: in a folder where everything that they name is there, but small.

Names that stand for something (RUN.toml, DATASET, S for the student's tokenizer) are files and folders of those names, so a
command needs no words put in but for numbers. Our own programs run in this process by their `main`, training by the ranks of
`tests.runs.spawn`, everything else in a shell.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import orjson
import pyarrow as pa
import pyarrow.parquet
import pytest
from backports import zstd

from tests import tokenizers_for_tests as real
from tests.runs import REPOSITORY, Case, environment, spawn

TRAINING = "examples/pretrain_vocagno.py"
HUB = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B-Instruct"
# document 81 of what `make demo` writes begins so, and has more than a hundred tokens: docs/first_run.md shows its alignment
DOCUMENT_81 = 5 * (
    "The product of three positive real numbers is 1, and their sum is greater than the sum of their reciprocals. How many of "
    "them can be greater than 1?\n"
)


def texts_of_documents() -> list[str]:
    """Short ones, for a teacher with a real vocabulary reads them all."""
    return [text[:80] for text in real.texts()[:81]] + [DOCUMENT_81] + real.multilingual_texts()


def furnish(folder: Path, case: Case, run: Path, student: Path, dataset: Path) -> None:
    """What the commands name, in `folder`. run: a finished one; student: a Hugging Face folder; dataset: not scored."""
    texts = texts_of_documents()
    for name, text in {"train": texts, "heldout": texts[:20]}.items():
        _write(folder / ".demo" / "corpus" / f"{name}.jsonl", _json_lines(text))
    for name in ("INPUT", "CORPUS", "corpus.jsonl"):
        _write(folder / name, _json_lines(texts[:20]))
    _write(folder / "corpus" / "part.jsonl.zst", zstd.compress(_json_lines(texts[:20])))
    for i, number in enumerate(("00000", "00100", "00110", "00113")):
        place = folder / "corpus" / "openwebmath" / "data" / f"train-{number}-of-00114.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.table({"text": texts[10 * i : 10 * i + 10]}), place)
    _write(folder / "first.toml", _first_run().encode())
    for name in ("examples", "requirements"):
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "ds_configs", folder / "ds_configs")
    for name in ("X.json", "ds_configs/X.json"):
        shutil.copy(run.parent / "ds.json", folder / name)
    _write(folder / "RUN.toml", _short((run.parent / "run.toml").read_text(), run).encode())
    models = {"S": student, ".demo/student-hf": student, "models/student": student, HUB[0]: student}
    models |= dict.fromkeys(("T", "TEACHER", "models/teacher", ".demo/teacher", *HUB[1:]), case.teacher)
    runs = dict.fromkeys(("OUTPUT", "RUN_DIR", ".demo/run"), run)
    runs["runs/qwen2.5-math-instruct/checkpoints"] = run / "checkpoints"
    kept = {"A": case.train, "B": case.valid, ".demo/data/heldout": dataset}
    for name, target in (models | runs | kept).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    for name in ("DATASET", "DATA", "data/train"):
        shutil.copytree(dataset, folder / name)  # scoring writes there


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _json_lines(texts: Sequence[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)


def _short(run_file: str, run: Path) -> str:
    """The run's file for another run of a step, which writes elsewhere."""
    return run_file.replace(f'"{run}"', '"runs/mine"').replace("steps = 5", "steps = 1").replace("rows = 12", "rows = 4")


def _first_run() -> str:
    """The run file that docs/first_run.md shows, made small."""
    page = (REPOSITORY / "docs" / "first_run.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"```toml\n(output = .*?)```", page, re.DOTALL)
    for long, short in (
        ("steps = 1000", "steps = 1"),
        ("warmup_steps = 100", "warmup_steps = 1"),
        ("_length = 256", "_length = 64"),
    ):
        assert long in shown, long
        shown = shown.replace(long, short)
    return shown


def plain(text: str) -> str:
    """Without what may be left out."""
    return re.sub(r"\s\[[^\]]*\]", "", text).replace("INPUT...", "INPUT")


def variants(text: str) -> Iterator[str]:
    """The command without what may be left out, and with each such part and each of its alternatives alone."""
    yield plain(text)
    for optional in re.findall(r"\s\[([^\]]*)\]", text):
        for alternative in optional.split(" | "):
            yield plain(text) + " " + re.sub(r"\b[A-Z]\b", "1", alternative)


def execute(text: str, folder: Path) -> str:
    """Run a command in `folder`; what it printed. Fails where the command does, and where it left nothing at its --out."""
    words = shlex.split(plain(text))
    with pytest.MonkeyPatch.context() as patch:  # contextlib.chdir needs Python 3.11
        patch.chdir(folder)
        code, printed = _run(words, text)
    assert not code, f"exit code {code}: {text}\n{printed[-3000:]}"
    results = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--out"]
    if not _starts_nothing(words):
        results += [word.removeprefix("output=") for word in words if word.startswith("output=")]
    assert all((folder / result).exists() for result in results), f"nothing at {results}: {text}"
    return printed


def _run(words: list[str], text: str) -> tuple[int, str]:
    if words[0] in ("deepspeed", "torchrun") or TRAINING in words[:2]:
        count, words = _ranks_of(words)
        if words[0] == TRAINING and not _starts_nothing(words):
            finished = spawn(count, words[1:], folder=Path.cwd())
            return finished.returncode, finished.stdout
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)]
        ended = [_in_process(words, variables) for variables in ranks]
        return max(code for code, _ in ended), "".join(printed for _, printed in ended)
    if words[:2] == ["python", "-m"] and words[2] != "pip":
        return _in_process(words[1:], {})
    shell = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env=environment(PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return shell.returncode, shell.stdout


def _starts_nothing(words: list[str]) -> bool:
    return "--dry-run" in words or "--print-config" in words


def _ranks_of(words: list[str]) -> tuple[int, list[str]]:
    """How many processes a launcher would start, two at most, and what they would run."""
    asked = re.search(r" --(?:num_gpus|nproc_per_node) (\d+)", " ".join(words))
    names = ("--num_gpus", "--nproc_per_node")
    rest = [word for i, word in enumerate(words) if i and word not in names and words[i - 1] not in names]
    return min(2, int(asked[1])) if asked else 1, ["-m" if word == "--module" else word for word in rest]


def _in_process(words: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """words: -m MODULE ARGUMENTS, or the training script and its arguments."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch("os.cpu_count", return_value=1),  # so many workers are the default, and one needs no process of its own
        mock.patch.object(sys, "argv", words[1:] if words[0] == "-m" else words),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            code = _main_of(words)()
        except SystemExit as ended:
            code = ended.code
    return code if isinstance(code, int) else int(code is not None), printed.getvalue()


def _main_of(words: list[str]) -> Callable[[], Any]:
    name = words[1] if words[0] == "-m" else "megatron_vocagno.pretrain"
    module = importlib.import_module(name)
    main: Callable[[], Any] = getattr(module, "main", None) or importlib.import_module(f"{name}.__main__").main
    return main


class _UnderstoodError(Exception):
    """A command's own parser has taken its arguments; nothing more is to be done."""


def parse(text: str) -> None:
    """Give a command of ours, with each of its optional parts, to its own parser, and run nothing."""
    real_parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: object, **options: object) -> None:
        real_parse(self, *arguments, **options)
        raise _UnderstoodError

    for variant in variants(text):
        words = shlex.split(variant)
        _, words = _ranks_of(words) if words[0] != "python" else (1, words[1:])
        with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
            try:
                _, printed = _in_process(words, {})
            except _UnderstoodError:
                continue
        raise AssertionError(f"its parser refuses it: {variant}\n{printed[-2000:]}")
