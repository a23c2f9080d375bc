"""Dispatch and combine in V1's terms: views of the caller's tensors, outputs, handles."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import torch
from anyep import Event, _native
from anyep.arrays import torch_library, view

from .calls import Method
from .config import Config
from .events import EventHandle, EventOverlap, Previous, events_before
from .handles import HANDLE_NAMES, handle_of, make_handle

Tensor = torch.Tensor
_View = _native.View
_UINT8 = _native.DTYPES["uint8"][0]
_TORCH = torch_library()

DISPATCH = Method("Buffer.dispatch", op="route", names={
    **HANDLE_NAMES, "routing.experts": "topk_idx", "routing.weights": "topk_weights", "routing.ranks": "is_token_in_rank",
    "routing.pairs_per_expert": "num_tokens_per_expert", "shape.num_experts": "num_tokens_per_expert.shape[0] (experts)",
    "shape.top_k": "topk_idx.shape[1]", "top_k": "topk_idx.shape[1]", "shape.hidden": "x.shape[1] (hidden)",
    "x.x": "x", "x.scales": "scales",
    "x.experts": "topk_idx", "x.weights": "topk_weights", "experts": "topk_idx", "weights": "topk_weights",
    "ranks": "is_token_in_rank", "pairs_per_expert": "num_tokens_per_expert", "out.x": "recv_x",
    "rows_bytes": "num_nvl_bytes", "budget.rows_bytes": "num_nvl_bytes", "options.num_sms": "config.num_sms",
    "aligned_pairs_per_expert": "num_recv_tokens_per_expert_list", "alignment": "expert_alignment"})
COMBINE = Method("Buffer.combine", op="combine", names={
    **HANDLE_NAMES, "in.x": "x", "in.weights": "topk_weights", "weights": "topk_weights", "in.bias[0]": "bias[0]",
    "in.bias[1]": "bias[1]", "out.x": "combined_x", "rows_bytes": "num_nvl_bytes", "budget.rows_bytes": "num_nvl_bytes",
    "options.num_sms": "config.num_sms"})

# The engine knows these as elements; whatever else travels as the bytes that it is.
_ELEMENTS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8))


def num_sms_of(method: Method, config: Optional[Config], default: int) -> int:
    if config is None:
        return default
    if config.num_sms < 1:
        raise method.refuse("config.num_sms", config.num_sms, "1 or more")
    return config.num_sms


def check_events(method: Method, previous_event: Previous, async_finish: bool, on_comm_stream: bool) -> List[Event]:
    before = None if previous_event is None else events_before(previous_event)
    if on_comm_stream and (before is None or not async_finish):
        raise method.refuse("allocate_on_comm_stream", True, "only with a previous_event that has an event and with async_finish")
    return before or []


def _finished(method: Method, event: Event, async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle._of(event, method) if async_finish else None)


def unpack_bias(bias: Any) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    if bias is None or isinstance(bias, Tensor):
        return bias, None
    if isinstance(bias, (tuple, list)) and len(bias) == 2:
        return bias[0], bias[1]
    got = f"{type(bias).__name__} of {len(bias)}" if isinstance(bias, (tuple, list)) else type(bias).__name__
    raise COMBINE.refuse("bias", got, "None, a tensor, or two of them in a tuple or list")


def _bytes_of(x: Tensor) -> Any:
    """Rows of an element type that the engine does not know, or shall not look at."""
    if x.dtype in _ELEMENTS:
        return _View(x.data_ptr(), _UINT8, x.shape, x.stride())
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise DISPATCH.refuse("x", f"shape {list(x.shape)} with strides {list(x.stride())}", "2 dimensions, rows without gaps")
    size = x.element_size()
    return _View(x.data_ptr(), _UINT8, (x.shape[0], x.shape[1] * size), (x.stride(0) * size, 1))


def must_be_tensor(op: str, name: str, array: Any, device: int = -1) -> None:
    """Before Python itself looks at it. What else may be wrong with a tensor the extension says."""
    if not isinstance(array, Tensor):
        view(op, name, array, device)
        raise TypeError(f"{name} must be a tensor, got {type(array).__name__}")


class Payload:
    """x and its scales, x as the engine sees it, and outputs of the same kind."""

    __slots__ = ("x", "scales", "x_view", "as_bytes")

    def __init__(self, x: Any, device: int = -1) -> None:
        scales = None
        if isinstance(x, (tuple, list)):
            if len(x) != 2:
                raise DISPATCH.refuse("x", f"{type(x).__name__} of {len(x)}", "a tensor, or (data, scales)")
            x, scales = x
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor or (data, scales), got {type(x).__name__}")
        if scales is not None:
            must_be_tensor("dispatch", "scales", scales, device)
        self.x = x
        self.scales = scales
        # V1 moves rows without looking at them: of FP8 rows without scales the engine would miss those.
        self.as_bytes = x.dtype not in _ELEMENTS or (scales is None and x.dtype == torch.float8_e4m3fn)
        elsewhere = x.get_device() != device or (device < 0 and not x.is_cpu)
        if elsewhere or x.layout is not torch.strided or not 0 < x.dim() <= 4:
            view("dispatch", "x", x, device)  # says what is wrong
        self.x_view = _bytes_of(x) if self.as_bytes else x

    def outputs(self, engine: Any, num_rows: int, in_window: bool) -> Tuple[Tensor, Any, Optional[Tensor]]:
        """Rows in the window where there is room, as the engine makes them; what it does not know as elements, elsewhere. The
        second is the first as the engine sees it."""
        x, scales = self.x, self.scales
        hidden = x.shape[-1]
        out_scales = None
        if engine._gpu is not None:
            parts = self._parts(num_rows)
            made = engine._gpu.rows(*parts) if in_window else [engine._gpu.new(*part) for part in parts]
            out = made[0]
            if scales is not None:
                out_scales = made[1]
        elif in_window and self._engine_makes():
            names = _TORCH.name_of
            out, out_scales, *_ = engine._rows(_TORCH, num_rows, hidden, names[x.dtype],
                                               0 if scales is None else scales.shape[1],
                                               "" if scales is None else names[scales.dtype])
        else:
            out = _TORCH.new((num_rows, hidden), x.dtype)
        if scales is not None and out_scales is None:
            out_scales = _TORCH.new((num_rows, *scales.shape[1:]), scales.dtype)
        return out, self.seen(out), out_scales

    def outputs_ahead(self, engine: Any, num_rows: int) -> Optional[Tuple[List[Tensor], Optional[List[Tensor]]]]:
        """On GPUs: rows and scales for a guess of the number of rows, in free room of the window, as ``Gpu.cut`` takes them: in
        lists that alone hold them. None: there is no such room."""
        made = engine._gpu.rows_ahead(*self._parts(num_rows))
        return None if None in made else (made[0], None if self.scales is None else made[1])

    def seen(self, out: Tensor) -> Any:
        """Such rows as the engine sees them."""
        return _bytes_of(out) if self.as_bytes else out

    def _parts(self, num_rows: int) -> Tuple[Tuple[Tuple[int, ...], Any], ...]:
        """Shapes and element types of outputs."""
        x, scales = self.x, self.scales
        rows = (num_rows, x.shape[-1]), x.dtype
        return (rows,) if scales is None else (rows, ((num_rows, *scales.shape[1:]), scales.dtype))

    def _engine_makes(self) -> bool:
        x, scales = self.x, self.scales
        if x.dtype not in _ELEMENTS or x.dim() != 2:
            return False
        return scales is None or (scales.dim() == 2 and scales.element_size() == 4)


def must_be_cached(topk_idx: Any, topk_weights: Any) -> None:
    if topk_idx is not None or topk_weights is not None:
        raise DISPATCH.refuse("topk_idx" if topk_idx is not None else "topk_weights", "a tensor", "None with a handle")


class Send:
    """One dispatch on CPU ranks."""

    __slots__ = ("engine", "num_sms", "after", "async_finish", "in_window", "checked")

    def __init__(self, engine: Any, num_sms: int, after: List[Event], async_finish: bool, runtime: Any) -> None:
        self.engine = engine
        self.num_sms = num_sms
        self.after = after
        self.async_finish = async_finish
        self.in_window = runtime.rows_in_window()
        self.checked = runtime.checked

    def cached(self, x: Any, handle: Any, topk_idx: Any, topk_weights: Any) -> Tuple[Any, None, None, None, None, EventOverlap]:
        must_be_cached(topk_idx, topk_weights)
        engine = self.engine
        native, num_rows = handle_of(DISPATCH, engine, handle)
        payload = Payload(x)
        out, out_view, out_scales = payload.outputs(engine, num_rows, self.in_window)
        event = engine._native.dispatch(native, payload.x_view, payload.scales, None, None, (), out_view, out_scales, None,
                                        None, (), 0, 0.0, self.num_sms, self.after, not self.async_finish)
        if self.async_finish:
            engine._hold(event, (x, out, out_scales, native))
        received = out if out_scales is None else (out, out_scales)
        return received, None, None, None, None, _finished(DISPATCH, event, self.async_finish)

    def routed(self, x: Any, layout: Tuple[Any, Any, Any], topk_idx: Optional[Tensor], topk_weights: Optional[Tensor],
               alignment: int, num_worst_tokens: int) -> Tuple[Any, ...]:
        engine = self.engine
        token_in_rank, pairs = check_layout(engine, layout, topk_idx, topk_weights, alignment, num_worst_tokens, self.checked)
        payload = Payload(x)
        top_k = 1 if topk_idx is None else topk_idx.shape[-1]
        # The host waits for the counts also with num_worst_tokens: the handle's tensors hold them, and have no event.
        native = engine._native.route(pairs.shape[0], top_k, topk_idx, token_in_rank, pairs, 0, 0.0, self.after, True)
        num_rows = num_worst_tokens or native.num_rows()
        out, out_view, out_scales = payload.outputs(engine, num_rows, self.in_window)
        out_ids = out_weights = None
        if topk_idx is not None and topk_weights is not None:
            out_ids = _TORCH.new((num_rows, top_k), topk_idx.dtype)
            out_weights = _TORCH.new((num_rows, top_k), topk_weights.dtype)
        event = engine._native.dispatch(native, payload.x_view, payload.scales, topk_idx, topk_weights, (), out_view,
                                        out_scales, out_ids, out_weights, (), 0, 0.0, self.num_sms, [], not self.async_finish)
        if self.async_finish:
            engine._hold(event, (x, topk_idx, topk_weights, out, out_scales, out_ids, out_weights, native))
        counts = [] if num_worst_tokens else native.pairs_per_expert(alignment)
        handle = make_handle(engine, native, num_rows, token_in_rank)
        received = out if out_scales is None else (out, out_scales)
        return received, out_ids, out_weights, counts, handle, _finished(DISPATCH, event, self.async_finish)


def check_layout(engine: Any, layout: Tuple[Any, Any, Any], topk_idx: Any, topk_weights: Any, alignment: int,
                 num_worst_tokens: int, checked: bool = False) -> Tuple[Tensor, Tensor]:
    """What only V1 asks for, and what the views below would not say in its words."""
    counts, token_in_rank, pairs = layout
    for name, tensor in (("num_tokens_per_rank", counts), ("is_token_in_rank", token_in_rank),
                         ("num_tokens_per_expert", pairs)):
        if tensor is None:
            raise DISPATCH.refuse(name, None, "a tensor of get_dispatch_layout, or a handle")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    num_ranks = engine.num_ranks
    if counts.get_device() != engine.device:
        view("dispatch", "num_tokens_per_rank", counts, engine.device)  # says what is wrong
    if counts.dtype != torch.int32 or counts.shape != (num_ranks,):
        raise DISPATCH.refuse("num_tokens_per_rank", f"{counts.dtype} {list(counts.shape)}", f"torch.int32 [{num_ranks}]")
    if checked and token_in_rank.dim() == 2 and token_in_rank.shape[1] == num_ranks:
        for rank, (given, count) in enumerate(zip(counts.tolist(), token_in_rank.sum(0).tolist())):
            if given != count:
                raise DISPATCH.refuse(f"num_tokens_per_rank[{rank}]", given, f"{count}, as is_token_in_rank says")
    if pairs.dim() != 1:
        raise DISPATCH.refuse("num_tokens_per_expert.shape", list(pairs.shape), "[number of experts]")
    if (topk_idx is None) != (topk_weights is None):
        missing = "topk_idx" if topk_idx is None else "topk_weights"
        raise DISPATCH.refuse(missing, None, "both topk_idx and topk_weights, or neither")
    if topk_idx is not None:
        must_be_tensor("dispatch", "topk_idx", topk_idx, engine.device)
        must_be_tensor("dispatch", "topk_weights", topk_weights, engine.device)
    if alignment < 1:
        raise DISPATCH.refuse("expert_alignment", alignment, "1 or more")
    if num_worst_tokens < 0:
        raise DISPATCH.refuse("num_worst_tokens", num_worst_tokens, "0 or more")
    if num_worst_tokens > 0 and topk_idx is None:
        raise DISPATCH.refuse("num_worst_tokens", num_worst_tokens, "0 without topk_idx")
    return token_in_rank, pairs


def combine(engine: Any, x: Tensor, handle: Any, topk_weights: Optional[Tensor], bias: Any, num_sms: int, after: List[Event],
            async_finish: bool) -> Tuple[Tensor, Optional[Tensor], EventOverlap]:
    native, num_rows = handle_of(COMBINE, engine, handle)
    must_be_tensor("combine", "x", x)
    if x.shape[0] != num_rows:
        raise COMBINE.refuse("x.shape[0]", x.shape[0], f"{num_rows}, the rows of the handle")
    if topk_weights is not None:
        must_be_tensor("combine", "topk_weights", topk_weights)
    bias_0, bias_1 = unpack_bias(bias)
    num_tokens = native.num_tokens()
    out = _TORCH.new((num_tokens, *x.shape[1:]), x.dtype)
    out_weights = None
    if topk_weights is not None:
        out_weights = _TORCH.new((num_tokens, *topk_weights.shape[1:]), topk_weights.dtype)
    event = engine._native.combine(native, x, topk_weights, bias_0, bias_1, out, out_weights, 0, 0.0, num_sms, after,
                                   not async_finish)
    if async_finish:
        engine._hold(event, (x, topk_weights, bias_0, bias_1, out, out_weights, native))
    return out, out_weights, _finished(COMBINE, event, async_finish)
