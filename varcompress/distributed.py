"""Several processes, one per device, started by torchrun: gloo on the CPU, nccl on CUDA."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from varcompress.errors import InputError, Stopped

PATIENCE = timedelta(hours=2)  # the others wait while rank 0 writes a checkpoint or the slowest encodes its images
A_MOMENT_S = 1.0  # in which rank 0, done with all else, prints a line
T = TypeVar("T")


class _Refused(SystemExit):
    """The end of a process because rank 0 refused something: with status 2, and without a word."""

    def __init__(self) -> None:
        super().__init__(2)


def local_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this process: under torchrun `cuda` is the GPU of its local rank. None is cuda if there is one."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return chosen


def is_rank_zero() -> bool:
    """Whether this process has rank 0, and with it the task to print and to write; without torchrun it has."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and which of them this one is."""

    rank: int = 0
    count: int = 1

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 alone and return its result on all ranks.

        Where it raises an InputError, rank 0 raises it, and the others exit after it, with status 2 without a word.
        """
        answer: list = [None, None]
        if self.is_rank_zero:
            try:
                answer[0] = function()
            except InputError as error:
                answer[1] = error
        if self.count > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1] if self.is_rank_zero else _Refused
        return answer[0]

    def check_same(self, function: Callable[[], str], what: str, remedy: str) -> str:
        """Run `function` on all ranks and return its result, which must be the same on all of them.

        what: what it is the digest of; remedy: how to make it the same. Both go into the InputError of rank 0.
        """
        own = function()
        if self.count > 1:
            found = [""] * self.count
            dist.all_gather_object(found, own)
            self.on_rank_zero(lambda: _check_equal(found, what, remedy))
        return own

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in its place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree_(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor in every process, in place."""
        if self.count > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def largest(self, *numbers: int) -> list[int]:
        """Of each number the largest that any process has."""
        found = torch.tensor(numbers)
        if self.count > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()


def _check_equal(found: list[str], what: str, remedy: str) -> None:
    others = [str(rank) for rank, value in enumerate(found) if value != found[0]]
    if others:
        ranks = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(others)} have"
        raise InputError(f"{what} must be the same in all processes, but {ranks} others than rank 0: {remedy}")


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks of the processes that torchrun started, joined for the block; without torchrun, this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except ValueError as error:  # of the environment that torchrun sets
        raise InputError(f"{' '.join(str(error).split())}: start the processes with torchrun") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except (_Refused, Stopped):
        _outlast_rank_zero()
        raise
    finally:
        dist.destroy_process_group()


def _outlast_rank_zero() -> None:
    """Wait until rank 0 has ended its work: torchrun kills it, before it says why, once another process is gone."""
    if dist.get_rank():
        with suppress(RuntimeError):  # which is how its leaving shows: it sends nothing
            dist.recv(torch.empty(1), 0)
        time.sleep(A_MOMENT_S)
