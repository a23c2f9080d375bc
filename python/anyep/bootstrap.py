"""How ranks meet when an engine is created: process groups of torch, communicators of mpi4py, local threads and processes, or
any all-gather of bytes."""

from __future__ import annotations

import sys
import threading
from typing import Any, Callable, List, Optional

from . import _native
from .errors import ArgumentError

Bootstrap = _native.Bootstrap
LocalGroup = _native.LocalGroup


def from_callback(rank: int, num_ranks: int, all_gather: Callable[[bytes], bytes]) -> Bootstrap:
    """Any all-gather.

    Args:
        rank, num_ranks: this rank, 0..num_ranks-1, and the size of the group.
        all_gather: gets this rank's bytes and returns every rank's, joined in rank order. Collective; sizes are equal on all
            ranks. It is called by ``Engine.create`` only, on the calling thread.
    """
    return _native.callback_bootstrap(rank, num_ranks, all_gather)


def from_mpi(comm: Any) -> Bootstrap:
    """An mpi4py communicator (``Get_rank``, ``Get_size`` and ``allgather`` are used)."""
    return from_callback(comm.Get_rank(), comm.Get_size(), lambda mine: b"".join(comm.allgather(mine)))


def from_torch(group: Any) -> Bootstrap:
    """A torch.distributed process group of any backend, perhaps smaller than the world. Collective operations of the group
    run while an engine is created, and at no other time."""
    import torch
    import torch.distributed as dist

    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0 or num_ranks < 1:
        raise ArgumentError("create: group = a group that this process is not in, allowed: a group with this process",
                            argument="group")
    on_gpu = dist.get_backend(group) == "nccl"

    def all_gather(mine: bytes) -> bytes:
        gathered = bytearray(len(mine) * num_ranks)
        here = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        everywhere = torch.frombuffer(gathered, dtype=torch.uint8)
        if on_gpu:
            device = torch.device("cuda", torch.cuda.current_device())
            parts = [torch.empty(len(mine), dtype=torch.uint8, device=device) for _ in range(num_ranks)]
            dist.all_gather(parts, here.to(device), group=group)
            everywhere.copy_(torch.cat(parts))
        else:
            dist.all_gather(list(everywhere.chunk(num_ranks)), here, group=group)
        return bytes(gathered)

    return from_callback(rank, num_ranks, all_gather)


def as_bootstrap(group: Any) -> Bootstrap:
    """A Bootstrap as it is; a torch process group; an mpi4py communicator; None for a group of one rank."""
    if isinstance(group, Bootstrap):
        return group
    if group is None:
        return LocalGroup(1).member(0)
    if hasattr(group, "Get_rank") and hasattr(group, "allgather"):
        return from_mpi(group)
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and isinstance(group, dist.ProcessGroup):
        return from_torch(group)
    raise TypeError("create: group must be a Bootstrap, a torch process group, an mpi4py communicator or None, got "
                    f"{type(group).__name__}")


def run_threads(num_ranks: int, body: Callable[[Bootstrap], Any]) -> List[Any]:
    """Runs ``body(bootstrap)`` in one thread per rank; returns what each returned, in rank order. An exception of one rank is
    raised here when all have ended, the lowest rank's first."""
    group = LocalGroup(num_ranks)
    results: List[Any] = [None] * num_ranks
    failures: List[Optional[BaseException]] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = body(group.member(rank))
        except BaseException as error:  # it is raised again below
            failures[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        if failure is not None:
            raise failure
    return results


def run_processes(num_ranks: int, body: Callable[[Bootstrap], Any]) -> List[int]:
    """Runs ``body(bootstrap)`` in one forked process per rank; returns their exit codes in rank order (negative: the signal
    that ended it). An exception in a rank is written to standard error and gives exit code 1."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    group = LocalGroup(num_ranks)
    processes = [context.Process(target=lambda rank=rank: body(group.member(rank))) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode if process.exitcode is not None else -1 for process in processes]
