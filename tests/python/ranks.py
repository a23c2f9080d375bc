"""Ranks for tests: as threads of this process, or as processes with a gloo group."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any, Callable, List

import pytest

torch = pytest.importorskip("torch")


class Communicator:
    """What Buffer uses of an mpi4py communicator, between threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: List[Any]) -> None:
        self._rank, self._size, self._barrier, self._board = rank, size, barrier, board

    def Get_rank(self) -> int:  # mpi4py's name
        return self._rank

    def Get_size(self) -> int:
        return self._size

    def allgather(self, mine: Any) -> List[Any]:
        self._board[self._rank] = mine
        self._barrier.wait()
        everything = list(self._board)
        self._barrier.wait()
        return everything


def run(num_ranks: int, body: Callable[[Communicator], Any], timeout_s: float = 60) -> List[Any]:
    """``body(comm)`` in one thread per rank; what each returned, in rank order. The lowest rank's exception is raised here."""
    barrier = threading.Barrier(num_ranks, timeout=timeout_s)
    board: List[Any] = [None] * num_ranks
    results: List[Any] = [None] * num_ranks
    failures: List[Any] = [None] * num_ranks

    def run_rank(rank: int) -> None:
        try:
            results[rank] = body(Communicator(rank, num_ranks, barrier, board))
        except BaseException as error:  # raised again below
            failures[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run_rank, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    # A broken barrier is what the other ranks see of a failure.
    first = [failure for failure in failures if not isinstance(failure, (threading.BrokenBarrierError, type(None)))]
    for failure in first or [failure for failure in failures if failure is not None]:
        raise failure
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _gloo_rank(rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: Any) -> None:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    try:
        function(dist.group.WORLD, *args)
        if dist.is_initialized():  # a test may end it itself
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_gloo(num_ranks: int, function: Callable[..., Any], *args: Any) -> None:
    """``function(group, *args)`` in one process per rank; it must be importable. An exception of one is raised here. The
    environment is that of the first call."""
    import multiprocessing

    import torch.multiprocessing as mp

    # A server that has imported torch and runs no thread is forked: torch is imported once, not by every rank.
    multiprocessing.set_forkserver_preload(["torch.distributed", "deep_ep", "preload_clients"])
    mp.start_processes(_gloo_rank, args=(num_ranks, free_port(), function, args), nprocs=num_ranks, join=True,
                       start_method="forkserver")
