"""The command line, as a user runs it."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.tokens import open_tokenizer
from megatron_vocagno.preprocess.shards import BuildConfig
from tests.corpus.conftest import contents, make, write_jsonl
from tests.corpus.formats import write
from tests.tokenizers_for_tests import mistral_tokenizer_path
from tools.preprocess.build_dataset import main

ROOT = Path(__file__).parents[2]
MISTRAL = str(mistral_tokenizer_path())  # its dummy prefix is a token without text


# ---- as other tests run it, too


def arguments(settings: BuildConfig, *inputs: Path | str, **options: Any) -> list[str]:
    """Words of the command, with the tokenizers of `settings`."""
    named = {"student": settings.student, "teacher": settings.teacher} | options
    return [*map(str, inputs), *(f"--{name.replace('_', '-')}={value}" for name, value in named.items())]


def start(words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.preprocess.build_dataset", *words]
    env = os.environ | options.pop("env", {}) | {"COLUMNS": "150"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def finished(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture
def run(settings, tmp_path, capsys, monkeypatch):
    """Runs it in this process, into `out`. Returns exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "150")

    def call(*words: Path | str, **options: Any) -> tuple[int, str, str]:
        try:
            code = main(arguments(settings, *words, **({"out": tmp_path / "out", "workers": 1} | options)))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


def command(*words: Path | str) -> int:
    """One of the other commands."""
    return main(list(map(str, words)))


# ---- what it tells


@pytest.mark.slow
def test_elsewhere_than_on_a_terminal_it_tells_in_plain_lines(real_settings, corpus, tmp_path):
    words = arguments(real_settings, corpus, out=tmp_path / "out", shard_mb=100_000 / 2**20, workers=1)
    code, out, err = finished(start([*words, "--verify"]))
    assert (code, err) == (0, "") and "\x1b" not in out and "\r" not in out
    lines, table = out.splitlines()[:8], out.splitlines()[8:]
    assert lines[0] == "note: tokenizer backend of the student: gigatoken"
    assert re.fullmatch(r"note: tokenizer backend of the teacher: huggingface \(gigatoken cannot read it: .*\)", lines[1])
    assert lines[2] == (
        "note: the teacher's documents end with <|endoftext|>, not with the tokenizer's <|im_end|>, which ends a chat turn "
        "(as in chat models). To change this, set --teacher-eos"
    )
    shards = [line.split(", eta ") for line in lines[3:]]
    assert {re.sub(r"\d", "N", line[0]) for line in shards} <= {f"shard N/N: NNNN {n} documents, N.N MB" for n in ("N", "NN")}
    assert [re.fullmatch(r"(\d+m)?\d+s", eta) is not None for _, *left in shards for eta in left] == [True] * (len(shards) - 1)
    assert [line.split(":")[0] for line in lines[3:]] == [f"shard {i}/5" for i in range(1, 6)]
    assert {line.split()[2] for line in lines[3:]} == {f"{i:04}" for i in range(5)}
    assert str(tmp_path / "out") in table[0] and len(table) > 10


@pytest.mark.slow
def test_on_a_terminal_it_shows_a_bar(settings, corpus, tmp_path):
    ours, theirs = pty.openpty()
    words = arguments(settings, corpus, out=tmp_path / "out", shard_mb=100_000 / 2**20, workers=2)
    process = start(words, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    for words_shown in ("documents/s", "MB/s", " bad", "shard 5/5", "0:00:00", "IoS = 100 %"):
        assert words_shown in text, words_shown
    assert "shard 1/5:" not in text and "━" in text


def test_the_summary_is_what_one_counts(run, texts, corpus, settings, mistral, tmp_path):
    run = partial(run, tmp_path / "a.jsonl", "--on-bad-line=skip", "--max-bad-fraction=0.01", student=MISTRAL, shard_mb=0.2)
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(corpus.read_bytes() + b'{"text": ""}\n{"text": ""}\n{"text": 3}\n')
    code, out, err = run()
    assert (code, err) == (0, "")
    row = {cells[1].strip(): cells[2].strip() for line in out.splitlines() if len(cells := line.split("│")) == 4}
    nfc = [unicodedata.normalize("NFC", text) for text in texts]
    n_bytes = sum(len(text.encode()) for text in nfc)
    counts = []
    for name, tokenizer in (("student", mistral), ("teacher", open_tokenizer(settings.teacher))):
        n = sum(len(ids) + 1 for ids in (tokenizer.reference.encode([text]).ids for text in nfc))
        assert row[f"{name} tokens"] == f"{n:,}, {n / n_bytes:.3f} per byte"
        counts.append(n)
    assert row["documents"] == "121 in 3 shards (0 reused)" and row["text"] == f"{n_bytes:,} bytes of UTF-8"
    assert row["teacher tokens per student token"] == f"{counts[1] / counts[0]:.3f}"
    assert row["empty documents"] == "2 dropped" and row["bad records"] == "1 left out"
    ds = AlignedDataset.open(tmp_path / "out")
    widths = np.concatenate([(spans := ds.spans(i)).last - spans.first for i in range(121)])
    zero = int((widths == 0).sum()) - 121
    mapped = counts[0] - 121 - zero
    assert row["unmapped"] == f"{121 / counts[0]:.3%} EOS, {zero / counts[0]:.3%} zero-width"
    assert row["IoS = 100 %"] == f"100.000% of {mapped:,} mapped tokens"
    assert row["span width"].startswith(f"1: {(widths == 1).sum() / mapped:.3%}, 2: {(widths == 2).sum() / mapped:.3%}")
    assert run()[1].count("(3 reused)") == 1


def test_the_help_fits_on_a_page_and_names_units(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    helps = {}
    for name in ("", "plan", "finalize", "verify", "merge"):
        with pytest.raises(SystemExit) as stop:
            main([*name.split(), "--help"])
        assert stop.value.code == 0
        helps[name] = capsys.readouterr().out
        assert 5 < len(helps[name].splitlines()) <= 60, name
    main_help = " ".join(helps[""].split())
    assert "Other uses, each with a --help: plan, finalize, verify, merge." in main_help
    for option in ("--shard-mb MB", "--workers N", "--max-documents N", "HOST:PORT", "--shards I/N"):
        assert option in main_help, option


# ---- bad records


def test_what_is_quarantined_can_be_read_again(run, tmp_path):
    bad = [b'{"text": "cut', b'{"text": "\xff"}', b'{"body": "x"}']
    good = [json.dumps({"text": f"line {i}"}).encode() for i in range(5)]
    lines = [good[0], bad[0], good[1], bad[1], b"", bad[2], *good[2:]]
    file = write(tmp_path / "a.jsonl", b"\n".join(lines) + b"\n")
    code, out, err = run(file)
    assert code == 2 and f"{file}:2:{len(good[0]) + 1}: invalid JSON" in err and "--on-bad-line" in err
    assert "shard 1/1: 0000 FAILED\n" in out, "the reason is told once"
    assert run(file, "--on-bad-line=quarantine")[0] == 2  # more than one in a thousand
    code, out, _ = run(file, "--on-bad-line=quarantine", "--max-bad-fraction=0.5")
    assert code == 0 and "3 left out" in out and "5 in 1 shard (1 reused)" in out
    rows = [json.loads(row) for row in (tmp_path / "out/shards/0000/quarantine.jsonl").read_bytes().splitlines()]
    assert [base64.b64decode(row["raw_base64"]) for row in rows] == bad
    data = file.read_bytes()
    assert [(row["file"], row["line"], data[row["byte"] :].startswith(raw)) for row, raw in zip(rows, bad, strict=True)] == [
        ("a.jsonl", 2, True),
        ("a.jsonl", 4, True),
        ("a.jsonl", 6, True),
    ]


@pytest.mark.parametrize("good", [998, 999])
def test_one_bad_record_in_a_thousand_is_tolerated(good, run, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["x"] * good)
    file.write_bytes(file.read_bytes() + b"broken\n")
    code, _, err = run(file, "--on-bad-line=skip")
    assert code == (2 if good == 998 else 0) and ("1 of 999 records are bad (0.10%)" in err) == (good == 998)


def test_a_file_that_is_cut_off_is_told(run, texts, tmp_path):
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts[-40:]).encode()
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(data)[:-2000])
    code, _, err = run(file)
    assert code == 2 and str(file) in err and "broken input: the gzip data ends in the middle: cut off?" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(file, "--on-bad-line=skip")
    assert code == 2 and "1 of " in err and "--max-bad-fraction" in err
    code, out, _ = run(file, "--on-bad-line=skip", "--max-bad-fraction=1")
    assert code == 0 and "1 file cut off or damaged" in out and "0 left out" in out


# ---- mistakes


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2(settings, tmp_path):
    code, out, err = finished(start(arguments(settings, tmp_path / "missing.jsonl", out=tmp_path / "out")))
    assert code == 2 and err == f"error: {tmp_path / 'missing.jsonl'}: no such file or folder\n" and "Traceback" not in out
    assert not (tmp_path / "out").exists()


def test_each_mistake_is_told_without_a_traceback(run, texts, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", texts[-3:])
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "list.txt").write_text("\n# nothing\n")
    write(tmp_path / "pretty.json", b'[\n  {"text": "x"}\n]\n')
    write(tmp_path / os.fsdecode(b"bytes\xff.jsonl"), good.read_bytes())
    cases: list[tuple[tuple[str | Path, ...], dict[str, Any], str]] = [
        ((tmp_path / "nope.jsonl",), {}, "nope.jsonl: no such file or folder"),
        ((tmp_path / "*.parquet",), {}, "*.parquet: no such file or folder"),
        ((f"@{tmp_path}/none.txt",), {}, "none.txt"),
        ((f"@{tmp_path}/list.txt",), {}, "this list contains no file names"),
        ((tmp_path / "folder",), {}, "in this folder"),
        ((tmp_path / "empty.jsonl",), {}, "no document was read"),
        ((tmp_path / "pretty.json",), {}, "is one JSON array"),
        ((tmp_path / os.fsdecode(b"bytes\xff.jsonl"),), {}, "not UTF-8"),
        ((tmp_path / "folder/.." / "good.jsonl", "nobody://x/a.jsonl"), {}, "nobody"),
        ((good,), {"text_key": "body"}, "no key 'body' (it has 'text'); --text-key names another"),
        ((good,), {"id_key": "url"}, "no key 'url' (it has 'text'); --id-key names another"),
        ((good,), {"student": tmp_path / "none"}, "none: no such file or folder"),
        ((good,), {"teacher_eos": "<nope>"}, "'<nope>' is not among its 900 tokens"),
        ((good,), {"out": good}, "good.jsonl is a file"),
        ((good,), {"out": tmp_path}, "is not empty and contains no dataset"),
        ((good,), {"engine": "ray", "ray_address": "127.0.0.1:1"}, "answers at 127.0.0.1:1"),
        ((good,), {"out": "memory://x", "workers": 2}, "use --workers 1"),
        ((good, "--force"), {"shards": "1/2"}, "--force with --shards"),
    ]
    for words, options, message in cases:
        code, out, err = run(*words, **options)
        assert code == 2 and err.startswith("error: ") and message in err, (message, err)
        assert "Traceback" not in out + err and len(err.splitlines()) <= 4
        assert not (tmp_path / "out").exists(), message
    assert good.read_bytes() and not (tmp_path / ".build").exists() and not (tmp_path / "shards").exists()


SENSELESS = {
    "workers": "0 -1 x",
    "shard-mb": "0 x inf nan",
    "max-documents": "0 1.5",
    "max-bad-fraction": "2 -0.1 nan",
    "shards": "0/4 5/4 3 1/ -1/2",
    "engine": "cloud",
    "on-bad-line": "maybe",
    "backend": "fast",
    "frobnicate": "1",
}


@pytest.mark.parametrize("option", SENSELESS)
def test_values_that_make_no_sense_are_refused(option, run, tmp_path):
    for value in SENSELESS[option].split():
        code, _, err = run(tmp_path / "x.jsonl", f"--{option}={value}")
        assert code == 2 and f"--{option}" in err and "Traceback" not in err


def test_another_tokenizer_is_refused_with_both_fingerprints(run, settings, texts, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", texts[-5:])
    assert run(file)[0] == 0
    before = contents(tmp_path / "out")
    for _ in range(2):
        code, _, err = run(file, teacher=settings.student)
        assert code == 2 and len(set(re.findall(r"\b[0-9a-f]{64}\b", err))) == 2 and "--force" in err
    assert contents(tmp_path / "out") == before
    assert run(file, "--force", "--verify", teacher=settings.student)[0] == 0
    assert AlignedDataset.open(tmp_path / "out").manifest.teacher.vocab_size == 500


def test_names_with_brackets_and_spaces_are_names(run, texts, tmp_path):
    file = write_jsonl(tmp_path / "[red]a [b] ü.jsonl", texts[-5:])
    out = tmp_path / "o [bold]ü[" / "x]"
    code, shown, err = run(file, out=out)
    # a long name is broken over lines
    assert (code, err) == (0, "") and re.sub(r"\s", "", str(out)) in re.sub(r"[\s│]", "", shown)
    out.rename(tmp_path / "[b]")
    assert command("verify", tmp_path / "[b]") == 0


# ---- the other commands


def test_plan_prints_the_shards_and_makes_nothing(settings, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, tmp_path / "[b]a.jsonl")
    before = sorted(tmp_path.rglob("*"))
    assert command("plan", *arguments(settings, "[b]a.jsonl", shard_mb=100_000 / 2**20)) == 0
    out = capsys.readouterr().out
    assert "5 shards, about 0.5 MB of text" in out and sorted(tmp_path.rglob("*")) == before
    rows = re.findall(r"│ +(\d{4}) │ \[b\]a.jsonl:([\d,]+) *│ \[b\]a.jsonl:([\d,]+) *│ +1 │ +0\.[01] │", out)
    assert [row[0] for row in rows] == [f"{i:04}" for i in range(5)]
    assert [row[2] for row in rows[:-1]] == [row[1] for row in rows[1:]] and rows[0][1] == "0"
    assert int(rows[-1][2].replace(",", "")) == corpus.stat().st_size


def test_tasks_and_finalize_from_the_command_line(run, settings, corpus, built, tmp_path, capsys):
    finalize = partial(command, "finalize", *arguments(settings, out=tmp_path / "out"))
    assert finalize() == 2 and "has no plan" in capsys.readouterr().err
    for i in (1, 2):
        code, out, _ = run(corpus, shards=f"{i}/2", shard_mb=100_000 / 2**20)
        assert code == 0 and f"part {i} of 2 is done" in out and "finalize" in out
    (tmp_path / "out/shards/0001").rename(tmp_path / "away")
    assert finalize() == 2 and "1 of 5 shards are missing: 0001." in capsys.readouterr().err
    (tmp_path / "away").rename(tmp_path / "out/shards/0001")
    assert finalize("--verify") == 0 and "121 in 5 shards" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(built.path)


def test_verify_names_what_is_damaged(built, tmp_path, capsys):
    shutil.copytree(built.path, tmp_path / "copy")
    assert command("verify", tmp_path / "copy") == 0
    assert "121 documents in 5 shards" in capsys.readouterr().out
    file = tmp_path / "copy/shards/0003/spans.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert command("verify", tmp_path / "copy") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and str(file) in err and "Traceback" not in err
    assert command("verify", tmp_path) == 2 and "not a dataset" in capsys.readouterr().err


def test_merge_puts_datasets_together(settings, built, texts, tmp_path, capsys):
    more = make([write_jsonl(tmp_path / "a.jsonl", texts[-9:])], tmp_path / "more", settings)
    assert command("merge", built.path, more.path, "--out", tmp_path / "both") == 0
    assert "130 documents of 2 datasets" in capsys.readouterr().out
    both = AlignedDataset.open(tmp_path / "both")
    assert both.student(121).tolist() == more.student(0).tolist() and both.totals == built.totals + more.totals
    swapped = BuildConfig(student=settings.teacher, teacher=settings.student)
    other = make([tmp_path / "a.jsonl"], tmp_path / "other", swapped)
    assert command("merge", built.path, other.path, "--out", tmp_path / "third") == 2
    said = capsys.readouterr().err
    assert "number of tokens (900 and 500)" in said and not (tmp_path / "third").exists()
