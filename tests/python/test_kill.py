"""Ranks that are killed. At named points where the build has them (ANYEP_FAULTS), at random times everywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


class Team:
    """kill_team.py, and what its ranks said."""

    def __init__(self, *arguments):
        program = Path(__file__).with_name("kill_team.py")
        self._process = subprocess.Popen([sys.executable, str(program), *map(str, arguments)], stdout=subprocess.PIPE,
                                         text=True)
        self.said = []

    def read_until(self, rank, key):
        for line in self._process.stdout:
            self.said.append(json.loads(line))
            if self.said[-1]["rank"] == rank and key in self.said[-1]:
                return self.said[-1]
        raise AssertionError(f"rank {rank} never said {key}: {self.said}")

    def of(self, rank, key):
        return next(line[key] for line in self.said if line["rank"] == rank and key in line)

    def read_to_the_end(self):
        output, _ = self._process.communicate(timeout=60)
        self.said += map(json.loads, output.splitlines())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for line in self.said:
            if "pid" in line and not any(other["rank"] == line["rank"] and "exit" in other for other in self.said):
                try:
                    os.kill(line["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    pass
        self._process.kill()
        self._process.wait()


def check(team, num_ranks, killed_at=None):
    """The victim, the last rank, is dead; every other rank named it and worked on without it."""
    victim = num_ranks - 1
    assert team.of(victim, "exit") == -signal.SIGKILL
    for rank in range(victim):
        error = next(line for line in team.said if line["rank"] == rank and "class" in line)
        assert error["class"] == "PeerDeadError" and error["peers"] == [victim], error
        assert error["op"] and error["phase"], error
        if killed_at is not None:
            assert error["at"] - killed_at < 1.0
        rows = victim * ((rank == 0) + (rank == victim - 1))  # expert 0 lies on the first rank of the rest, 7 on the last
        assert team.of(rank, "again") == [rank, victim, rows, rows * 8.0]
        assert team.of(rank, "exit") == 0


def faults_are_built():
    code = "import anyep\nanyep.Engine.create(None, rows_bytes=1 << 22)"
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ANYEP_FAULT": "create.map:0:*:exit"}, check=False)
    assert ran.returncode in (0, 3), "an engine could not even be made"
    return ran.returncode == 3


needs_fault_points = pytest.mark.skipif(not faults_are_built(), reason="this build has no fault points")


@needs_fault_points
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("mode, point", [
    ("high_throughput", "route.before_send"), ("high_throughput", "dispatch.mid_send"),
    ("high_throughput", "dispatch.in_recv"), ("high_throughput", "combine.after_flag"), ("high_throughput", "between"),
    ("low_latency", "low_latency_dispatch.mid_send"), ("low_latency", "low_latency_combine.in_recv")])
def test_a_rank_killed_at_a_point_is_named_and_the_rest_go_on(num_ranks, mode, point):
    with Team(num_ranks, mode, f"{point}:{num_ranks - 1}:*:kill") as team:
        team.read_to_the_end()
        check(team, num_ranks)


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_killed_at_a_random_time_is_named_within_a_second(seed):
    chance = random.Random(seed)
    num_ranks = chance.choice([2, 3, 4])
    with Team(num_ranks, chance.choice(["high_throughput", "low_latency"])) as team:
        team.read_until(num_ranks - 1, "ready")
        time.sleep(chance.uniform(0, 0.05))
        killed_at = time.clock_gettime(time.CLOCK_MONOTONIC)
        os.kill(team.of(num_ranks - 1, "pid"), signal.SIGKILL)
        team.read_to_the_end()
        check(team, num_ranks, killed_at)
