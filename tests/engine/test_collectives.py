"""An error on one rank ends all of them. The ranks are threads here, because the network does not matter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_vocagno.engine import collectives
from megatron_vocagno.errors import RunError, SharedError

WORLD = 3


class Threads:
    """The collectives that `collectives` asks of torch.distributed. A rank that waits alone gets a BrokenBarrierError."""

    def __init__(self) -> None:
        self.rank = threading.local()
        self.barrier = threading.Barrier(WORLD, timeout=5)
        self.sent: list[Any] = [None] * WORLD

    def get_rank(self) -> int:
        rank: int = self.rank.number
        return rank

    def get_world_size(self) -> int:
        return WORLD

    def all_gather_object(self, received: list[Any], mine: Any) -> None:
        self.sent[self.get_rank()] = mine
        self.barrier.wait()
        received[:] = self.sent
        self.barrier.wait()

    def broadcast_object_list(self, objects: list[Any], src: int) -> None:
        received: list[Any] = [None] * WORLD
        self.all_gather_object(received, list(objects))
        objects[:] = received[src]


@pytest.fixture
def on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], list[Any]]:
    """What each rank returns, or the exception that it raises."""
    threads = Threads()
    monkeypatch.setattr(collectives, "dist", threads)

    def run(rank: int, action: Callable[[int], Any]) -> Any:
        threads.rank.number = rank
        try:
            return action(rank)
        except Exception as error:
            return error

    def run_all(action: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(WORLD) as pool:
            return list(pool.map(run, range(WORLD), [action] * WORLD))

    return run_all


def fail_with(error: Exception) -> None:
    raise error


def frames(error: BaseException) -> list[str]:
    traceback, names = error.__traceback__, []
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names


def test_what_the_first_rank_finds_all_have(on_all_ranks: Any) -> None:
    assert on_all_ranks(lambda rank: collectives.run_on_rank0(lambda: {"rank": rank}, OSError)) == [{"rank": 0}] * WORLD
    assert on_all_ranks(lambda rank: collectives.run_on_all_ranks(lambda: rank, OSError)) == [0, 1, 2]


def test_an_error_that_is_foreseen_is_the_same_on_all_ranks(on_all_ranks: Any) -> None:
    found = on_all_ranks(lambda rank: collectives.run_on_rank0(lambda: fail_with(RunError("no such")), RunError, OSError))
    assert [(type(error), str(error)) for error in found] == [(SharedError, "no such")] * WORLD


def test_an_error_that_nobody_foresaw_has_its_traceback_on_the_first_rank_and_ends_the_others(on_all_ranks: Any) -> None:
    defect = KeyError("target")
    found = on_all_ranks(lambda rank: collectives.run_on_rank0(lambda: fail_with(defect), RunError, OSError))
    assert found[0] is defect and frames(defect)[-1] == "fail_with"
    assert [(type(error), str(error)) for error in found[1:]] == [(SharedError, "KeyError: 'target'")] * 2


def test_it_has_it_on_whichever_rank_it_was_met(on_all_ranks: Any) -> None:
    defect = ValueError("not a number")
    found = on_all_ranks(lambda rank: collectives.run_on_all_ranks(lambda: fail_with(defect) if rank == 1 else rank, RunError))
    assert found[1] is defect and frames(defect)[-1] == "fail_with"
    for error in (found[0], found[2]):
        assert type(error) is SharedError and str(error).startswith("ValueError: not a number\n  This happened only on rank 1")


def test_work_goes_on_after_an_error_until_all_can_be_told(on_all_ranks: Any) -> None:
    def work(rank: int) -> collectives.Failure | None:
        watch = collectives.ErrorCollector(OSError)
        for part in range(3):
            with watch.on(part):
                fail_with(OSError(f"disk {part}")) if rank == 2 and part else None
        return watch.failure()

    assert on_all_ranks(work) == [collectives.Failure((2,), "1: disk 1")] * WORLD
