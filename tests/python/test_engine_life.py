"""anyep.Engine: errors, groups, lifetimes, the log, plans."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time

import numpy
import pytest
import torch
from engines import IDS, ROWS_BYTES, low_latency_budget, on_ranks, tokens_of

import anyep


def test_errors_have_their_class_and_fields():
    with pytest.raises(anyep.ArgumentError) as caught:
        on_ranks(1, lambda engine: engine.route(torch.tensor(IDS), 0))
    error = caught.value
    assert isinstance(error, (anyep.Error, ValueError)) and isinstance(error, RuntimeError)
    assert (error.code, error.op, error.rank, error.argument, error.got) == ("argument", "route", 0, "shape.num_experts", "0")
    assert "allowed" in str(error) and error.allowed
    assert isinstance(pickle.loads(pickle.dumps(error)), anyep.ArgumentError)
    with pytest.raises(TimeoutError) as caught:
        def body(engine):
            if engine.rank == 0:
                engine.route(torch.tensor(IDS), 8, timeout_s=0.05)
            time.sleep(0.3)
        on_ranks(2, body)
    error = caught.value
    assert isinstance(error, anyep.PeerTimeoutError) and error.peers == [1] and error.op == "route"
    assert 0.05 <= error.elapsed_s < 5 and error.limit_s == pytest.approx(0.05)


@pytest.mark.parametrize("bad, kind", [
    (None, TypeError), ([[0, 1]], TypeError), ("ids", TypeError), (object(), TypeError),
    (torch.tensor(3), anyep.ArgumentError), (torch.zeros(2, 2), anyep.ArgumentError),
    (torch.zeros(2, 2, dtype=torch.int64).to_sparse(), anyep.ArgumentError),
    (torch.zeros(2, 2, dtype=torch.int64, device="meta"), anyep.ArgumentError),
    (torch.zeros(2, 2, dtype=torch.complex64), anyep.ArgumentError),
    (torch.zeros(1, 1, 1, 1, 2, dtype=torch.int64), anyep.ArgumentError),
    (numpy.zeros((2, 2), dtype="U3"), anyep.ArgumentError), (numpy.zeros((2, 2), dtype=object), anyep.ArgumentError),
    (numpy.zeros((), dtype=numpy.int64), anyep.ArgumentError),
])
def test_what_is_no_tensor_of_ours_is_refused_and_let_go(bad, kind):
    def body(engine):
        handle = engine.route(torch.tensor(IDS), 8)
        before = sys.getrefcount(bad)
        with pytest.raises(kind, match="x"):
            engine.dispatch(bad, handle)
        gc.collect()
        assert bad is None or sys.getrefcount(bad) <= before
        with pytest.raises(TypeError):
            engine.dispatch(tokens_of(0, torch.float32), handle, unknown=1)

    on_ranks(1, body)


def test_limits_that_are_no_time_are_refused():
    for seconds in (0, -1, float("nan"), float("inf"), 1e11):
        with pytest.raises(anyep.ArgumentError, match="timeout_s"):
            anyep.Tuning().timeout_s = seconds
    tuning = anyep.Tuning()
    tuning.close_timeout_s = 0.25
    assert tuning.close_timeout_s == 0.25 and tuning.timeout_s == 30


def test_groups_of_other_kinds():
    class Communicator:
        """What mpi4py offers, over threads."""

        def __init__(self, rank, board, meet):
            self._rank, self._board, self._meet = rank, board, meet

        def Get_rank(self):
            return self._rank

        def Get_size(self):
            return len(self._board)

        def allgather(self, mine):
            self._board[self._rank] = mine
            self._meet.wait()
            everybody = list(self._board)
            self._meet.wait()
            return everybody

    board, meet = [None] * 3, threading.Barrier(3)
    results = []

    def rank(index):
        with anyep.Engine.create(Communicator(index, board, meet), rows_bytes=ROWS_BYTES) as engine:
            results.append((engine.rank, engine.num_ranks, engine.route(torch.tensor(IDS), 8).num_rows))

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(0, 3, 9), (1, 3, 6), (2, 3, 3)]  # experts 0-2, 3-5, 6-7
    with anyep.Engine.create(None, rows_bytes=ROWS_BYTES) as alone:
        assert alone.num_ranks == 1
    with pytest.raises(TypeError, match="group"):
        anyep.Engine.create(3, rows_bytes=ROWS_BYTES)
    with pytest.raises(anyep.ArgumentError, match="rank order"):
        anyep.Engine.create(anyep.from_callback(0, 2, lambda mine: mine), rows_bytes=ROWS_BYTES)
    with pytest.raises(ZeroDivisionError):  # an exception of the callback passes through
        anyep.Engine.create(anyep.from_callback(0, 2, lambda mine: 1 // 0), rows_bytes=ROWS_BYTES)


def test_an_exception_inside_with_tells_the_peers_why():
    told = []

    def rank(bootstrap):
        with anyep.Engine.create(bootstrap, rows_bytes=ROWS_BYTES) as engine:
            if engine.rank == 1:
                raise KeyError("no such expert")
            try:
                engine.route(torch.tensor(IDS), 8)
            except anyep.PeerDeadError as error:
                told.append((error.code, str(error)))

    with pytest.raises(KeyError):
        anyep.run_threads(2, rank)
    assert told and told[0][0] == "aborted" and "no such expert" in told[0][1]


def test_engines_are_not_pickled_and_a_second_thread_is_refused_a_call():
    def body(engine):
        with pytest.raises(TypeError):
            pickle.dumps(engine)
        with pytest.raises(TypeError):
            pickle.dumps(anyep.Event())
        if engine.rank == 0:
            refusals = []

            def refused(call):
                try:
                    call()
                except anyep.StateError as error:
                    return "another thread" in str(error)
                return False

            def first():
                while refused(engine.barrier):  # masks() of the other thread may be in time
                    pass

            thread = threading.Thread(target=first)
            thread.start()
            deadline = time.monotonic() + 20
            while not refusals and time.monotonic() < deadline:
                if refused(engine.masks) and thread.is_alive():
                    refusals.append(True)
                time.sleep(0.001)
            go.set()
            thread.join()
            assert refusals
        else:
            go.wait()
            engine.barrier()

    go = threading.Event()
    on_ranks(2, body)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_engines_leave_nothing_behind():
    ids = torch.tensor(IDS)
    x = torch.ones(5, 32)

    def one():
        engine = anyep.Engine.create(None, rows_bytes=ROWS_BYTES)
        handle = engine.route(ids, 8)
        kept = engine.dispatch(x, handle, wait=False)
        kept.event.wait()
        if handle.num_rows % 2:
            engine.close()
        return kept.rows.x

    for _ in range(50):
        one()
    gc.collect()
    before = (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))
    maps = len(open("/proc/self/maps").readlines())
    memory = resident_bytes()
    for _ in range(1000):
        one()
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before
    assert len(open("/proc/self/maps").readlines()) <= maps + 8
    assert resident_bytes() - memory < 32 << 20


def test_log_lines_reach_the_logger_named_anyep(caplog):
    def body(engine):
        ids, x = torch.tensor(IDS), torch.ones(5, 128, dtype=torch.bfloat16)
        if engine.rank == 0:
            engine.low_latency_dispatch(x, ids, 8, 8, timeout_s=0.1)  # rank 1 stays away and is masked
            return engine.masks()
        time.sleep(0.3)
        return None

    with caplog.at_level("WARNING", logger="anyep"):
        assert on_ranks(2, body, masks=True, **low_latency_budget(2))[0] == [0, 1]
    assert any("masked" in record.getMessage() and record.name == "anyep" for record in caplog.records)


def test_plans_say_what_would_be_done():
    plan = anyep.plan("dispatch", num_experts=256, top_k=8, hidden=7168, max_tokens=4096, num_ranks=4, rows_bytes=1 << 30)
    assert plan.row_bytes >= 14336 and plan.wire_bytes > 4096 * 14336 and "dispatch" in str(plan)
    assert plan.choices and all(choice.what and choice.why for choice in plan.choices)
    with pytest.raises(anyep.ArgumentError, match="op = 'nothing'"):
        anyep.plan("nothing", num_experts=8, top_k=2, hidden=64, max_tokens=8, num_ranks=2)
    with pytest.raises(anyep.ArgumentError, match="top_k"):
        anyep.plan("route", num_experts=8, top_k=33, hidden=64, max_tokens=8, num_ranks=2, rows_bytes=1 << 20)
