"""Ranks of a Python benchmark: one process each, with a torch.distributed gloo group over loopback."""
import os
import socket
import time


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank(rank, num_ranks, port, function, arguments):
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    try:
        function(rank, num_ranks, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(num_ranks, function, *arguments, timeout_s=120):
    """``function(rank, num_ranks, *arguments)`` in fresh processes; it must be importable. Raises what a rank raised, and
    TimeoutError when they take longer: then they are killed."""
    import torch.multiprocessing as mp

    context = mp.start_processes(_rank, args=(num_ranks, _free_port(), function, arguments), nprocs=num_ranks, join=False,
                                 start_method="spawn")
    deadline = time.monotonic() + timeout_s
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{num_ranks} ranks took longer than {timeout_s} s")


def bind_to_core(rank, num_ranks):
    """A core of its own for each rank, if there are as many. Ranks that wait by yielding may else share one for long, because
    to the scheduler two of them there and a stranger on another core are well placed."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= num_ranks:
        os.sched_setaffinity(0, {cores[rank]})


def slowest(us):
    """Per iteration the time of the slowest rank; a collective call."""
    import torch
    import torch.distributed as dist

    times = torch.tensor(us, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return times.tolist()


def total(number):
    """Of all ranks; a collective call."""
    import torch
    import torch.distributed as dist

    value = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(value)
    return int(value)


def most(number):
    """Of all ranks; a collective call."""
    import torch
    import torch.distributed as dist

    value = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
