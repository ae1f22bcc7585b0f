"""What holds for every command: help that fits a screen and speaks for itself, one way to end, no more words than asked for."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, get_args

import psutil
import pytest
from rich.console import Console

from megatron_vocagno import command
from megatron_vocagno.command import Parser, duration, imports_for_good, run_command
from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.encoders import Backend
from megatron_vocagno.errors import RunError, RunLockedError
from megatron_vocagno.preprocess.plan import SHARD_BYTES
from megatron_vocagno.preprocess.shard_writer import OnBadLine
from megatron_vocagno.training.monitor import Monitor
from tests.runs import REPOSITORY, SCRIPT, Case, environment
from tools.preprocess import build_dataset, console
from tools.preprocess.console import WorkProgress
from tools.preprocess.progress import BuildProgress

PAGE = REPOSITORY / "docs" / "reference.md"
NOT_FOR_USERS = {"benchmarks.trl_gold"}
"""Started by another command alone."""
QUICK = {  # command -> its first words; they tell their help without torch
    "examples.pretrain_vocagno": ["", "--dry-run"],
    "megatron_vocagno.pretrain": ["", "--dry-run"],
    "megatron_vocagno.plan": [""],
    "megatron_vocagno.export": [""],
    "tools.preprocess.build_dataset": ["", "plan", "finalize", "verify", "merge"],
    "tools.preprocess.score_teacher": ["", "texts", "finalize"],
    "tools.preprocess.show_document": [""],
    "tools.preprocess.report": [""],
    "tools.convert.gguf_to_safetensors": [""],
    "examples.demo.corpus": [""],
}
OTHERS = ["examples.evidence.__main__", "benchmarks.gpu.__main__"]
OTHERS += [f"benchmarks.{name}" for name in ("preprocess", "loader", "selection", "head", "numerics", "prove_same_loss")]
HELPS = [(name, word) for name, words in QUICK.items() for word in words] + [(name, "") for name in OTHERS]
SCREEN = 40, 100
"""Lines, columns."""
UNITS = (
    r"\b(steps|seconds|minutes|tokens?|positions|documents?|processes|requests?|tries|windows|MB|share|GPUs?|seeds?|runs|turns|"
    r"checkpoints|the I-th of N|texts?)\b"
)


class Parsed(Exception):
    """The parser has been made, and what follows is left."""


def parser_of(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> Parser:
    made: list[Parser] = []

    def leave(parser: Parser, *_: object) -> NoReturn:
        made.append(parser)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(Parser, "parse_args", leave)
        patched.setenv("COLUMNS", str(SCREEN[1]))
        with pytest.raises(Parsed):
            importlib.import_module(name).main(word.split())
    return made[0]


# ---- the page


def commands() -> Iterator[str]:
    """As a user writes them: a module, or a path."""
    for folder in ("megatron_vocagno", "tools", "examples", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            where = path.relative_to(REPOSITORY)
            if path.suffix in (".sh", ".sbatch"):
                yield where.as_posix()
            elif path.suffix == ".py" and '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                module = ".".join(where.with_suffix("").parts).removesuffix(".__main__")
                is_script = folder == "examples" and path.stem != "__main__"
                yield where.as_posix() if is_script else module


def test_the_page_has_every_command_and_no_other() -> None:
    part = PAGE.read_text(encoding="utf-8").split("\n## ")[1]
    assert part.startswith("Commands\n")
    rows = [line for line in part.splitlines() if line.startswith(("| [`", "| `"))]
    rows = [row for row in rows if re.match(r"\| \[?`(\w+[./])+\w+", row)]
    shown = [name for row in rows for name in re.findall(r"`([\w./]+)`", row.split(" | ")[0])]
    # the launcher wants a file, and a module is found from anywhere: the page names both
    assert sorted([*shown, "megatron_vocagno.pretrain"]) == sorted(set(commands()) - NOT_FOR_USERS)
    assert len(shown) > 25


# ---- help


@pytest.mark.parametrize(("name", "word"), HELPS)
def test_help_fits_a_screen_and_its_example_works(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(name, word, monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")  # more than a screen has
    lines = parser.format_help().splitlines()
    assert len(lines) <= SCREEN[0] and max(map(len, lines)) <= SCREEN[1], max(lines, key=len)
    assert parser.format_usage().startswith(f"usage: {parser.prog} ")
    assert re.fullmatch(r"[A-Z].+\.", " ".join(lines[2 : lines.index("example:")]).strip())
    assert re.search(r"exit codes: 0 .*[;,] 2 .*[;,] 130 Ctrl-C$", " ".join(lines))
    example = "\n".join(lines).split("example:\n")[1].split("\n\n")[0]
    examples = [shlex.split(line) for line in example.replace("\\\n", " ").splitlines()]
    met = 0
    for words in examples:
        rest = arguments_after(parser.prog, words)
        parser.parse_args(rest)  # ends the test with SystemExit where it is no example
        # an installation has only the package
        installed = name.startswith(("megatron_vocagno.", "tools.")) or name == "examples.pretrain_vocagno"
        assert not installed or not re.search(r"\b(examples|ds_configs|docs)/", shlex.join(rest)), shlex.join(rest)
        met += 1
    assert met == len(examples) > 0


def arguments_after(prog: str, words: Sequence[str]) -> list[str]:
    """What follows the command and, of a launcher, its options."""
    last = prog.split()[-1]
    assert last in words, f"{last} is not in {shlex.join(words)}"
    return list(words[words.index(last) + 1 :])


@pytest.mark.parametrize(("name", "word"), HELPS)
def test_every_number_has_a_unit_and_a_default(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for action in parser_of(name, word, monkeypatch)._actions:
        kind = getattr(action.type, "__name__", "")
        told = action.help or ""
        if told == argparse.SUPPRESS:
            continue
        assert told, f"{action.option_strings} says nothing"
        if kind in ("int", "float", "positive_int", "positive_float", "fraction", "slice_of", "row_length"):
            assert re.search(UNITS, told), f"no unit: {action.option_strings} {told}"
            assert "(default: " in told or "(required)" in told or action.metavar == "I/N", f"no default: {told}"
        if action.required and action.option_strings:
            assert "(required)" in told


def test_options_of_one_name_are_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, set[str]] = {}
    for name, word in HELPS:
        for action in parser_of(name, word, monkeypatch)._actions:
            for option in action.option_strings:
                kinds.setdefault(option, set()).add(type(action).__name__)
    assert {option: kind for option, kind in kinds.items() if len(kind) > 1} == {}
    assert len(kinds) > 60
    # one thing, one name
    assert not {"--output", "--output-dir", "--jobs", "--num-workers", "--overwrite", "--verbosity", "--silent"} & kinds.keys()
    assert [option for option in kinds if "_" in option] == ["--deepspeed_config", "--local_rank"]  # DeepSpeed's own


SLOW = {"torch", "transformers", "deepspeed", "tensorboard", "gguf", "numpy", "pydantic", "rich", "fsspec", "jinja2"}
"""Packages that take from 0.05 to 2 seconds to import."""


def test_help_and_mistakes_come_before_anything_slow_is_imported() -> None:
    """In one process: what any of them imports would be seen."""
    program = f"""
import contextlib, importlib, io, sys
for name, words in {QUICK!r}.items():
    main = importlib.import_module(name).main
    for word in words:
        for argument, code in (("--help", 0), ("--nope", 2)):
            told = io.StringIO()
            try:
                with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                    main([*word.split(), argument])
            except SystemExit as left:
                assert left.code == code, (name, word, argument, left.code, told.getvalue())
            assert ("usage: " if code == 0 else "error: ") in told.getvalue()
print(sorted({SLOW!r} & sys.modules.keys()))
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (finished.stdout, finished.stderr) == ("[]\n", "")


def test_the_choices_and_defaults_of_a_build_are_those_of_its_module() -> None:
    """Help does not import them."""
    assert (tuple(build_dataset.BACKENDS), tuple(build_dataset.ON_BAD_LINE)) == (get_args(Backend), get_args(OnBadLine))
    assert build_dataset.plan_parser().get_default("shard_mb") * 2**20 == SHARD_BYTES


def test_imports_are_not_searched_for_garbage_and_what_follows_is() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    try:
        with imports_for_good():
            assert not gc.isenabled()
            imported = Cycle()
        assert gc.isenabled() and gc.get_freeze_count() > 0
        assert all(thing is not imported for thing in gc.get_objects())
        left = weakref.ref(Cycle())
        gc.collect()
        assert left() is None
        frozen = gc.get_freeze_count()
        with pytest.raises(ImportError), imports_for_good():
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("script", ["evaluate.sh", "launch/node.sh", "launch/run_forever.sh"])
def test_scripts_print_their_help(script: str) -> None:
    finished = subprocess.run([REPOSITORY / "examples" / script, "--help"], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (
        Path(script).name in finished.stdout and "xit code" in finished.stdout and len(finished.stdout.splitlines()) <= SCREEN[0]
    )


# ---- how a command ends


def fail(error: BaseException) -> Callable[[], int]:
    def do() -> int:
        raise error

    return do


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (RunError("the data is gone"), 2, "error: the data is gone\n"),
        (RunLockedError("another run"), 1, "error: another run\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted; go on\n"),
    ],
)
def test_an_end_is_one_line_and_an_exit_code(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(fail(error), "go on") == code
    assert capsys.readouterr() == ("", told)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command, "RANK0_SECONDS", 0.0)
    assert run_command(fail(error), "go on") == code
    # another rank's error may be its own; that somebody pressed Ctrl-C is said once
    assert capsys.readouterr().err == ("" if code == 130 else told)


def test_an_error_that_is_not_the_users_keeps_its_traceback() -> None:
    for error, errors in ((AssertionError("ours"), (RunError,)), (OSError("the disk"), (RunError,))):
        with pytest.raises(type(error)):
            run_command(fail(error), errors=errors)
    assert run_command(lambda: None) == 0 and run_command(lambda: 75) == 75


def test_under_a_launcher_only_rank_0_prints_errors_and_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RANK0_SECONDS", 0.0)
    main = importlib.import_module("megatron_vocagno.pretrain").main
    for rank, count in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        for words, code in ((["run.toml", "--nope"], 2), (["--help"], 0)):
            with pytest.raises(SystemExit) as left:
                main(words)
            captured = capsys.readouterr()
            assert left.value.code == code and (captured.out + captured.err).count("usage: ") == count


def test_a_closed_pipe_ends_a_command_silently(dataset: AlignedDataset) -> None:
    """As `| head` does; by rich and by print."""
    for words in (["show_document", str(dataset.path)], ["build_dataset", "verify", str(dataset.path), "--workers", "1"]):
        read, write = os.pipe()
        os.close(read)
        program = [sys.executable, "-m", f"tools.preprocess.{words[0]}", *words[1:]]
        finished = subprocess.run(program, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
        os.close(write)
        assert (finished.returncode, finished.stderr) == (141, ""), words


def test_threads_that_are_left_do_not_change_the_exit_code() -> None:
    """As those of a process group that nobody has left."""
    for code in (2, 130):
        program = "import atexit, os; atexit.register(os.abort); from megatron_vocagno.pretrain import exit_process; "
        program += f"exit_process({code})"
        assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=60).returncode == code


# ---- Ctrl-C


def eventually(found: Callable[[], object], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not found():
        time.sleep(0.02)
    return bool(found())


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and error stream after Ctrl-C, which a terminal sends to the whole group."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_ctrl_c_ends_a_verification_with_its_workers(dataset: AlignedDataset) -> None:
    words = [sys.executable, "-m", "tools.preprocess.build_dataset", "verify", str(dataset.path), "--workers", "2"]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    command_ = psutil.Process(process.pid)
    assert eventually(lambda: len(command_.children()) >= 2 or process.poll() is not None)
    workers = command_.children()
    assert workers and interrupted(process) == (130, "interrupted; nothing was written\n")
    assert eventually(lambda: not any(worker.is_running() for worker in workers), 10)


def test_a_scoring_that_is_interrupted_goes_on(
    dataset: AlignedDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.preprocess import score_teacher

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.preprocess.score_commands.score_dataset", stop)
    assert score_teacher.main([str(dataset.path), "--teacher", str(dataset.path)]) == 130
    assert capsys.readouterr().err == "interrupted; scored shards are kept; run the same command again to continue\n"


@pytest.mark.slow
def test_ctrl_c_ends_a_training_in_a_line(case: Case) -> None:
    words = [sys.executable, SCRIPT, *case.command("interrupted", ["training.steps=1000", "eval.rows=2"])]
    process = subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert any(line.startswith("step ") for line in process.stdout)
    code, errors = interrupted(process)
    assert (code, errors) == (
        130,
        "interrupted; run the same command again to resume from the newest complete checkpoint, if there is one\n",
    )


# ---- how much is told


def test_quiet_leaves_the_result(dataset: AlignedDataset, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    corpus = dataset.path.parent / "corpus.jsonl"
    tokenizers = [
        "--student",
        str(dataset.path / "tokenizers" / "student"),
        "--teacher",
        str(dataset.path / "tokenizers" / "teacher"),
    ]
    told = {}
    for how in ("--quiet", "--verbose"):
        words = [str(corpus), *tokenizers, "--out", str(tmp_path / how), "--workers", "1", "--max-documents", "3"]
        assert build_dataset.main([*words, how]) == 0
        told[how] = capsys.readouterr().out
    assert "shard 1/1: 0000 3 documents" in told["--verbose"] and re.search(r" in \d+s\n", told["--verbose"])
    assert "shard" not in told["--quiet"].replace("in 1 shard", "") and "note:" not in told["--quiet"]
    assert "3 in 1 shard" in told["--quiet"] and "3 in 1 shard" in told["--verbose"]


def test_one_shard_is_not_plural(dataset: AlignedDataset, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    corpus, tokenizers = dataset.path.parent / "corpus.jsonl", dataset.path / "tokenizers"
    words = [
        str(corpus),
        "--student",
        str(tokenizers / "student"),
        "--teacher",
        str(tokenizers / "teacher"),
        "--max-documents",
        "1",
    ]
    assert build_dataset.main(["plan", *words]) == 0
    assert build_dataset.main([*words, "--out", str(tmp_path / "one"), "--workers", "1"]) == 0
    assert build_dataset.main(["verify", str(tmp_path / "one"), "--workers", "1"]) == 0
    told = capsys.readouterr().out
    for line in ("1 shard, about ", "0000 1 document, ", "1 in 1 shard (0 reused)", "1 document in 1 shard is intact\n"):
        assert line in told
    assert not re.search(r"\b1 (shards|documents|files)\b", told)


def test_a_quiet_run_prints_only_problems_and_the_result(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 1, 1, quiet=True)
    with monitor.writing(0):
        monitor.print("starting")
        monitor.step(1, {"loss/train": 1.0})
        monitor.log_exit(1, 0)
    assert capsys.readouterr().out == "finished: step 1 was the last one\n"


# ---- progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.seconds)
    return now


def test_durations_are_short() -> None:
    times = {0: "0s", 44.6: "45s", 59.6: "1m00s", 200: "3m20s", 3599: "59m59s", 4320: "1h12m", 86_400: "1d00h", 357_000: "4d03h"}
    assert {seconds: duration(seconds) for seconds in times} == times


@pytest.mark.parametrize(("verbose", "every"), [(False, 30), (True, 5)])
def test_plain_lines_come_at_an_interval_with_what_is_left(
    verbose: bool, every: int, clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = WorkProgress(Console(), "reading", verbose)
    progress.start()
    for second in range(1, 101):
        clock.seconds = 1000.0 + second
        progress.show("shard 1/4", second, 400, "1 a second")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100 // (every + 1)
    assert lines[0] == f"shard 1/4: 1 a second, eta {duration(400 - every - 1)}"


def test_what_was_there_before_does_not_count_as_speed(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten shards of 100 bytes eight are reused at once, and the ninth takes a minute: so will the tenth."""
    progress = BuildProgress(Console())
    jobs: list[Any] = [SimpleNamespace(index=i, name=f"{i:04}", splits=[SimpleNamespace(weight=100)]) for i in range(10)]
    progress.plan(SimpleNamespace(), jobs)  # type: ignore[arg-type]
    totals = SimpleNamespace(documents=7, text_bytes=100, bad_lines=0, broken_inputs=0)
    for i in range(9):
        clock.seconds += 60 * (i == 8)
        result = SimpleNamespace(job=jobs[i], reused=i < 8, record=SimpleNamespace(totals=totals))
        progress.shard(result)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert lines[7] == "shard 8/10: 0007 reused" and lines[8] == "shard 9/10: 0008 7 documents, 0.0 MB, eta 1m00s"


def test_on_a_terminal_a_bar_stands_for_the_lines() -> None:
    for terminal, quiet, shown in ((True, False, True), (False, False, False), (True, True, False)):
        progress = WorkProgress(Console(force_terminal=terminal, quiet=quiet), "reading")
        assert (progress.shown, progress.bar.disable) == (shown, not shown)
