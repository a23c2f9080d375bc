"""The low-latency methods in V1's terms."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

import torch
from anyep import LowLatency, StateError
from anyep.arrays import view

from .calls import Method
from .events import EventHandle, EventOverlap
from .handles import low_latency_handle
from .streams import Place

Tensor = torch.Tensor

_NAMES = {
    "routing.experts": "topk_idx", "experts": "topk_idx", "routing.weights": "topk_weights", "weights": "topk_weights",
    "shape.num_experts": "num_experts", "shape.max_tokens": "num_max_dispatch_tokens_per_rank",
    "shape.top_k": "topk_idx.shape[1]", "options.received": "cumulative_local_expert_recv_stats",
    "options.zero_copy": "zero_copy", "budget.low_latency_bytes": "num_rdma_bytes",
    "low_latency_bytes_for": "anyep.low_latency_bytes", "Wire::kLogFMT": "use_logfmt=True", "kLogFMT": "use_logfmt=True"}
DISPATCH = Method("Buffer.low_latency_dispatch", op="low_latency_dispatch", names={
    **_NAMES, "shape.hidden": "x.shape[1] (hidden)", "options.waited": "dispatch_wait_recv_cost_stats",
    "received": "cumulative_local_expert_recv_stats", "waited": "dispatch_wait_recv_cost_stats"})
COMBINE = Method("Buffer.low_latency_combine", op="low_latency_combine", names={
    **_NAMES, "in.x": "x", "in.source": "handle[0]", "in.range": "handle[1]", "slabs.source": "handle[0]",
    "slabs.range": "handle[1]", "shape.hidden": "x.shape[2] (hidden)", "options.waited": "combine_wait_recv_cost_stats",
    "waited": "combine_wait_recv_cost_stats", "combine_buffer()": "get_next_low_latency_combine_buffer()"})
COMBINE_BUFFER = Method("Buffer.get_next_low_latency_combine_buffer", names={
    "shape.num_experts": "handle[4] (experts)", "shape.hidden": "handle[3] (hidden)", "shape.max_tokens": "handle[2]"})
_RECEIVE = {True: Method("Buffer.low_latency_dispatch hook"), False: Method("Buffer.low_latency_combine hook")}


def check_finish(method: Method, async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise method.refuse("async_finish", True, "False with return_recv_hook")


def wire_of(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> str:
    if not use_fp8:
        return "bf16"
    if not use_ue8m0:
        return "fp8"
    if not round_scale:
        raise DISPATCH.refuse("use_ue8m0", True, "False without round_scale=True")
    return "ue8m0"


def run(method: Method, runtime: Any, send: Callable[..., Any], arguments: Tuple[Any, ...], inputs: Tuple[Any, ...],
        async_finish: bool, return_recv_hook: bool) -> Tuple[Any, EventOverlap, Optional[Callable[[], None]]]:
    """``send``: _low_latency_dispatch or _low_latency_combine of the engine. Its outputs, the event and the hook."""
    engine = runtime.engine
    if not async_finish:
        result, done, stream = send(*arguments)
        if not return_recv_hook:
            return result, EventOverlap(None), None
        sent = LowLatency(engine, result, done, (inputs, result), True, False, stream)
        return result, EventOverlap(None), _hook(_RECEIVE[method is DISPATCH], sent)
    if engine.device < 0:
        result, event, _ = send(*arguments)
        engine._hold(event, (inputs, result))
        return result, EventOverlap(EventHandle._of(event, method)), None
    place = Place(runtime, None, True, False)
    with place:
        result, event, _ = send(*arguments)
    outputs = (result,) if isinstance(result, Tensor) else result
    return result, place.finish(method, event, inputs, outputs), None


def _hook(method: Method, sent: LowLatency) -> Callable[[], None]:
    open_sends = [sent]

    def hook() -> None:
        """Receives; does nothing when called again. StateError: an earlier hook is open; then it may be called later."""
        if not open_sends:
            return
        with method.call():
            try:
                open_sends[0].receive()
            except StateError:
                raise
            except BaseException:
                open_sends.clear()
                raise
            open_sends.clear()

    return hook


def keep_rows(engine: Any, source: Tensor, layout_range: Tensor, rows: Optional[Tensor]) -> None:
    """V1's handle has no place for the table of rows: the engine keeps it for the two tensors, as long as the first one lives."""
    if rows is not None:
        engine._shown.add((rows, rows.shape), (source, layout_range))


def rows_of(engine: Any, source: Any, layout_range: Any, max_tokens: int, topk_idx: Any) -> Optional[Tensor]:
    """The table of the dispatch that made these tensors; None where they are copies or were changed: combine finds the rows by
    itself."""
    kept = engine._shown.find((source, layout_range))
    if kept is None:
        return None
    rows, (_, most, top_k) = kept
    return rows if most == max_tokens and top_k == topk_idx.shape[-1] else None


def combine_buffer(engine: Any, handle: Any) -> Tensor:
    source, _, max_tokens, hidden, num_experts = low_latency_handle(COMBINE_BUFFER, handle)
    return engine.combine_buffer(num_experts, hidden, max_tokens, like=source)


def query_masks(engine: Any, mask_status: Tensor) -> None:
    engine._native.masks(view("masks", "mask_status", mask_status, engine.device), engine._stream())
