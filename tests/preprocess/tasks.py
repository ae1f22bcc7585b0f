"""Tasks for the engines' tests. Few imports: each worker, each driver and each node of a cluster imports this module."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess import ray_engine
from megatron_vocagno.preprocess.ray_engine import run_ray
from megatron_vocagno.preprocess.workers import ONE_THREAD, REPORT_SECONDS, Queue, report

# ---- results and errors


def square(job: int) -> int:
    return job * job


class Panic(BaseException):
    """As Rust code raises it."""


class NeedsTwo(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class HasLock(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


ERRORS = {
    1: CorpusError("line 7 is bad"),
    2: ZeroDivisionError("division"),
    3: Panic("index out of bounds"),
    4: NeedsTwo(1, 2),
    5: HasLock(),
}


def fail(job: int) -> int:
    if job in ERRORS:
        raise ERRORS[job]
    return job


def result_with_lock(job: object) -> object:
    return threading.Lock()


def environment(job: str) -> tuple[str, str | None]:
    return job, os.environ.get(job)


KINDS: dict[str, Callable[[Any], object]] = {
    "square": square,
    "environment": environment,
    "fail": fail,
    "lock": result_with_lock,
}
# of every kind, among each other
JOBS: list[tuple[str, Any]] = [
    *(("square", i) for i in range(12)),
    *(("fail", i) for i in ERRORS),
    ("lock", None),
    *(("environment", name) for name in ONE_THREAD),
    *(("square", i) for i in range(12, 20)),
]


def do(job: tuple[str, Any]) -> object:
    return KINDS[job[0]](job[1])


# ---- deaths and waiting


def die(job: tuple[Path, list[int]]) -> str:
    """Kills its worker at the first attempts, one for each number: by the signal -n, or with the exit status n."""
    folder, deaths = job
    folder.mkdir(exist_ok=True)
    attempts = len(list(folder.iterdir()))
    if attempts < len(deaths):
        (folder / str(os.getpid())).touch()
        if (how := deaths[attempts]) < 0:
            os.kill(os.getpid(), -how)
        else:
            os._exit(how)
    return folder.name


def sleep(folder: Path) -> None:
    """For ever; tells its process id."""
    (folder / str(os.getpid())).touch()
    time.sleep(10_000)


def never_end(folder: Path) -> None:
    """As `sleep`, but busy in Python."""
    (folder / str(os.getpid())).touch()
    while True:
        sum(range(1000))


def square_or_never_end(job: Path | int) -> int:
    if isinstance(job, Path):
        never_end(job)
        raise AssertionError
    return job * job


def sleep_once(job: tuple[Path, int]) -> int:
    """Job 5 sleeps at its first attempt."""
    folder, i = job
    if i == 5 and not any(folder.iterdir()):
        sleep(folder)
    return i


def log_and_wait(job: tuple[Path, int]) -> int:
    with (job[0] / "begun").open("a") as file:
        file.write(f"{job[1]}\n")
    time.sleep(0.02)
    return job[1]


def report_often(job: int) -> int:
    began = time.monotonic()
    while time.monotonic() - began < 2.2 * REPORT_SECONDS:
        report((job, os.getpid()))
        time.sleep(0.001)
    return job


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Neither gone nor waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- drivers of a Ray cluster, each in a process of its own


def gather(address: str, task: Callable[[Any], Any], jobs: Sequence[Any], **rest: Any) -> list[Any]:
    return list(run_ray(task, jobs, address, **rest))


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


def run_here_alone(address: str, folder: Path) -> None:
    sys.path.append(str(folder))
    gather(address, importlib.import_module("here_alone").task, range(100))


def run_as_version_1(address: str) -> None:
    import ray

    version, ray.__version__ = ray.__version__, "1.0"
    try:
        gather(address, square, [1])
    finally:
        ray.__version__ = version


def close_early(address: str, folder: Path) -> list[int]:
    results: Iterator[Any] = run_ray(sleep_once, [(folder, i) for i in range(5, 12)], address)
    assert sorted(next(results) for _ in range(6)) == list(range(6, 12))
    wait_until(lambda: any(folder.iterdir()))
    results.close()  # type: ignore[attr-defined]
    return [int(file.name) for file in folder.iterdir()]


def build_on_ray(words: list[str], folder: Path, died: Path) -> tuple[int, str, str]:
    """The command in this folder; once, a worker dies at a shard. Its exit status and what it wrote."""
    from tools.preprocess.build_dataset import main

    def run(task: object, *rest: Any, **options: Any) -> Iterator[Any]:
        return run_ray(partial(die_and_make_shard, died), *rest, **options)

    os.chdir(folder)
    ray_engine.run_ray = run  # type: ignore[assignment]
    try:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main(words)
    finally:
        ray_engine.run_ray = run_ray
    return code, out.getvalue(), err.getvalue()


def die_and_make_shard(died: Path, job: Any) -> Any:
    from megatron_vocagno.preprocess.shards import make_shard

    if job.index == 2 and not died.exists():
        died.touch()
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGKILL]).start()
    return make_shard(job)


def score_on_ray(address: str, folder: Path, asked: Any) -> int:
    """How many shards it scored."""
    from megatron_vocagno.preprocess.score import score

    shards: list[Any] = []
    score(folder, asked, partial(run_ray, address=address, on_gpus=True), on_shard=shards.append)
    return len(shards)
