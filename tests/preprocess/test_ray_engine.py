"""The Ray engine, on a real cluster of this machine with token authentication: what `test_workers` asks of the local one."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import ray_engine
from megatron_vocagno.preprocess.build import build
from megatron_vocagno.preprocess.ray_engine import TASKS_PER_SLOT, run_ray
from megatron_vocagno.preprocess.score import ScoringOptions, score
from megatron_vocagno.preprocess.shards import BuildConfig, ShardJob, ShardResult, make_shard
from megatron_vocagno.preprocess.workers import ONE_THREAD, JobFailure, Queue
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents, make, write_jsonl
from tests.preprocess.test_workers import ERRORS, die, environment, fail, result_with_lock, runs, square, wait_until
from tests.runs import write_teacher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

CPUS = 2


class Driver(subprocess.Popen[str]):
    """Ends with a test that fails, instead of being waited for."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


class Cluster:
    """`ray start` with a token, in a process group and a folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # paths of sockets must be short
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.no_token = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.no_token |= {"HOME": str(self.folder), "PYTHONPATH": os.pathsep.join(sys.path)}
        self.environment = self.no_token | {"RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        command = (
            f"start --head --block --port=0 --num-cpus={CPUS} --include-dashboard=false --disable-usage-stats "
            f"--object-store-memory=80000000 --temp-dir={self.folder}/ray"
        )
        with (self.folder / "log").open("w") as log:
            self.head = subprocess.Popen(
                [Path(sys.executable).with_name("ray"), *command.split()],
                env=self.environment | {"RAY_AUTH_MODE": "token", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            # the address is the last of what it says, and comes a moment after "Ray runtime started"
            wait_until(lambda: "--address='" in self.log.rpartition("'")[0] or self.head.poll() is not None, seconds=120)
            self.address = self.log.split("--address='")[1].split("'")[0]
        except BaseException:
            print(self.log)
            self.end()
            raise

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def end(self) -> None:
        self.head.terminate()
        try:
            self.head.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.head.pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, script: str, *args: object, **environment: str) -> Driver:
        """A driver in a process of its own; it has the token unless told otherwise."""
        command = [sys.executable, "-c", script, self.address, *map(str, args)]
        return Driver(command, env=environment or self.environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    yield started
    started.end()
    assert not [file for file in Path("/dev/shm").iterdir() if "plasma" in file.name]


@pytest.fixture(scope="module")
def call(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Calls a function in another process: Ray reads its environment once, and changes signal handlers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as driver:
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("RAY_")]:
                patch.delenv(name)
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            driver.submit(square, 1).result()
        yield lambda function, *args, **rest: driver.submit(function, *args, **rest).result(timeout=120)


@pytest.fixture
def drive(cluster: Cluster, call: Callable[..., Any]) -> Callable[..., list[Any]]:
    return partial(call, gather, cluster.address)


def gather(address: str, task: Callable[[Any], Any], jobs: Any, **rest: Any) -> list[Any]:
    return list(run_ray(task, jobs, address, **rest))


def test_every_job_has_its_result(drive):
    assert sorted(drive(square, range(20))) == [i * i for i in range(20)]
    assert drive(square, []) == []


def test_what_a_task_raises_is_the_failure_of_its_job_alone(drive):
    results = drive(fail, range(8))
    failures = {r.job: r.reason for r in results if isinstance(r, JobFailure)}
    assert sorted(r for r in results if not isinstance(r, JobFailure)) == [0, 6, 7]
    assert failures.keys() == ERRORS.keys()
    assert failures[1] == "line 7 is bad"
    assert all("in fail" in failures[job] and str(ERRORS[job]) in failures[job] for job in (2, 3, 4, 5))
    (failure,) = drive(result_with_lock, [1])
    assert failure.job == 1 and "cannot be sent" in failure.reason


def test_what_the_caller_names_ends_everything(drive):
    with pytest.raises(ZeroDivisionError, match="division") as error:
        drive(fail, [0, 2, 6, 7], stop=(KeyError, ArithmeticError))
    assert any("in fail" in note for note in error.value.__notes__)


def test_a_killed_worker_costs_nothing(drive, tmp_path):
    """From outside, in the middle of its job."""
    killed = []

    def kill() -> None:
        wait_until(lambda: any(tmp_path.iterdir()))
        time.sleep(0.3)
        killed.append(int(next(tmp_path.iterdir()).name))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert sorted(drive(wait_for_death, [(tmp_path, i) for i in range(12)])) == list(range(12))
    killer.join()
    assert killed


def wait_for_death(job: tuple[Path, int]) -> int:
    folder, i = job
    if i == 5 and not any(folder.iterdir()):
        sleep(folder)
    return i


def sleep(folder: Path) -> None:
    """For ever; tells its process id."""
    (folder / str(os.getpid())).touch()
    time.sleep(10_000)


def test_the_third_death_at_one_job_is_its_failure(drive, tmp_path):
    results = drive(partial(die, times=10, how=-9), [(tmp_path, i) for i in range(5)])
    assert sorted(r for r in results if not isinstance(r, JobFailure)) == [0, 1, 9, 16]
    (failure,) = [r for r in results if isinstance(r, JobFailure)]
    assert failure.job == (tmp_path, 2) and "3 workers died" in failure.reason and "unexpectedly" in failure.reason
    assert len(list(tmp_path.iterdir())) == 3 and "\n" not in failure.reason


def test_workers_have_one_thread(drive):
    assert sorted(drive(environment, list(ONE_THREAD))) == sorted(ONE_THREAD.values())


def test_ray_has_as_many_jobs_as_keep_it_busy(call, cluster):
    assert call(jobs_in_flight, cluster.address, 100) == (TASKS_PER_SLOT * CPUS - 1, TASKS_PER_SLOT * CPUS - 1)


def jobs_in_flight(address: str, n: int) -> tuple[int, int]:
    """The fewest and the most, as results arrive; the cluster is found by its variable."""
    queues: list[Queue[int]] = []
    ray_engine.Queue = lambda jobs: queues.append(Queue(jobs)) or queues[0]  # type: ignore
    os.environ["RAY_ADDRESS"] = address
    try:
        in_flight = [n - len(queues[0]) - received for received, _ in enumerate(run_ray(square, range(n), "auto"), 1)]
    finally:
        ray_engine.Queue = Queue  # type: ignore
        del os.environ["RAY_ADDRESS"]
    assert len(in_flight) == n
    return min(in_flight[:-10]), max(in_flight)


def test_a_task_that_the_nodes_cannot_import_is_told_at_once(call, cluster, tmp_path):
    (tmp_path / "here_alone.py").write_text("def task(job): ...")
    with pytest.raises(CorpusError, match=r"cannot run on the cluster: .*No module named 'here_alone'.*same version"):
        call(run_here_alone, cluster.address, tmp_path)


def run_here_alone(address: str, folder: Path) -> None:
    sys.path.append(str(folder))
    gather(address, importlib.import_module("here_alone").task, range(100))


def test_another_version_of_ray_is_told(call, cluster):
    with pytest.raises(CorpusError, match=r"Version mismatch(.|\n)*Ray: 2(.|\n)*Ray: 1.0"):
        call(run_as_version_1, cluster.address)


def run_as_version_1(address: str) -> None:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "__version__", "1.0")
        gather(address, square, [1])


def test_what_keeps_a_driver_out_is_told(monkeypatch):
    for address, words in (
        ("nonsense", "expected 'auto' or HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: .*refused"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
    ):
        with pytest.raises(CorpusError, match=words):
            next(run_ray(square, [1], address))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CorpusError, match=r"pip install 'megatron-vocagno\[ray\]'"):
        next(run_ray(square, [1], "auto"))


def test_a_dataset_has_the_same_bytes_as_from_one_process(call, cluster, built, corpus, settings, tmp_path):
    """Also when a worker dies at a shard."""
    assert call(build_on_ray, cluster.address, corpus, tmp_path / "out", settings) > 3
    assert contents(tmp_path / "out") == contents(built.path)
    assert (tmp_path / "died").exists()


def build_on_ray(address: str, corpus: Path, out: Path, settings: BuildConfig) -> int:
    def engine(task: Callable[[ShardJob], ShardResult], jobs: Any, **rest: Any) -> Iterator[ShardResult | JobFailure[ShardJob]]:
        return run_ray(partial(die_and_make_shard, out.with_name("died")), jobs, address, **rest)

    shards: list[Any] = []
    build([corpus], out, settings, engine=engine, shard_bytes=100_000, on_shard=shards.append)
    return len(shards)


def die_and_make_shard(died: Path, job: ShardJob) -> ShardResult:
    if job.index == 2 and not died.exists():
        died.touch()
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGKILL]).start()
    return make_shard(job)


def test_a_dataset_is_scored_as_by_one_process(call, cluster, settings, smollm2_folder, tmp_path):
    teacher = write_teacher(tmp_path / "teacher", smollm2_folder)
    texts = real.multilingual_texts()
    make([write_jsonl(tmp_path / "corpus.jsonl", texts)], tmp_path / "ours", settings, shard_bytes=1500)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    asked = ScoringOptions(teacher, "float32", context=40, tokens_per_batch=300)
    assert call(score_on_ray, cluster.address, tmp_path / "theirs", asked) > 2
    assert score(tmp_path / "ours", asked).teacher_losses is not None
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")


def score_on_ray(address: str, folder: Path, asked: ScoringOptions) -> int:
    shards: list[Any] = []
    score(folder, asked, partial(run_ray, address=address, on_gpus=True), on_shard=shards.append)
    return len(shards)


DRIVE = """
import sys
from pathlib import Path
from megatron_vocagno.preprocess.ray_engine import run_ray
from tests.preprocess.test_ray_engine import sleep
list(run_ray(sleep, [Path(arg) for arg in sys.argv[2:]], sys.argv[1]))
"""


@pytest.mark.parametrize(("token", "words"), [({}, "has no token"), ({"RAY_AUTH_TOKEN": "f" * 64}, "its token")])
def test_nobody_gets_in_without_the_token(token, words, cluster, tmp_path):
    with cluster.start(DRIVE, tmp_path, **cluster.no_token, **token) as driver:
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 1 and "CorpusError: " in errors and words in errors
    assert not any(tmp_path.iterdir())


def test_ctrl_c_ends_the_tasks_and_leaves_the_cluster(drive, cluster, tmp_path):
    with cluster.start(DRIVE, *[tmp_path] * 5) as driver:
        wait_until(lambda: len(list(tmp_path.iterdir())) == CPUS)
        at_work = [int(file.name) for file in tmp_path.iterdir()]
        assert all(map(runs, at_work))
        began = time.monotonic()
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=60)
        assert time.monotonic() - began < 5
    assert errors.count("Traceback") == 1 and errors.endswith("KeyboardInterrupt\n")
    wait_until(lambda: not any(map(runs, at_work)), seconds=5)
    assert sorted(drive(square, range(3))) == [0, 1, 4]


def test_tasks_end_with_the_iterator(call, cluster, tmp_path):
    at_work = call(close_early, cluster.address, tmp_path)
    assert len(at_work) == 1
    wait_until(lambda: not any(map(runs, at_work)), seconds=5)


def close_early(address: str, folder: Path) -> list[int]:
    results = run_ray(wait_for_death, [(folder, i) for i in range(5, 12)], address)
    assert sorted(next(results) for _ in range(6)) == list(range(6, 12))
    wait_until(lambda: any(folder.iterdir()))
    results.close()
    return [int(file.name) for file in folder.iterdir()]


def test_a_cluster_that_goes_away_is_told(tmp_path):
    cluster = Cluster()
    try:
        with cluster.start(DRIVE, *[tmp_path] * 5) as driver:
            wait_until(lambda: len(list(tmp_path.iterdir())) == CPUS)
            cluster.end()
            _, errors = driver.communicate(timeout=100)
    finally:
        cluster.end()
    assert driver.returncode == 1 and "CorpusError: Ray has ended on this machine" in errors
