"""What one rank meets, all ranks act on: an error on one must not leave the others waiting for it."""

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
    """An error that some ranks met."""

    ranks: tuple[int, ...]
    message: str
    """Of the first of them."""
    path: str | None = None
    """The model or dataset that is missing there: see UserError."""


class ErrorCollector:
    """Notes the first error, so that this rank can go on to where all ranks tell each other."""

    def __init__(self, *kinds: type[Exception]) -> None:
        """kinds: those that are told as a message. Any other is a defect, and raised again where it was met."""
        self.kinds = kinds
        self.error: str | None = None
        self.path: str | None = None
        self._defect: Exception | None = None

    @contextmanager
    def on(self, what: object = None) -> Iterator[None]:
        """Run a block without collectives; `what` it works on stands before its error."""
        try:
            yield
        except Exception as error:
            message = str(error)
            if not isinstance(error, self.kinds):
                self._defect = self._defect or error
                message = f"{type(error).__name__}: {message}"
            if self.error is None:
                self.error = f"{what}: {message}" if what else message
                self.path = getattr(error, "path", None)

    def failure(self) -> Failure | None:
        """The same on all ranks; None where no rank met an error. Collective over the world.

        Raises, on the rank that met it alone, an error of another kind.
        """
        errors: list[tuple[str, str | None] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if self.error is None else (self.error, self.path))
        if self._defect is not None:
            raise self._defect
        met = {rank: error for rank, error in enumerate(errors) if error is not None}
        return Failure(tuple(met), *next(iter(met.values()))) if met else None


def run_on_all_ranks(action: Callable[[], Result], *errors: type[Exception]) -> Result:
    """What `action` returns, once it has succeeded on every rank; it may hold no collectives. Collective over the world.

    Raises SharedError on all ranks where it raised one of `errors` on any. Any other error is raised as it is where it was met,
    and as a SharedError elsewhere.
    """
    watch = ErrorCollector(*errors)
    with watch.on():
        result = action()
    if failure := watch.failure():
        some = len(failure.ranks) < dist.get_world_size()
        who = "rank " + ", ".join(map(str, failure.ranks))
        where = f"\n  Met by {who} alone: do all machines see the same files?" if some else ""
        raise SharedError(failure.message + where, failure.path)
    return result


def run_on_rank0(action: Callable[[], Result], *errors: type[Exception]) -> Result:
    """What `action` returns on the first rank, on all. Collective over the world.

    Raises SharedError on all ranks where it raised one of `errors`. Any other error is raised as it is on the first, and as a
    SharedError on the others.
    """
    watch = ErrorCollector(*errors)
    answer: list[Result | None] = [None]
    if dist.get_rank() == 0:
        with watch.on():
            answer = [action()]
    if failure := watch.failure():
        raise SharedError(failure.message, failure.path)
    dist.broadcast_object_list(answer, src=0)
    return cast(Result, answer[0])


def all_gather(item: Result) -> list[Result]:
    """One of every rank, in their order. Collective over the world."""
    items: list[Result | None] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return cast(list[Result], items)


def my_rank() -> int:
    return int(dist.get_rank())


def all_reduce_sum(tensor: Tensor, group: Any = None) -> None:
    """Replace the tensor by the sum over all ranks, or over those of a process group. Collective over them."""
    dist.all_reduce(tensor, group=group)


def all_reduce_max(number: int, device: torch.device) -> int:
    """Of the numbers of all ranks. Collective over the world."""
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)
