"""Builds under fire: real processes, real kills, a real full disk. Whatever happens, what is finished is whole, and the same
command goes on from there to the same bytes."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.preprocess.shards import BuildConfig, ShardFile
from tests.corpus.conftest import contents, write_jsonl
from tests.preprocess.tasks import children, runs, wait_until
from tests.preprocess.test_build_dataset import arguments, start
from tools.preprocess.build_dataset import main

pytestmark = pytest.mark.slow
KILLS = 10
SHARD_MB = 0.01


def words(corpus: Path, settings: BuildConfig, out: Path, workers: int = 2) -> list[str]:
    return arguments(settings, corpus, out=out, workers=workers, shard_mb=SHARD_MB)


class Build:
    """The command at work, in a process group of its own, so that a signal can be sent to all of it, as a terminal does."""

    def __init__(self, corpus: Path, settings: BuildConfig, out: Path, **more: Callable[[], None]) -> None:
        self.process = start(words(corpus, settings, out), stderr=subprocess.STDOUT, start_new_session=True, **more)
        self.out, self.pid = out, self.process.pid

    def end(self) -> tuple[int, str]:
        """Exit status and all that it wrote."""
        try:
            output, _ = self.process.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return self.process.returncode, output

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def workers(self) -> list[int]:
        """Without multiprocessing's resource tracker."""
        with suppress(FileNotFoundError, ProcessLookupError):
            return [pid for pid in children(self.pid) if runs(pid) and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return []

    def worker_at(self, shard: str) -> int | None:
        """The one that writes a shard: it has a file of it open."""
        for pid in self.workers:
            with suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        if f"/.{shard}." in str(link.readlink()):
                            return pid
        return None

    @property
    def finished(self) -> set[str]:
        return {file.parent.name for file in (self.out / "shards").glob("[0-9]*/shard.json")}

    def attempts(self) -> Counter[str]:
        """How often each shard that is not finished has been begun: each time leaves a hidden folder, or has it at work."""
        begun = Counter(folder.name.split(".")[1] for folder in (self.out / "shards").glob(".*"))
        for name in self.finished:
            del begun[name]
        return begun


def n_whole(out: Path) -> int:
    """How many shards lie there; each must be whole."""
    folders = sorted((out / "shards").glob("[0-9]*"))
    for folder in folders:
        made = ShardFile.model_validate_json((folder / "shard.json").read_bytes())
        assert {file.name for file in folder.iterdir()} == {*made.record.files, "shard.json"}
        assert all((folder / name).stat().st_size == record.size for name, record in made.record.files.items())
    return len(folders)


@pytest.fixture(scope="module")
def large(tmp_path_factory, texts) -> Path:
    """About 1 MB in many shards, so that a build takes long enough to be shot at; one of them holds a document of 0.25 MB."""
    rows = [f"{round_}: {text}" for round_ in range(2) for text in texts]
    rows.insert(40, "\n".join(texts[:76])[:250_000])
    return write_jsonl(tmp_path_factory.mktemp("large") / "large.jsonl", rows)


@pytest.fixture(scope="module")
def build(large, settings) -> Callable[..., Build]:
    return partial(Build, large, settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, large, settings) -> dict[str, bytes]:
    """By one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "dataset"
    assert main(words(large, settings, out, workers=1)) == 0
    AlignedDataset.open(out).verify()
    return contents(out)


@pytest.fixture
def ends_well(large, settings, undisturbed, tmp_path, capsys) -> Iterator[Path]:
    """The folder of a build that a test disturbs; then the same command ends with the bytes of an undisturbed one."""
    out = tmp_path / "dataset"
    yield out
    before = {file: file.stat().st_mtime_ns for file in (out / "shards").glob("[0-9]*/shard.json")} if out.exists() else {}
    capsys.readouterr()
    code = main(words(large, settings, out, workers=1))
    assert code == 0 and f"({len(before)} reused)" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert contents(out) == undisturbed


# ---- workers are killed


@pytest.mark.long
def test_ten_killed_workers_cost_nothing(build, undisturbed, tmp_path):
    """At work, while they open their tokenizers, or before they are ready; no shard is hit three times."""
    dice, killed, at_work = random.Random(1), [], 0
    at = build(tmp_path / "dataset")

    def victims() -> list[int]:
        return [pid for pid in at.workers if pid not in killed]

    def may_be_hit(n: int) -> bool:
        return len(at.finished) >= n and bool(victims()) and max(at.attempts().values(), default=0) < 2

    while len(killed) < KILLS and at.runs:
        n = len(at.finished) + dice.choice([0, 1, 1, 2])
        wait_until(lambda n=n: may_be_hit(n) or not at.runs)
        time.sleep(dice.uniform(0, 0.03))
        if there := victims():
            killed.append(dice.choice(there))
            at_work += any(at.worker_at(name) == killed[-1] for name in at.attempts())
            os.kill(killed[-1], signal.SIGKILL)
    code, output = at.end()
    assert code == 0 and "FAILED" not in output and "Traceback" not in output, output
    assert len(killed) == KILLS and at_work >= 3
    assert contents(tmp_path / "dataset") == undisturbed


@pytest.mark.long
def test_the_third_death_at_one_shard_is_its_failure_and_the_others_finish(build, undisturbed, ends_well):
    at, killed = build(ends_well), []
    sizes = {name.split("/")[1]: len(data) for name, data in undisturbed.items() if name.endswith("teacher.bin")}
    big = max(sizes, key=lambda name: sizes[name])
    n = sum(name.endswith("shard.json") for name in undisturbed)
    while at.runs and len(killed) < 5:
        begun = list((ends_well / "shards").glob(f".{big}.*"))
        if len(begun) > len(killed) and (victim := at.worker_at(big)) and victim not in killed:
            killed.append(victim)
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.005)
    code, output = at.end()
    assert code == 2 and len(killed) == 3 and "Traceback" not in output, output
    assert f"1 of {n} shards could not be built; the finished shards are kept" in output
    assert re.search(rf"shard {big}: 3 workers died while they ran it, the last one .*\b9\b.*Out of memory\?", output)
    assert n_whole(ends_well) == n - 1 and not (ends_well / "dataset.json").exists()


# ---- the build is killed, or interrupted


def at_its_start(at: Build) -> bool:
    return (at.out / ".build/lock").exists()


def with_new_workers(at: Build) -> bool:
    return len(at.workers) == 2


def at_its_first_shard(at: Build) -> bool:
    return bool(at.attempts())


def with_some_shards(at: Build) -> bool:
    return len(at.finished) >= 5


@pytest.mark.parametrize("moment", [with_new_workers, with_some_shards])
def test_a_killed_build_leaves_no_worker(moment, build, ends_well):
    at = build(ends_well)
    wait_until(lambda: moment(at) or not at.runs)
    workers = at.workers
    os.kill(at.pid, signal.SIGKILL)
    at.process.wait()
    assert len(workers) == 2
    # one that has just started looks for its parent when its imports are done
    wait_until(lambda: not any(map(runs, workers)), seconds=30)
    assert at.end()[0] == -signal.SIGKILL
    assert n_whole(ends_well) >= (5 if moment is with_some_shards else 0) and not (ends_well / "dataset.json").exists()


@pytest.mark.parametrize(
    ("moment", "send"),
    [(at_its_start, os.killpg), (with_new_workers, os.killpg), (at_its_first_shard, os.kill), (with_some_shards, os.killpg)],
)
def test_ctrl_c_leaves_whole_shards_and_nothing_else(moment, send, build, ends_well):
    """Sent to the whole group, as a terminal does, or to the build alone."""
    at = build(ends_well)
    wait_until(lambda: moment(at) or not at.runs)
    workers = at.workers
    send(at.pid, signal.SIGINT)
    code, output = at.end()
    assert code == 130 and "Traceback" not in output and output.endswith("run the same command again to continue\n"), output
    assert not any(map(runs, workers)) and not (at.out / "dataset.json").exists()
    n = n_whole(at.out)
    assert n >= (5 if moment is with_some_shards else 0) and at.out.exists() == bool(n)
    assert not list((at.out / "shards").glob(".*"))


# ---- the disk is full


def full_disk(code: int, output: str, reason: str, out: Path) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and output.endswith(errors[0] + "\n") and "Traceback" not in output, output
    assert reason in errors[0] and str(out) in errors[0]
    assert not list((out / "shards").glob(".*")) and not (out / "dataset.json").exists()


def test_a_file_that_may_not_grow_ends_the_build_with_one_message(build, undisturbed, ends_well):
    """The teacher's tokens of the largest shard have no room; all that come before it have."""
    sizes = sorted(len(data) for name, data in undisturbed.items() if name.endswith("teacher.bin"))
    limit = (sizes[-2] + sizes[-1]) // 2

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, output = build(ends_well, preexec_fn=restrict).end()
    full_disk(code, output, "File too large", ends_well)
    assert 5 < n_whole(ends_well) < len(sizes)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_build_with_one_message(build, small_disk):
    out = small_disk / "dataset"
    code, output = build(out).end()
    full_disk(code, output, "No space left on device", out)
    assert "GB will be written" in output
    assert n_whole(out) > 5
