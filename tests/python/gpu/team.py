"""Ranks on GPUs for tests: processes that live for many tests, because each takes seconds to begin. Functions of checks_*.py run
in all of them at once."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List

import torch

HERE = Path(__file__).parent


class Rank:
    """What a check gets: who it is, and a Buffer and an Engine that all checks share."""

    def __init__(self, rank: int, num_ranks: int, group: Any) -> None:
        self.rank, self.num_ranks, self.group = rank, num_ranks, group
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._made: Dict[str, Any] = {}

    @property
    def buffer(self) -> Any:
        if "buffer" not in self._made:
            import deep_ep

            hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 2048, self.num_ranks, 64)
            self._made["buffer"] = deep_ep.Buffer(self.group, 64 << 20, hint, low_latency_mode=True, explicitly_destroy=True)
        return self._made["buffer"]

    @property
    def engine(self) -> Any:
        if "engine" not in self._made:
            import anyep

            self._made["engine"] = anyep.Engine.create(
                self.group, device=self.device, rows_bytes=64 << 20,
                low_latency_bytes=anyep.low_latency_bytes(num_experts=64, top_k=8, hidden=1024, max_tokens=64,
                                                          num_ranks=self.num_ranks))
        return self._made["engine"]

    def reset(self) -> None:
        """After a failure somewhere: the next check has engines of its own. Says nothing to anybody."""
        self._made.clear()
        gc.collect()
        torch.cuda.synchronize()

    def close(self) -> None:
        if "buffer" in self._made:
            self._made["buffer"].destroy()
        if "engine" in self._made:
            self._made["engine"].close()


def _work(rank: int, num_ranks: int, port: int, tasks: Any, answers: Any) -> None:
    import torch.distributed as dist

    sys.path[:0] = [str(HERE), str(HERE.parent)]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("ANYEP_TIMEOUT_S", "5")
    os.environ.setdefault("ANYEP_STARTUP_TIMEOUT_S", "30")
    torch.set_num_threads(1)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    me = Rank(rank, num_ranks, dist.group.WORLD)
    while True:
        task = tasks.get()
        if task is None:
            break
        module, function, arguments = task
        try:
            if module == "reset":
                me.reset()
                answers.put((rank, None, None))
                continue
            result = getattr(importlib.import_module(module), function)(me, *arguments)
            torch.cuda.synchronize()
            answers.put((rank, None, result))
        except BaseException:
            answers.put((rank, traceback.format_exc(), None))
    try:
        me.close()
    finally:
        answers.put((rank, None, None))


class Team:
    """Started when it is first called, and again after a failure: ranks that disagree about what comes next serve nobody."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._processes: List[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._tasks = [context.Queue() for _ in range(self.num_ranks)]
        self._answers = context.Queue()
        self._processes = [context.Process(target=_work, args=(rank, self.num_ranks, port, self._tasks[rank], self._answers),
                                           daemon=True) for rank in range(self.num_ranks)]
        for process in self._processes:
            process.start()

    def __call__(self, check: str, *arguments: Any, timeout_s: float = 20) -> List[Any]:
        """``check``: "module.function"; what it returned on every rank. Raises with every rank's traceback."""
        if not self._processes:
            self._start()
            timeout_s += 40
        module, function = check.split(".")
        for tasks in self._tasks:
            tasks.put((module, function, arguments))
        results, failures = self._collect(timeout_s)
        if failures:
            print(f"\n{check} {arguments}", *(failure[-1500:] for failure in failures), sep="\n", flush=True)
            self._reset(all_answered=len(results) == self.num_ranks)
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(self.num_ranks)]

    def _reset(self, all_answered: bool) -> None:
        """New engines, or new processes where one does not answer."""
        if all_answered:
            for tasks in self._tasks:
                tasks.put(("reset", "", ()))
            results, failures = self._collect(15)
            if not failures and len(results) == self.num_ranks:
                return
        self.kill()

    def _collect(self, timeout_s: float) -> Any:
        results: Dict[int, Any] = {}
        failures: List[str] = []
        until = time.monotonic() + timeout_s
        while len(results) < self.num_ranks:
            try:
                rank, failure, result = self._answers.get(timeout=1)
            except queue.Empty:
                dead = [rank for rank, process in enumerate(self._processes)
                        if process.exitcode is not None and rank not in results]
                if dead or time.monotonic() > until:
                    silent = [rank for rank in range(self.num_ranks) if rank not in results]
                    failures.append(f"no answer from ranks {silent}, of which {dead} are dead")
                    break
                continue
            results[rank] = result
            if failure is not None:
                failures.append(f"rank {rank}:\n{failure}")
                until = min(until, time.monotonic() + 10)  # the others will hear of it
        return results, failures

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def stop(self) -> None:
        if not self._processes:
            return
        for tasks in self._tasks:
            tasks.put(None)
        _, failures = self._collect(30)
        for process in self._processes:
            process.join(10)
        self.kill()
        assert not failures, "\n".join(failures)
