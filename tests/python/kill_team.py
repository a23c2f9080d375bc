"""A program: forks ranks that work until one of them is killed. Prints one JSON object a line, each with its "rank".

    python kill_team.py NUM_RANKS MODE [VICTIM FAULT]

A process of its own: the library reads ANYEP_FAULT once, and torch's threads of a test process would not live on in a fork.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy

import anyep

HIDDEN = 128


def work(bootstrap, mode, report):
    """Rounds of operations until an error comes, which is reported."""
    low_latency_bytes = anyep.low_latency_bytes(num_experts=8, top_k=2, hidden=HIDDEN, max_tokens=8, num_ranks=4)
    ids = numpy.array([[0, 7], [2, 5], [1, 1]])
    weights = numpy.ones((3, 2), dtype=numpy.float32)
    x = anyep.Typed(numpy.full((3, HIDDEN), 0x3F80, dtype=numpy.uint16), "bfloat16")  # 1.0
    engine = None
    finished = 0
    try:
        engine = anyep.Engine.create(bootstrap, rows_bytes=8 << 20, low_latency_bytes=low_latency_bytes)
        while True:
            odd = finished % 2 == 1
            if mode == "high_throughput":
                handle = engine.route(ids, 8)
                rows, event = engine.dispatch(x, handle, experts=ids, wait=odd)
                event.wait()
                engine.combine(rows.x, handle)
            else:
                call = engine.low_latency_dispatch(x, ids, 8, 8, hook=odd)
                if odd:
                    call.receive()
                engine.low_latency_combine(call.result.x, ids, weights, call.result, 8, 8)
            finished += 1
            if finished == 3:
                report({"ready": True})
    except anyep.Error as error:
        report({"class": type(error).__name__, "peers": error.peers, "op": error.op, "phase": error.phase, "text": str(error),
                "at": time.clock_gettime(time.CLOCK_MONOTONIC)})
    if engine is not None:
        engine.close()


def work_again(bootstrap, report):
    """Among the rest: 2 tokens to experts 0 and 7, which the first and the last rank host."""
    with anyep.Engine.create(bootstrap, rows_bytes=8 << 20) as engine:
        handle = engine.route(numpy.array([[0], [7]]), 8)
        rows = engine.dispatch(numpy.ones((2, 8), dtype=numpy.float32), handle).rows.x
        report({"again": [engine.rank, engine.num_ranks, len(rows), float(rows.sum())]})


def main():
    num_ranks, mode = int(sys.argv[1]), sys.argv[2]
    victim = num_ranks - 1
    group = anyep.LocalGroup(num_ranks)
    pids = []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid != 0:
            pids.append(pid)
            continue

        def report(what, rank=rank):
            os.write(1, (json.dumps({"rank": rank, **what}) + "\n").encode())  # one write: lines of ranks do not mix

        report({"pid": os.getpid()})
        if rank == victim and len(sys.argv) > 3:
            os.environ["ANYEP_FAULT"] = sys.argv[3]
        work(group.member(rank), mode, report)
        work_again(group.member_without(rank, [victim]), report)
        os._exit(0)
    for rank, pid in enumerate(pids):
        os.write(1, (json.dumps({"rank": rank, "exit": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}) + "\n").encode())


if __name__ == "__main__":
    main()
