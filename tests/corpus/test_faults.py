"""Builds under fire: real processes, real kills, a real full disk. Whatever happens, what is finished is whole, and the same
command goes on from there to the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.shards import Settings, ShardFile
from tests.corpus.conftest import contents

pytestmark = pytest.mark.slow
KILLS = 20
SHARD_MB = 0.03


def command(corpus: Path, settings: Settings, out: Path, *more: str, workers: int = 2, shard_mb: float = SHARD_MB) -> list[str]:
    tokenizers = ["--student", settings.student, "--teacher", settings.teacher]
    how = ["--workers", str(workers), "--shard-mb", str(shard_mb)]
    return [sys.executable, "-m", "tools.preprocess.build_dataset", str(corpus), *tokenizers, "--out", str(out), *how, *more]


def start(arguments: list[str], prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    """In a process group of its own, so that a signal can be sent to all of it, as a terminal does."""
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=prepare
    )


def finish(build: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = build.communicate(timeout=300)
    finally:
        if build.poll() is None:
            os.killpg(build.pid, signal.SIGKILL)
    return build.returncode, output


def workers_of(parent: int) -> list[int]:
    """Those that run Python: without multiprocessing's resource tracker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if ppid == parent and b"spawn_main" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                pass
    return found


def finished_shards(out: Path) -> list[Path]:
    return [file.parent for file in sorted((out / "shards").glob("[0-9]*/shard.json"))]


def all_whole(out: Path) -> int:
    """How many shards lie there; each must be whole."""
    folders = [folder for folder in (out / "shards").iterdir() if not folder.name.startswith(".")] if out.exists() else []
    for folder in folders:
        made = ShardFile.model_validate_json((folder / "shard.json").read_bytes())
        assert {f.name for f in folder.iterdir()} == {*made.record.files, "shard.json"}
        assert all((folder / name).stat().st_size == record.size for name, record in made.record.files.items())
    return len(folders)


@pytest.fixture(scope="module")
def large(tmp_path_factory, texts) -> Path:
    """About 2.5 MB, so that a build takes long enough to be shot at."""
    file = tmp_path_factory.mktemp("large") / "large.jsonl"
    rows = (json.dumps({"text": f"{round_}: {text}"}) + "\n" for round_ in range(5) for text in texts)
    file.write_text("".join(rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, large, settings) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "dataset"
    code, output = finish(start(command(large, settings, out)))
    assert code == 0, output
    AlignedDataset.open(out).verify()
    return contents(out)


def test_twenty_killed_workers_change_no_byte(large, settings, undisturbed, tmp_path):
    out, dice = tmp_path / "dataset", random.Random(1)
    build = start(command(large, settings, out))
    killed: list[int] = []
    while len(killed) < KILLS and build.poll() is None:
        time.sleep(dice.uniform(0.05, 0.4))
        # one that has been at work for a moment: a worker that is killed at its start costs nobody anything
        if victims := [pid for pid in workers_of(build.pid) if pid not in killed]:
            killed.append(dice.choice(victims))
            os.kill(killed[-1], signal.SIGKILL)
    code, output = finish(build)
    for _ in range(3):  # a shard may have been hit three times, and says so; the same command does what is missing
        if code == 0:
            break
        assert "3 workers" in output or "killed" in output, output
        code, output = finish(start(command(large, settings, out)))
    assert code == 0, output
    assert len(killed) == KILLS
    assert contents(out) == undisturbed


@pytest.mark.parametrize("moment", [0.0, 0.3, 1.0])
def test_ctrl_c_leaves_whole_shards_and_the_next_run_completes_them(moment, large, settings, undisturbed, tmp_path):
    out = tmp_path / "dataset"
    build = start(command(large, settings, out))
    while build.poll() is None and not finished_shards(out):
        time.sleep(0.02)
    time.sleep(moment)
    os.killpg(build.pid, signal.SIGINT)
    code, output = finish(build)
    assert code == 130 and "Traceback" not in output, output
    assert not (out / "dataset.json").exists() and all_whole(out) > 0
    code, output = finish(start(command(large, settings, out)))
    assert code == 0 and "reused" in output, output
    assert contents(out) == undisturbed


def test_a_killed_build_leaves_no_worker_and_the_next_one_completes_it(large, settings, undisturbed, tmp_path):
    out = tmp_path / "dataset"
    build = start(command(large, settings, out))
    while build.poll() is None and len(finished_shards(out)) < 3:
        time.sleep(0.02)
    workers = workers_of(build.pid)
    build.kill()
    build.communicate()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert all_whole(out) >= 3 and not (out / "dataset.json").exists()
    code, output = finish(start(command(large, settings, out)))
    assert code == 0, output
    assert contents(out) == undisturbed


def test_a_full_disk_ends_the_build_with_one_message_and_keeps_what_is_finished(texts, settings, tmp_path):
    """No file may become larger than one shard's tokens."""
    file, out = tmp_path / "corpus.jsonl", tmp_path / "dataset"
    rows = [json.dumps({"text": text}) + "\n" for text in texts[:30]] + [json.dumps({"text": "\n".join(texts[:60])}) + "\n"]
    file.write_text("".join(rows), encoding="utf-8")
    limit = 60_000

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, output = finish(start(command(file, settings, out), full))
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in output, output
    assert "File too large" in errors[0] and str(out) in errors[0]
    kept = finished_shards(out)
    assert kept and all_whole(out) == len(kept) and not (out / "dataset.json").exists()
    times = {folder: (folder / "shard.json").stat().st_mtime_ns for folder in kept}
    code, output = finish(start(command(file, settings, out)))
    assert code == 0, output
    assert {folder: (folder / "shard.json").stat().st_mtime_ns for folder in kept} == times
    AlignedDataset.open(out).verify()


def test_two_builds_into_one_folder_the_second_refuses(large, settings, undisturbed, tmp_path):
    out = tmp_path / "dataset"
    build = start(command(large, settings, out))
    while build.poll() is None and not finished_shards(out):
        time.sleep(0.02)
    code, output = finish(start(command(large, settings, out)))
    assert code == 2 and "another build is at work" in output, output
    code, output = finish(build)
    assert code == 0, output
    assert contents(out) == undisturbed
