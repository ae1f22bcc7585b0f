"""The command line, as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.documents import InputError
from tests.corpus.conftest import contents, write_jsonl
from tools.preprocess.build_dataset import input_files, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(settings, tmp_path):
    def arguments(*inputs, out="out", workers=1, **options):
        named = {"student": settings.student, "teacher": settings.teacher, "out": tmp_path / out, "workers": workers} | options
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in named.items()]
        return [str(i) for i in inputs] + flags

    return arguments


def start(arguments) -> subprocess.Popen:
    call = [sys.executable, "-m", "tools.preprocess.build_dataset", *arguments]
    return subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_it_builds_verifies_and_tells(command, corpus, built, tmp_path):
    code, out, err = finish(start([*command(corpus, workers=2, shard_mb=100_000 / 2**20), "--verify"]))
    assert (code, err) == (0, "")
    assert contents(tmp_path / "out") == contents(built.path)
    for word in ("shard 5/5", "documents", "student tokens", "IoS = 100 %", "100.000%", "span width", "bad lines", "0 reused"):
        assert word in out, word


@pytest.mark.slow
def test_a_killed_worker_costs_only_its_shard(command, corpus, built, tmp_path):
    process = start(command(corpus, workers=2, shard_mb=100_000 / 2**20))
    victim = wait_for(lambda: workers_of(process.pid))
    os.kill(victim[0], signal.SIGKILL)
    code, _, err = finish(process)
    assert (code, err) == (0, "")
    assert contents(tmp_path / "out") == contents(built.path)


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (met := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return met


@pytest.mark.slow
def test_errors_of_the_user_are_one_line_and_status_2(command, tmp_path):
    code, out, err = finish(start(command(tmp_path / "missing.jsonl")))
    assert (code, out) == (2, "") and err == f"error: {tmp_path / 'missing.jsonl'}: no such file or folder\n"
    assert not (tmp_path / "out").exists()


def test_each_kind_of_error_is_told_without_a_traceback(command, texts, tmp_path, capsys):
    good = write_jsonl(tmp_path / "good.jsonl", texts[:2])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 1}\n')
    (tmp_path / "folder").mkdir()
    cases = [
        (command(bad), f"{bad}:2: 'text' is a int"),
        (command(good, student=tmp_path / "none"), "no such file or folder"),
        (command(good, teacher_eos="<nope>"), "'<nope>' is not among its 49,152 tokens"),
        (command(tmp_path / "folder"), r"holds no *.jsonl"),
        (command(good, text_key="body"), "no key 'body'"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, message
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and message in captured.err and "Traceback" not in captured.err
        assert not (tmp_path / "out").exists(), message


@pytest.mark.parametrize("flag", ["--workers=0", "--shard-mb=0", "--shard-mb=x", "--engine=cloud", "--on-bad-line=maybe"])
def test_values_that_make_no_sense_are_refused(flag, command, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*command(tmp_path / "x.jsonl"), flag])
    assert stop.value.code == 2


def test_bad_lines_and_reuse_are_reported(command, texts, tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", [*texts[:2], ""])
    with file.open("a") as stream:
        stream.write("broken\n")
    assert main(command(file, on_bad_line="quarantine")) == 0
    out = capsys.readouterr().out
    assert "1 left out" in out and "1 dropped" in out and "(0 reused)" in out
    assert main(command(file, on_bad_line="quarantine")) == 0
    assert "(1 reused)" in capsys.readouterr().out
    assert main([*command(file, on_bad_line="skip")]) == 2
    assert main([*command(file, on_bad_line="skip"), "--force", "--no-nfc", "--verify"]) == 0
    assert not AlignedDataset.open(tmp_path / "out").manifest.nfc


def test_inputs_are_files_folders_and_globs_each_once(tmp_path):
    names = ["b.jsonl", "a.jsonl", "c.txt"]
    b, a, c = (write_jsonl(tmp_path / name, ["x"]) for name in names)
    assert input_files([str(tmp_path)]) == [a, b]
    assert input_files([str(c), str(tmp_path / "*.jsonl"), str(a)]) == [c, a, b]
    with pytest.raises(InputError, match="no such file"):
        input_files([str(tmp_path / "*.parquet")])
