"""Exchange values and errors between ranks, so that one failing rank does not leave the others blocked in a collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from deepspeed import comm as dist
from torch import Tensor

from megatron_vocagno.errors import SharedError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """An error that occurred on some ranks."""

    ranks: tuple[int, ...]
    message: str
    """Message of the first of these ranks."""
    path: str | None = None
    """The model or dataset that is missing on the first of these ranks: see UserError."""


class ErrorCollector:
    """Stores the first error of this rank. The rank can then continue to the collective in which all ranks share their errors."""

    def __init__(self, *kinds: type[Exception]) -> None:
        """kinds: errors that are shared as a message. Any other error is a bug, and is raised again on its rank."""
        self.kinds = kinds
        self.error: str | None = None
        self.path: str | None = None
        self._defect: Exception | None = None

    @contextmanager
    def on(self, subject: object = None) -> Iterator[None]:
        """Run a block without collectives. subject: for example a file, is put in front of the message of an error."""
        try:
            yield
        except Exception as error:
            message = str(error)
            if not isinstance(error, self.kinds):
                self._defect = self._defect or error
                message = f"{type(error).__name__}: {message}"
            if self.error is None:
                self.error = f"{subject}: {message}" if subject else message
                self.path = getattr(error, "path", None)

    def failure(self) -> Failure | None:
        """The same result on all ranks: None if no rank had an error. Collective over the world.

        An error of another kind is raised on its own rank only.
        """
        errors: list[tuple[str, str | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if self.error is None else (self.error, self.path))
        if self._defect is not None:
            raise self._defect
        failed = {rank: error for rank, error in enumerate(errors) if error is not None}
        return Failure(tuple(failed), *next(iter(failed.values()))) if failed else None


def run_on_all_ranks(action: Callable[[], Result], *errors: type[Exception]) -> Result:
    """Run `action` on every rank, and return its result after it has succeeded on all of them. Collective over the world.

    `action` must not contain collectives. If it raises one of `errors` on any rank, all ranks raise SharedError. Any other error
    is raised unchanged on its own rank, and as SharedError on the others.
    """
    collector = ErrorCollector(*errors)
    with collector.on():
        result = action()
    if failure := collector.failure():
        some = len(failure.ranks) < dist.get_world_size()
        ranks = "rank " + ", ".join(map(str, failure.ranks))
        hint = f"\n  This happened only on {ranks}: do all machines see the same files?" if some else ""
        raise SharedError(failure.message + hint, failure.path)
    return result


def run_on_rank0(action: Callable[[], Result], *errors: type[Exception]) -> Result:
    """Run `action` on the first rank, and return its result on all ranks. Collective over the world.

    If it raises one of `errors`, all ranks raise SharedError. Any other error is raised unchanged on the first rank, and as
    SharedError on the others.
    """
    collector = ErrorCollector(*errors)
    result: list[Result | None] = [None]
    if dist.get_rank() == 0:
        with collector.on():
            result = [action()]
    if failure := collector.failure():
        raise SharedError(failure.message, failure.path)
    dist.broadcast_object_list(result, src=0)
    return cast(Result, result[0])


def all_gather(item: Result) -> list[Result]:
    """The items of all ranks, in the order of the ranks. Collective over the world."""
    items: list[Result | None] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return cast(list[Result], items)


def my_rank() -> int:
    return int(dist.get_rank())


def all_reduce_sum(tensor: Tensor, group: Any = None) -> None:
    """Replace the tensor by its sum over all ranks, or over the ranks of a process group. Collective over these ranks."""
    dist.all_reduce(tensor, group=group)


def all_reduce_max(number: int, device: torch.device) -> int:
    """The largest number of all ranks. Collective over the world."""
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)
