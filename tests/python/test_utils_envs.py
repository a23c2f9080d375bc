"""deep_ep.utils.envs: start-up by the variables of the contract, in processes of their own, and what is asked of a
machine, against made-up tables."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

from deep_ep.utils import envs

LIMIT_S = 240  # importing torch in two processes of a loaded machine takes a while


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_python(code, **variables):
    """Starts Python on code with the paths of this process and the given variables alone from those of a launcher."""
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment.update(variables, PYTHONPATH=os.pathsep.join(path for path in sys.path if path), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(processes):
    try:
        outcomes = [(process.communicate(timeout=LIMIT_S), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for (_, errors), code in outcomes:
        assert code == 0, errors
    return [out for (out, _), _ in outcomes]


JOIN = """
    import random, sys, torch
    import torch.distributed as dist
    from deep_ep.utils import envs
    local, locals_ = {local}, {locals_}
    rank, size, group = envs.init_dist(local, locals_, seed=7)
    assert (rank, size) == (dist.get_rank(), dist.get_world_size()) == ({rank}, 2)
    assert dist.get_world_size(group) == 2 and dist.get_rank(group) == rank and group is not dist.group.WORLD
    assert torch.get_default_dtype() == torch.bfloat16
    assert (envs.get_global_seed(), envs.get_local_seed()) == (7, 7 + rank)
    drawn = torch.rand(1, dtype=torch.float32).item(), random.random()
    torch.manual_seed(7 + rank)
    random.seed(7 + rank)
    assert drawn == (torch.rand(1, dtype=torch.float32).item(), random.random())
    total = torch.tensor([rank + 1], dtype=torch.int64, device="cpu")
    dist.all_reduce(total, group=group)
    assert total.item() == 3
    assert envs.get_physical_domain_size(group) == (1, 2)
    assert envs.get_logical_domain_size(group) == (1, 2)
    assert envs.get_logical_domain_size(group, allow_hybrid_mode=False) == (1, 2)
    envs.dist_print(f"all {{rank}}")
    envs.dist_print(f"node {{rank}}", once_in_node=True)
    dist.destroy_process_group()
"""

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="would take GPUs")


@on_cpu
def test_init_dist_with_two_processes_on_a_node():
    port = str(free_port())
    out = finish([run_python(JOIN.format(local=i, locals_=2, rank=i), MASTER_PORT=port) for i in range(2)])
    assert out[0].split("\n")[:2] == ["all 0", "node 0"]
    assert out[1].strip() == "all 1"


@on_cpu
def test_init_dist_counts_nodes_by_world_size():
    port = str(free_port())
    out = finish([run_python(JOIN.format(local=0, locals_=1, rank=node), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                             WORLD_SIZE="2", RANK=str(node)) for node in range(2)])
    assert "node 0" in out[0] and "node 1" in out[1]


@pytest.mark.parametrize("name, value, allowed", [
    ("WORLD_SIZE", "0", "integers from 1. It counts nodes here"),
    ("WORLD_SIZE", "two", "integers from 1"),
    ("RANK", "1", "0..0. It is the index of the node here"),
    ("RANK", "-1", "0..0"),
    ("MASTER_PORT", "70000", "1..65535"),
])
def test_init_dist_names_a_bad_variable(monkeypatch, name, value, allowed):
    for variable in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"init_dist: {name} = '{value}', allowed: {allowed}"):
        envs.init_dist(0, 1)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("local_rank, num_local_ranks", [(1, 1), (-1, 2), (0, 0)])
def test_init_dist_refuses_bad_ranks(monkeypatch, local_rank, num_local_ranks):
    for variable in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=f"local_rank = {local_rank}, allowed"):
        envs.init_dist(local_rank, num_local_ranks)


def test_seeds_without_a_process_group(monkeypatch):
    monkeypatch.setattr(envs, "_global_seed", None)
    monkeypatch.setattr(envs, "_local_seed", None)
    for ask in (envs.get_global_seed, envs.get_local_seed):
        with pytest.raises(RuntimeError, match="no seed is set"):
            ask()
    envs.init_seed(11)
    first = torch.rand(4, dtype=torch.float32)
    envs.init_seed(11)
    assert torch.equal(first, torch.rand(4, dtype=torch.float32))
    assert envs.get_global_seed() == envs.get_local_seed() == 11


def test_dist_print_without_a_process_group(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    envs.dist_print("seen")
    envs.dist_print("not seen", once_in_node=True)
    envs.dist_print()
    assert capsys.readouterr().out == "seen\n\n"


def test_importing_changes_and_prints_nothing():
    code = """
        import os, sys, threading, torch
        before = dict(os.environ), torch.get_default_dtype(), threading.active_count()
        from deep_ep.utils import envs, math, testing
        assert before == (dict(os.environ), torch.get_default_dtype(), threading.active_count())
        assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
        assert not any(name.split(".")[0] == "matplotlib" for name in sys.modules)
    """
    process = run_python(code)
    out, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out, errors) == (0, "", "")


# ---- The machine


class Hosts:
    """A communicator in the manner of mpi4py, whose ranks lie on the given hosts."""

    def __init__(self, hosts):
        self.hosts = hosts

    def allgather(self, value):
        return self.hosts


@pytest.mark.parametrize("hosts, physical", [
    ("aabb", (2, 2)), ("abab", (2, 2)), ("aaaa", (1, 4)), ("abcd", (4, 1)), ("aaab", (4, 1)), ("a", (1, 1)),
])
def test_domain_sizes(hosts, physical):
    group = Hosts(list(hosts))
    assert envs.get_physical_domain_size(group) == physical
    assert envs.get_logical_domain_size(group) == physical
    assert envs.get_logical_domain_size(group, allow_hybrid_mode=False) == (1, len(hosts))


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    """Tables of two adapters: a slow one with a dead fast port, and a fast one."""
    for name, kind, ports in [("mlx5_0", "MT4129", [("4: ACTIVE", "200 Gb/sec (4X HDR)"), ("1: DOWN", "800 Gb/sec")]),
                              ("mlx5_1", "MT4123", [("4: ACTIVE", "400 Gb/sec (4X NDR)")])]:
        for number, (state, rate) in enumerate(ports, 1):
            port = tmp_path / name / "ports" / str(number)
            port.mkdir(parents=True)
            (port / "state").write_text(state + "\n")
            (port / "rate").write_text(rate + "\n")
        (tmp_path / name / "hca_type").write_text(kind + "\n")
    monkeypatch.setattr(envs, "_ADAPTERS", tmp_path)
    return tmp_path


def test_rdma_rate_is_that_of_the_fastest_active_port(adapters):
    assert envs.get_rdma_gbs() == 50
    assert envs.get_rdma_gbs("mlx5_0") == 25
    assert envs.get_rdma_gbs(nic_name="mlx5_7") == 0


@pytest.mark.parametrize("kind, fast", [("MT4123", False), ("MT4129", True), ("MT4131", True), ("MT41686", False),
                                        ("MT41692", True), ("", False), ("other", False)])
def test_fast_atomics_by_generation(adapters, kind, fast):
    (adapters / "mlx5_0" / "hca_type").write_text(kind + "\n")
    assert envs.check_fast_rdma_atomic_support("mlx5_0") is fast
    assert envs.check_fast_rdma_atomic_support() is False  # mlx5_1 is older


def test_unknown_machines_give_zero(monkeypatch):
    monkeypatch.setattr(envs, "_ADAPTERS", pathlib.Path("/nowhere/at/all"))
    assert envs.get_rdma_gbs() == 0
    assert envs.check_fast_rdma_atomic_support() is False


LINKS = """GPU 0: NVIDIA H100 (UUID: GPU-aaaa)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 (UUID: GPU-bbbb)
\t Link 0: 25 GB/s
\t Link 1: <inactive>
GPU 12: NVIDIA H100 (UUID: GPU-cccc)
"""


@pytest.mark.parametrize("uuid, gbs", [("aaaa", 53.124), ("bbbb", 25), ("cccc", 0), ("", 53.124), ("dddd", 53.124)])
def test_link_rates_of_one_gpu(uuid, gbs):
    assert envs._link_gbs(LINKS, uuid) == pytest.approx(gbs)
    assert envs._link_gbs("Unable to determine the device\n", uuid) == 0


def test_nvlink_rate_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert envs.get_nvlink_gbs() == 0 == envs.get_nvlink_gbs(factor=1.0)


def test_torch_deterministic_is_what_torch_says():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for wanted in (True, False):
            torch.use_deterministic_algorithms(wanted)
            assert envs.check_torch_deterministic() is wanted
    finally:
        torch.use_deterministic_algorithms(before)
