"""The low-latency methods in V1's terms."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Optional, Tuple

import torch
from anyep import LowLatency, Slabs, StateError
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


#: Where operations of CPU ranks run: with no stream of their own.
HERE = contextlib.nullcontext()


def finish(method: Method, place: Optional[Place], sent: LowLatency, async_finish: bool, return_recv_hook: bool,
           inputs: Tuple[Any, ...], outputs: Tuple[Any, ...]) -> Tuple[EventOverlap, Optional[Callable[[], None]]]:
    if return_recv_hook:
        return EventOverlap(None), _hook(_RECEIVE[method is DISPATCH], sent)
    if place is not None:
        return place.finish(method, sent.event, inputs, outputs), None
    if async_finish and sent.event is not None:
        return EventOverlap(EventHandle._of(sent.event, method)), None
    return EventOverlap(None), None


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


def combine(engine: Any, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, use_logfmt: bool, zero_copy: bool,
            wait: bool, hook: bool, out: Optional[Tensor], waited: Optional[Tensor]) -> LowLatency:
    known = low_latency_handle(COMBINE, handle)
    slabs = Slabs(None, None, None, known.source, known.range)
    return engine.low_latency_combine(x, topk_idx, topk_weights, slabs, known.num_experts, known.max_tokens,
                                      wire="logfmt" if use_logfmt else "bf16", zero_copy=zero_copy, hook=hook, out=out,
                                      waited=waited, wait=wait)


def combine_buffer(engine: Any, handle: Any) -> Tensor:
    known = low_latency_handle(COMBINE_BUFFER, handle)
    return engine.combine_buffer(known.num_experts, known.hidden, known.max_tokens, like=known.source)


def query_masks(engine: Any, mask_status: Tensor) -> None:
    engine._native.masks(view("masks", "mask_status", mask_status, engine.device), engine._stream())
