"""Start-up of distributed programs and what they ask about their machine: `from deep_ep.utils.envs import init_dist`.

Importing reads nothing and starts nothing. What cannot be found out is 0 or False, never an exception. `init_dist`
makes bfloat16 the default dtype and the GPU, where there is one, the default device of the program.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import subprocess
import sys
from typing import Any, List, Optional, Tuple

import torch
import torch.distributed as dist

__all__ = [
    "check_fast_rdma_atomic_support",
    "check_torch_deterministic",
    "dist_print",
    "get_global_seed",
    "get_local_seed",
    "get_logical_domain_size",
    "get_nvlink_gbs",
    "get_physical_domain_size",
    "get_rdma_gbs",
    "init_dist",
    "init_seed",
]

_ADAPTERS = pathlib.Path("/sys/class/infiniband")
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
_QUERY_LIMIT_S = 10  # nvidia-smi answers in about a second, or the driver is stuck
# The least hca_type of each family that counts: MT4129 is ConnectX-7, MT41692 is BlueField-3.
_CONNECTX_7, _BLUEFIELD_3, _FIRST_BLUEFIELD = 4129, 41692, 41682

_global_seed: Optional[int] = None
_local_seed: Optional[int] = None
_local_rank: Optional[int] = None


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> Tuple[int, int, dist.ProcessGroup]:
    """Joins the process group of a program with `num_local_ranks` processes on every node. Collective.

    Read from the environment: MASTER_ADDR (127.0.0.1), MASTER_PORT (8361), WORLD_SIZE, the number of nodes (1), and
    RANK, the index of this node (0). Note that torchrun means processes by the last two.

    The backend is NCCL, or gloo where there is no GPU. Afterwards bfloat16 is the default dtype, the GPU local_rank
    the current and "cuda" the default device, and random numbers are seeded by `init_seed`.

    Args:
        local_rank: 0..num_local_ranks-1, this process on its node.
        num_local_ranks: processes on each node, the same on all.
        seed: the global seed; rank r draws from seed + r.

    Returns:
        (rank, number of ranks, a new group over all of them).

    Raises:
        ValueError: arguments or variables out of range. RuntimeError: whatever torch.distributed raises.
    """
    global _local_rank
    num_nodes = _integer_variable("WORLD_SIZE", 1, low=1)
    node = _integer_variable("RANK", 0, low=0, high=num_nodes - 1)
    port = _integer_variable("MASTER_PORT", 8361, low=1, high=65535)
    host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    if num_local_ranks < 1 or not 0 <= local_rank < num_local_ranks:
        raise ValueError(
            f"init_dist: local_rank = {local_rank}, allowed: 0..num_local_ranks-1 with num_local_ranks = "
            f"{num_local_ranks}. Pass the index of the process on its node."
        )
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus <= local_rank:
        raise ValueError(
            f"init_dist: local_rank = {local_rank}, allowed: 0..{num_gpus - 1} (visible GPUs). "
            "Start fewer processes, or hide all GPUs to run on the CPU."
        )
    if num_gpus:
        torch.cuda.set_device(local_rank)
    address = f"[{host}]" if ":" in host else host  # an IPv6 address
    dist.init_process_group(
        "nccl" if num_gpus else "gloo",
        init_method=f"tcp://{address}:{port}",
        world_size=num_nodes * num_local_ranks,
        rank=node * num_local_ranks + local_rank,
    )
    _local_rank = local_rank
    torch.set_default_dtype(torch.bfloat16)
    if num_gpus:
        torch.set_default_device("cuda")
    # Without a GPU the default stays: once a default device is set, even "cpu", every torch call takes a detour.
    init_seed(seed)
    return dist.get_rank(), dist.get_world_size(), dist.new_group(list(range(dist.get_world_size())))


def _integer_variable(name: str, default: int, low: int, high: Optional[int] = None) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
    if value is None or value < low or (high is not None and value > high):
        allowed = f"{low}..{high}" if high is not None else f"integers from {low}"
        meaning = {"WORLD_SIZE": " It counts nodes here.", "RANK": " It is the index of the node here."}.get(name, "")
        raise ValueError(f"init_dist: {name} = {text!r}, allowed: {allowed}.{meaning} Set or unset it.")
    return value


def init_seed(global_seed: int) -> None:
    """Seeds torch on all devices, Python's random and, if loaded, numpy with global_seed + rank.

    The rank is that in the default process group, 0 without one.

    Args:
        global_seed: equal on all ranks, 0 or more.
    """
    global _global_seed, _local_seed
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    local_seed = global_seed + rank
    torch.manual_seed(local_seed)
    random.seed(local_seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(local_seed % 2**32)
    _global_seed, _local_seed = global_seed, local_seed


def get_global_seed() -> int:
    """The seed that all ranks share. RuntimeError before `init_seed` or `init_dist`."""
    if _global_seed is None:
        raise RuntimeError("get_global_seed: no seed is set. Call init_dist or init_seed first.")
    return _global_seed


def get_local_seed() -> int:
    """The seed of this rank: the global one + rank. RuntimeError before `init_seed` or `init_dist`."""
    if _local_seed is None:
        raise RuntimeError("get_local_seed: no seed is set. Call init_dist or init_seed first.")
    return _local_seed


def dist_print(s: Any = "", once_in_node: bool = False) -> None:
    """Prints s, then waits for all ranks of the default group, so that what follows comes after it. Collective.

    Args:
        s: what to print; str() of it.
        once_in_node: only the first rank of every node prints; all wait.
    """
    if not once_in_node or _index_in_node() == 0:
        print(s, flush=True)
    if dist.is_available() and dist.is_initialized():
        on_gpu = dist.get_backend() == "nccl"
        # Without device_ids NCCL guesses a GPU from the rank and warns.
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


def _index_in_node() -> int:
    if _local_rank is not None:
        return _local_rank
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if text.isdigit() else 0


def get_nvlink_gbs(factor: float = 0.9) -> float:
    """What NVLink carries from the current GPU in one direction, in GB/s (1e9 bytes): factor times the signalling rate
    of its active links, as nvidia-smi reports them.

    Args:
        factor: which part of the signalling rate arrives as payload.

    Returns:
        GB/s; 0 without a GPU, without NVLink, or if nvidia-smi does not answer.
    """
    if not torch.cuda.is_available():
        return 0.0
    try:
        answer = subprocess.run(
            ["nvidia-smi", "nvlink", "-s"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_QUERY_LIMIT_S, check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0.0
    uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", ""))
    return factor * _link_gbs(answer, uuid)


def _link_gbs(answer: str, uuid: str) -> float:
    """Sum of the link rates of one GPU in the text of `nvidia-smi nvlink -s`: that with the uuid, else the first."""
    sections = re.split(r"^(?=GPU \d+:)", answer, flags=re.MULTILINE)
    sections = [section for section in sections if section.startswith("GPU ")]
    mine = [section for section in sections if uuid and uuid in section] or sections
    rates = re.findall(r"Link \d+:\s*([0-9.]+)\s*GB/s", mine[0]) if mine else []
    return sum(float(rate) for rate in rates)


def get_rdma_gbs(nic_name: Optional[str] = None) -> float:
    """The line rate of an RDMA adapter in one direction, in GB/s (1e9 bytes), from the kernel's tables.

    Args:
        nic_name: such as "mlx5_0"; None takes the adapter with the highest rate.

    Returns:
        GB/s of its fastest active port; 0 if there is no such adapter or no active port.
    """
    return max((_port_gbs(port) for nic in _adapters(nic_name) for port in _entries(nic / "ports")), default=0.0)


def _port_gbs(port: pathlib.Path) -> float:
    if "ACTIVE" not in _text(port / "state"):  # such as "4: ACTIVE"
        return 0.0
    match = re.match(r"([0-9.]+) Gb/sec", _text(port / "rate"))  # such as "400 Gb/sec (4X NDR)"
    return float(match.group(1)) / 8 if match else 0.0


def check_fast_rdma_atomic_support(nic_name: Optional[str] = None) -> bool:
    """Whether an RDMA adapter is of a generation whose remote atomics count as fast: ConnectX-7 and later. This goes by
    the type that the kernel reports and measures nothing.

    Args:
        nic_name: such as "mlx5_0"; None asks that there is an adapter and that all are.

    Returns:
        False also if the adapter is not there or its type is not known.
    """
    types = [re.match(r"MT([0-9]{4,})", _text(nic / "hca_type")) for nic in _adapters(nic_name)]
    return bool(types) and all(kind is not None and _counts_as_fast(int(kind.group(1))) for kind in types)


def _counts_as_fast(hca_type: int) -> bool:
    return hca_type >= (_BLUEFIELD_3 if hca_type >= _FIRST_BLUEFIELD else _CONNECTX_7)


def _adapters(nic_name: Optional[str]) -> List[pathlib.Path]:
    nics = _entries(_ADAPTERS)
    return nics if nic_name is None else [nic for nic in nics if nic.name == nic_name]


def _entries(folder: pathlib.Path) -> List[pathlib.Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def get_physical_domain_size(group: Any) -> Tuple[int, int]:
    """How the ranks of a group lie on machines. Collective over the group.

    Args:
        group: a torch.distributed group, or a communicator of mpi4py.

    Returns:
        (nodes, ranks per node), whose product is the number of ranks. Nodes that differ in their number of ranks make
        no grid; the answer is then (number of ranks, 1).
    """
    hosts = _gather(_host_identity(), group)
    counts = {hosts.count(host) for host in hosts}
    per_node = counts.pop() if len(counts) == 1 else 1
    return len(hosts) // per_node, per_node


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> Tuple[int, int]:
    """The grid of ranks that communication is arranged by. Collective over the group.

    Args:
        group: a torch.distributed group, or a communicator of mpi4py.
        allow_hybrid_mode: True: rows may travel by the node of their destination, so the grid is the physical one.
            False: every rank speaks to every other directly, as if all were on one node.

    Returns:
        (nodes, ranks per node), whose product is the number of ranks.
    """
    nodes, per_node = get_physical_domain_size(group)
    return (nodes, per_node) if allow_hybrid_mode else (1, nodes * per_node)


def _host_identity() -> str:
    """Equal for processes of one kernel, whatever their container calls the host."""
    return _text(_BOOT_ID) or os.uname().nodename


def _gather(value: str, group: Any) -> List[str]:
    if hasattr(group, "allgather") and not isinstance(group, dist.ProcessGroup):
        return list(group.allgather(value))
    values: List[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def check_torch_deterministic() -> bool:
    """Whether torch is told to use deterministic algorithms only (`torch.use_deterministic_algorithms`)."""
    return torch.are_deterministic_algorithms_enabled()
