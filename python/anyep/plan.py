"""What a call would do, without a group: regions, memory, choices with their reasons, predicted time."""

from __future__ import annotations

from typing import Any

from . import _native
from .arrays import code_of
from .engine import WIRES
from .errors import argument_error


def plan(op: str, *, num_experts: int, top_k: int, hidden: int, max_tokens: int, num_ranks: int, dtype: str = "bfloat16",
         num_scales: int = 0, rows_bytes: int = 0, low_latency_bytes: int = 0, wire: str = "bf16", hook: bool = False) -> Any:
    """The plan of one call; ``str()`` of it is what ``anyep plan`` prints.

    Args:
        op: "route", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine" or "barrier".
        max_tokens: low latency: most tokens of a rank; high throughput: an estimate of a rank's tokens.

    Returns:
        local_experts, row_bytes, wire_bytes, predicted_us, memory (name, memory, offset, bytes, backed), choices (what,
        value, why).

    Raises:
        ArgumentError, UnsupportedError, CapacityError: the field, its value, what is allowed.
    """
    if op not in _native.OPS:
        raise argument_error("plan", "op", repr(op), ", ".join(_native.OPS))
    if wire not in WIRES:
        raise argument_error("plan", "wire", repr(wire), ", ".join(WIRES))
    return _native.plan(_native.OPS[op], num_experts, top_k, hidden, max_tokens, code_of(dtype), num_scales, rows_bytes,
                        low_latency_bytes, num_ranks, WIRES[wire], hook)


def low_latency_bytes(*, num_experts: int, top_k: int, hidden: int, max_tokens: int, num_ranks: int) -> int:
    """The ``low_latency_bytes`` of ``Engine.create`` that one shape needs."""
    return _native.low_latency_bytes_for(num_experts, top_k, hidden, max_tokens, num_ranks)
