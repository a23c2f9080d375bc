"""What calls take and give: rows of high throughput, slabs of low latency."""

from __future__ import annotations

from typing import Any, NamedTuple, Tuple

from . import _native

Event = _native.Event


class Rows(NamedTuple):
    """Rows of one rank; what is not needed stays None."""

    x: Any  #: [n, hidden]
    scales: Any = None  #: [n, num_scales] float32 or int32
    experts: Any = None  #: [n, top_k]; received: local ids, -1 = hosted elsewhere
    weights: Any = None  #: [n, top_k] float32; received: 0 where experts is -1
    extra: Tuple[Any, ...] = ()  #: [n, any] each: opaque bytes that travel with the row


class Dispatched(NamedTuple):
    rows: Rows
    event: Event


class Combined(NamedTuple):
    x: Any  #: [num_tokens, hidden]
    weights: Any  #: [num_tokens, any] float32, or None
    event: Event


class Slabs(NamedTuple):
    """The packed per-expert form of low latency."""

    x: Any  #: [L, S, hidden] bfloat16 or float8_e4m3fn
    scales: Any  #: fp8: [L, S, ceil(hidden/128)] float32; ue8m0: [L, S, ceil(hidden/512)] int32; token fastest; else None
    counts: Any  #: [L] int32: valid leading rows of each expert; all other rows are garbage
    source: Any  #: [L, S] int32: the row's token on its source rank
    range: Any  #: [L, R] int64: (begin << 32) | count of each source's rows
    #: On GPUs, optional: [R, max_tokens, top_k] int32, where each choice lies: (local expert << 16) | row, -1 = not here. With it
    #: combine is one kernel shorter.
    rows: Any = None


def ordinary_rows(library: Any, num_rows: int, hidden: int, dtype: str, num_scales: int, scales_dtype: str) -> Rows:
    return Rows(library.empty((num_rows, hidden), dtype),
                library.empty((num_rows, num_scales), scales_dtype) if num_scales else None)
