"""Run jobs on a Ray cluster, one task per job, on a core or a GPU. Only this module imports Ray.

Ray's own retries are off: by default Ray retries a task that runs out of memory forever. A dead worker or node costs a job one of
its tries, as on one machine (`workers`). Only as many tasks are submitted as keep the cluster busy.

Ray runs code for anyone with access to it. Token authentication is therefore on unless RAY_AUTH_MODE is set.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.workers import ONE_THREAD, Answer, Entry, JobFailure, Queue, Stop, run_job, serialize, unwrap

TASKS_PER_SLOT = 2  # one runs, one waits
CONNECT_SECONDS = 10

J = TypeVar("J")
R = TypeVar("R")


def run_ray(
    task: Callable[[J], R], jobs: Sequence[J], address: str, stop: Stop = (), on_gpus: bool = False
) -> Iterator[R | JobFailure[J]]:
    """Yield results as they arrive. Jobs start in their order.

    address  HOST:PORT of the cluster, or `auto` for the one of RAY_ADDRESS or of this machine
    on_gpus  give each task a separate GPU if the cluster has GPUs

    After the third death of a worker a job is a JobFailure. When the iterator is closed or dropped, its tasks are killed and the
    cluster stays up. The nodes need this package and the same paths to input and output. Reports of tasks are dropped.

    Raises CorpusError if the cluster cannot be used.
    """
    ray = _connect(address)
    queue, in_flight = Queue(jobs), dict[Any, Entry[J]]()
    slot = "GPU" if on_gpus and ray.cluster_resources().get("GPU") else "CPU"
    submit = ray.remote(num_cpus=1, num_gpus=int(slot == "GPU"), max_retries=0, runtime_env={"env_vars": ONE_THREAD})(_run).remote
    try:
        while queue or in_flight:
            window = TASKS_PER_SLOT * max(1, int(ray.cluster_resources().get(slot, 0)))
            while queue and len(in_flight) < window:
                entry = queue.popleft()
                in_flight[submit(task, entry.job, stop)] = entry
            (ready, *_), _ = ray.wait(list(in_flight))
            entry = in_flight.pop(ready)
            try:
                answer = _answer(ray, ready)
            except ray.exceptions.RayError as error:
                yield from queue.retry(entry, f"with: {_summary(error)}")
            else:
                yield unwrap(entry.job, answer)
    finally:
        ray.shutdown()


def _answer(ray: Any, ref: Any) -> Answer:
    """The answer of a task. Raises RayError if its worker died, and CorpusError if a retry cannot help."""
    try:
        answer: Answer = pickle.loads(ray.get(ref))
    except ray.exceptions.LocalRayletDiedError:
        raise CorpusError("Ray has ended on this machine; the next run will reuse the finished shards") from None
    except ray.exceptions.RayTaskError as error:  # not an exception of the task: `_run` returns those
        same = "the nodes need the same version of this package, and the same Python"
        raise CorpusError(f"the task cannot run on the cluster: {_summary(error.cause)} ({same})") from None
    return answer


def _run(task: Callable[[J], R], job: J, stop: Stop) -> bytes:
    return serialize(run_job(task, job, stop))


def _summary(error: BaseException) -> str:
    """The first line of an error: Ray's messages are very long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _connect(address: str) -> Any:
    """Connect to the cluster. Returns the ray module."""
    if address != "auto":
        _require_reachable(address)
    # Ray reads these variables on import. With the first, which is the default from Ray 2.61 on, a process without a token is
    # refused immediately. The second is the number of retries of a connection, which take up to 40 seconds each.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
    try:
        import ray
    except ImportError:
        raise CorpusError("Ray is not installed: pip install 'megatron-vocagno[ray]'") from None
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except ray.exceptions.AuthenticationError:
        raise CorpusError(
            "this process has no token for the Ray cluster: set RAY_AUTH_TOKEN_PATH to the token's file, or copy it to "
            "~/.ray/auth_token. For a cluster without authentication, set RAY_AUTH_MODE=disabled"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CorpusError(
            f"cannot use the Ray cluster at {address}: {str(error).strip()}\n"
            "  If it is running, check its token (RAY_AUTH_TOKEN_PATH) and its version of Ray"
        ) from None
    return ray


def _require_reachable(address: str) -> None:
    """Raises CorpusError if nothing listens at the address. Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise CorpusError(f"--ray-address {address}: expected 'auto' or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise CorpusError(f"no Ray cluster answers at {address} ({error}): is it running, and is the port open?") from None
