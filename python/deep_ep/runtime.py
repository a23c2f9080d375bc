"""What ``Buffer.runtime`` is: the engine of the group and what V1's callers ask about it."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any, Dict, Optional

import torch
from anyep import Engine, PeerDeadError, PeerTimeoutError, Tuning, UnsupportedError

from .calls import Method

logger = logging.getLogger("anyep")

_CREATE = Method("Buffer", names={
    "budget.rows_bytes": "num_nvl_bytes", "budget.low_latency_bytes": "num_rdma_bytes", "budget.masks": "enable_shrink",
    "budget": "num_nvl_bytes and num_rdma_bytes"})
_DESTROY = Method("Buffer.destroy")
_VIEW = Method("Buffer.get_local_buffer_tensor")

# The engine cuts its rings from its budget and refuses rows that a ring cannot hold. V1's sizes know nothing of that, so it
# gets at least these; Buffer's attributes keep what the caller gave. All of it is address space until it is touched.
_LEAST_ROWS_BYTES = 8 << 20  # of each rank: a turn of a ring has 1/32 of it, 256 KiB: a row of 65536 float32
# V1's hint counts rows of experts, the engine rows of ranks, in pages and with the choices of every token: at hidden 128, top-32
# and 4096 tokens a rank it needs 27 MiB for each rank more than the hint.
_MORE_LOW_LATENCY_BYTES = 32 << 20
_MAX_EXPERTS = 4096  # sizes a table of counts, 16 bytes for each
_INT64_MAX = 2**63 - 1


def _tuning() -> Tuning:
    """V1's limit of 100 s, where the environment names no other."""
    tuning = Tuning.from_environment()
    if "ANYEP_TIMEOUT_S" not in os.environ:
        tuning.timeout_s = 100.0
    return tuning


def _device() -> int:
    """The GPU that is current, where there is one; else CPU ranks. ANYEP_BACKEND overrides."""
    if os.environ.get("ANYEP_BACKEND", "auto") == "cpu" or not torch.cuda.is_available():
        return -1  # "cuda" without a GPU is refused by Engine.create
    return torch.cuda.current_device()


class Runtime:
    """The engine behind one Buffer."""

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int, low_latency_mode: bool, masks: bool) -> None:
        from anyep import as_bootstrap

        self.engine: Optional[Engine] = None
        self.entered = threading.Lock()  # by the thread that is inside a method
        self.calls: Dict[Any, Any] = {}  # of Method.call
        self._num_bytes = (num_nvl_bytes, num_rdma_bytes)
        self._viewed = False
        bootstrap = as_bootstrap(group)
        rows, low_latency = (min(given, _INT64_MAX) for given in self._num_bytes)  # too much is refused on every rank alike
        if 0 <= rows < _LEAST_ROWS_BYTES * bootstrap.num_ranks:
            rows = _LEAST_ROWS_BYTES * bootstrap.num_ranks
        if low_latency_mode and 0 <= low_latency < 2**62:
            low_latency += _MORE_LOW_LATENCY_BYTES * bootstrap.num_ranks
        with _CREATE.call():
            tuning = _tuning()
            self.checked = tuning.checked
            self.engine = Engine.create(bootstrap, rows_bytes=rows, low_latency_bytes=low_latency, max_experts=_MAX_EXPERTS,
                                         masks=masks, tuning=tuning, device=_device())
        self.gpu = self.engine._gpu
        self._comm_stream: Optional[torch.cuda.Stream] = None
        self.rank, self.num_ranks, self._num_nodes = self.engine.rank, self.engine.num_ranks, self.engine.num_nodes

    def is_available(self) -> bool:
        """Until ``destroy``."""
        return self.engine is not None

    def get_num_rdma_ranks(self) -> int:
        """Nodes of the group."""
        return self._num_nodes

    def get_rdma_rank(self) -> int:
        """The node of this rank."""
        return 0

    def get_root_rdma_rank(self, global_: bool) -> int:
        """V1's root of the ranks that share this rank's place in their nodes; on one node it is the rank itself."""
        return self.rank if global_ else 0

    def get_local_device_id(self) -> int:
        """The GPU's number; -1, as torch says of CPU tensors, on CPU ranks."""
        return -1 if self.gpu is None else self.gpu.device

    def get_comm_stream(self) -> torch.cuda.Stream:
        """Of high priority, the same object for the life of the Buffer."""
        if self._comm_stream is not None:
            return self._comm_stream
        if self.gpu is not None:
            self._comm_stream = torch.cuda.Stream(self.gpu.device, priority=-1)
            return self._comm_stream
        raise UnsupportedError("Buffer.get_comm_stream: CPU ranks have a queue and no CUDA stream. Use events.",
                               op="get_comm_stream")

    def get_local_buffer_tensor(self, dtype: torch.dtype, offset: int = 0, use_rdma_buffer: bool = False) -> torch.Tensor:
        """1-D view of the payload memory from byte ``offset`` on."""
        have = self._num_bytes[1 if use_rdma_buffer else 0]
        if self.engine is None:
            raise _VIEW.not_now("the Buffer is destroyed")
        with _VIEW.call(self) as engine:
            if not 0 <= offset <= have or offset % dtype.itemsize != 0:
                raise _VIEW.refuse("offset", offset, f"0..{have} bytes, a multiple of the element's {dtype.itemsize}")
            num_bytes = (have - offset) // dtype.itemsize * dtype.itemsize
            if num_bytes == 0:
                return torch.empty(0, dtype=dtype, device="cpu" if self.gpu is None else self.gpu.torch_device)
            memory = engine.memory("low_latency" if use_rdma_buffer else "high_throughput", offset, num_bytes)
        if not use_rdma_buffer:
            self._viewed = True
        return torch.frombuffer(memory, dtype=dtype) if self.gpu is None else memory.view(dtype)

    def rows_in_window(self) -> bool:
        """May results lie in the payload memory? Not once the caller has a view of it, and may zero what lies there."""
        return not self._viewed

    def destroy(self) -> None:
        """Waits for the peers at most the close limit; one that does not come is logged: everything local is released."""
        engine, self.engine = self.engine, None
        self.calls.clear()
        if engine is None:
            return
        with _DESTROY.call():
            try:
                engine.close()
            except (PeerTimeoutError, PeerDeadError) as error:
                logger.warning("Buffer.destroy: %s", error)

    def forget(self) -> bool:
        """Local: for the destructor. Was there an engine?"""
        engine, self.engine = self.engine, None
        self.calls.clear()
        if engine is None:
            return False
        engine.__dict__.pop("_native", None)  # now, though hooks that nobody called may still know the engine
        engine._gpu = None  # which knows it too
        engine._sends.clear()
        engine._shown.clear()
        return True
