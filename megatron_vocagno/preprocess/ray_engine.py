"""Runs jobs on a Ray cluster, one task a job, on a core or on a GPU. The only door to Ray.

Ray itself repeats nothing: by its defaults a task that runs out of memory is repeated for ever. A dead worker or node costs
a job one of its tries, as on one machine (`workers`). Only so many tasks are handed to Ray as keep the cluster busy.

Ray runs what anyone with access sends it, so that token authentication is on unless RAY_AUTH_MODE says otherwise.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from megatron_vocagno.errors import CorpusError
from megatron_vocagno.preprocess.workers import ONE_THREAD, Answer, Entry, Failure, Queue, Stop, run_job, serialize, unwrap

TASKS_A_SLOT = 2  # one runs, one is at hand
SECONDS_TO_ANSWER = 10

J = TypeVar("J")
R = TypeVar("R")


def run_ray(
    task: Callable[[J], R], jobs: Sequence[J], address: str, stop: Stop = (), on_gpus: bool = False
) -> Iterator[R | Failure[J]]:
    """Results as they come; jobs are begun in their order.

    address: HOST:PORT of the cluster, or `auto`: as RAY_ADDRESS says, or the one that runs on this machine.
    on_gpus: each task has a GPU of its own, where the cluster has any.

    The third death of a worker at one job is a Failure. Raises CorpusError. When the iterator is closed or dropped, its tasks
    are killed; the cluster stays. The nodes need this package, and the same paths to input and output. What tasks `report` is
    not heard.
    """
    ray = _connect(address)
    queue, in_flight = Queue(jobs), dict[Any, Entry[J]]()
    slot = "GPU" if on_gpus and ray.cluster_resources().get("GPU") else "CPU"
    submit = ray.remote(num_cpus=1, num_gpus=int(slot == "GPU"), max_retries=0, runtime_env={"env_vars": ONE_THREAD})(_run).remote
    try:
        while queue or in_flight:
            window = TASKS_A_SLOT * max(1, int(ray.cluster_resources().get(slot, 0)))
            while queue and len(in_flight) < window:
                entry = queue.popleft()
                in_flight[submit(task, entry.job, stop)] = entry
            (ready, *_), _ = ray.wait(list(in_flight))
            entry = in_flight.pop(ready)
            try:
                answer = _answer(ray, ready)
            except ray.exceptions.RayError as error:
                yield from queue.again(entry, f"like this: {_summary(error)}")
            else:
                yield unwrap(entry.job, answer)
    finally:
        ray.shutdown()


def _answer(ray: Any, ref: Any) -> Answer:
    """Raises a RayError when the worker died, and CorpusError when no other would do better."""
    try:
        answer: Answer = pickle.loads(ray.get(ref))
    except ray.exceptions.LocalRayletDiedError:
        raise CorpusError("Ray has ended on this machine; what is finished will be reused by the next run") from None
    except ray.exceptions.RayTaskError as error:  # not from the task: _run raises nothing
        same = "the nodes need the same version of this package, and the same Python"
        raise CorpusError(f"the task cannot run on the cluster: {_summary(error.cause)} ({same})") from None
    return answer


def _run(task: Callable[[J], R], job: J, stop: Stop) -> bytes:
    return serialize(run_job(task, job, stop))


def _summary(error: BaseException) -> str:
    """Ray's messages run over pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _connect(address: str) -> Any:
    """The ray module, connected."""
    if address != "auto":
        _refuse_silent(address)
    # read when Ray is imported. With the first, as in Ray from 2.61 on, a process that has no token is refused at once;
    # the second is how often a refused or unanswered connection is tried again, each time for up to 40 seconds
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
            "this process has no token for the Ray cluster: name its file in RAY_AUTH_TOKEN_PATH, or copy it to "
            "~/.ray/auth_token. For a cluster that takes anybody, set RAY_AUTH_MODE=disabled"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CorpusError(
            f"cannot use the Ray cluster at {address}: {str(error).strip()}\n"
            "  If it runs, its token (RAY_AUTH_TOKEN_PATH) or its version may be another one"
        ) from None
    return ray


def _refuse_silent(address: str) -> None:
    """Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise CorpusError(f"--ray-address {address}: neither 'auto' nor HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise CorpusError(f"no Ray cluster answers at {address}: {error}") from None
