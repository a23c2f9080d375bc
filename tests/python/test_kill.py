"""Ranks that are killed. At named points where the build has them (ANYEP_FAULTS), at random times everywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import anyep

def rounds(bootstrap, rounds_before_fault, report, mode):
    """Runs on one rank; `report(dict)` is called once, after the error."""
    import torch

    torch.set_num_threads(1)
    hidden = 128
    budget = {"rows_bytes": 8 << 20, "masks": False,
              "low_latency_bytes": anyep.low_latency_bytes(num_experts=8, top_k=2, hidden=hidden, max_tokens=8, num_ranks=4)}
    ids = torch.tensor([[0, 7], [2, 5], [1, 1]])
    weights = torch.ones(3, 2)
    engine = None
    finished = 0
    try:
        engine = anyep.Engine.create(bootstrap, **budget)
        x = torch.full((3, hidden), engine.rank + 1.0, dtype=torch.bfloat16)
        while True:
            if mode == "high_throughput":
                handle = engine.route(ids, 8)
                rows = engine.dispatch(x, handle, experts=ids, wait=finished % 2 == 0)
                rows.event.wait()
                engine.combine(rows.rows.x, handle)
            else:
                call = engine.low_latency_dispatch(x, ids, 8, 8, hook=finished % 2 == 1)
                if finished % 2 == 1:
                    call.receive()
                engine.low_latency_combine(call.result.x, ids, weights, call.result, 8, 8)
            finished += 1
            if finished == rounds_before_fault:
                report({"ready": True})
    except anyep.Error as error:
        report({"class": type(error).__name__, "peers": error.peers, "op": error.op, "phase": error.phase, "text": str(error),
                "at": time.clock_gettime(time.CLOCK_MONOTONIC), "finished": finished})
    if engine is not None:
        engine.close()


class Team:
    """Forked ranks without torch's threads in the parent: the child processes import torch themselves."""

    def __init__(self, num_ranks, mode, faults=None):
        self.group = anyep.LocalGroup(num_ranks)
        self.pids, self.pipes = [], []
        for rank in range(num_ranks):
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.close(reader)
                    if faults and rank in faults:
                        os.environ["ANYEP_FAULT"] = faults[rank]

                    def report(what, writer=writer):
                        os.write(writer, (json.dumps(what) + "\n").encode())

                    rounds(self.group.member(rank), 3, report, mode)
                    survivors = self.group.member_without(rank, self._gone(faults, num_ranks))
                    with anyep.Engine.create(survivors, rows_bytes=8 << 20) as engine:
                        import torch

                        handle = engine.route(torch.tensor([[0], [7]]), 8)
                        got = engine.dispatch(torch.full((2, 8), 1.0), handle).rows.x
                        report({"again": [engine.num_ranks, len(got), float(got.sum())]})
                    code = 0
                finally:
                    os._exit(code)
            os.close(writer)
            self.pids.append(pid)
            self.pipes.append(os.fdopen(reader))

    @staticmethod
    def _gone(faults, num_ranks):
        return sorted(faults) if faults else [num_ranks - 1]

    def lines(self, rank):
        return [json.loads(line) for line in self.pipes[rank]]

    def end(self):
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for pipe in self.pipes:
            pipe.close()


def wait_for(pid, limit_s=30):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    raise AssertionError(f"process {pid} did not end within {limit_s} s")


def check_survivors(team, num_ranks, victim, killed_at=None):
    for rank in range(num_ranks):
        if rank == victim:
            continue
        lines = team.lines(rank)
        error = next(line for line in lines if "class" in line)
        assert error["class"] == "PeerDeadError" and error["peers"] == [victim], error
        assert error["op"] and error["phase"], error
        if killed_at is not None:
            assert error["at"] - killed_at < 1.0
        again = next(line for line in lines if "again" in line)["again"]
        holders = {0: [0], 7: [num_ranks - 2]}  # of the new group: experts 0 and 7 lie on its first and last rank
        mine = rank - (rank > victim)
        expected = sum((num_ranks - 1) for ranks in holders.values() if mine in ranks)
        assert again == [num_ranks - 1, expected, expected * 8.0]
        assert os.waitstatus_to_exitcode(wait_for(team.pids[rank])) == 0


def faults_are_built():
    code = "import anyep\nanyep.Engine.create(None, rows_bytes=1 << 22)"
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ANYEP_FAULT": "create.map:0:*:exit"}, check=False)
    return ran.returncode == 3


needs_fault_points = pytest.mark.skipif(not faults_are_built(), reason="this build has no fault points")


@needs_fault_points
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("mode, point", [
    ("high_throughput", "route.before_send"), ("high_throughput", "dispatch.mid_send"),
    ("high_throughput", "dispatch.in_recv"), ("high_throughput", "combine.after_flag"), ("high_throughput", "between"),
    ("low_latency", "low_latency_dispatch.mid_send"), ("low_latency", "low_latency_combine.in_recv")])
def test_a_rank_killed_at_a_point_is_named_and_the_rest_go_on(num_ranks, mode, point):
    victim = num_ranks - 1
    team = Team(num_ranks, mode, {victim: f"{point}:{victim}:*:kill"})
    try:
        assert os.waitstatus_to_exitcode(wait_for(team.pids[victim])) == -signal.SIGKILL
        check_survivors(team, num_ranks, victim)
    finally:
        team.end()


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_killed_at_a_random_time_is_named_within_a_second(seed):
    chance = random.Random(seed)
    num_ranks = chance.choice([2, 3, 4])
    victim = num_ranks - 1
    mode = chance.choice(["high_throughput", "low_latency"])
    team = Team(num_ranks, mode)
    try:
        assert json.loads(team.pipes[victim].readline()) == {"ready": True}
        time.sleep(chance.uniform(0, 0.05))
        killed_at = time.clock_gettime(time.CLOCK_MONOTONIC)
        os.kill(team.pids[victim], signal.SIGKILL)
        assert os.waitstatus_to_exitcode(wait_for(team.pids[victim])) == -signal.SIGKILL
        check_survivors(team, num_ranks, victim, killed_at)
    finally:
        team.end()
