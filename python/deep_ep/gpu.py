"""High throughput on GPUs: the same calls as high_throughput.py, on streams, without a host wait but for numbers of rows."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

import torch
from anyep import Engine, UnsupportedError, _native
from anyep.arrays import view

from .calls import Method
from .events import EventOverlap, Previous, handle_before
from .handles import find
from .high_throughput import COMBINE, DISPATCH, Payload, check_layout, must_be_tensor, unpack_bias
from .streams import Place

Tensor = torch.Tensor
_View = _native.View
_INT32 = _native.DTYPES["int32"][0]
_layout = Engine.layout.__wrapped__  # type: ignore[attr-defined]  # on the current stream


def place_of(method: Method, runtime: Any, previous_event: Previous, async_finish: bool, on_comm_stream: bool) -> Place:
    before = None if previous_event is None else handle_before(previous_event)
    if on_comm_stream and (before is None or not async_finish):
        raise method.refuse("allocate_on_comm_stream", True, "only with a previous_event that has an event and with async_finish")
    return Place(runtime, before, async_finish, on_comm_stream)


def layout(method: Method, engine: Any, place: Place, topk_idx: Tensor, num_experts: int
           ) -> Tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
    with place:
        counts, pairs, token_in_rank = _layout(engine, topk_idx, num_experts)
        return (counts, None, pairs, token_in_rank,
                place.finish(method, place.mark(), (topk_idx,), (counts, pairs, token_in_rank)))


def handle_of(method: Method, engine: Any, handle: Any, stream: int) -> Tuple[Any, int, Any]:
    """The engine's handle behind a V1 handle, the rows that its dispatch had, and what must live until the call has been made.

    In a capture it is adopted from the tensors: a replay goes by what they hold then, not by what the host knows now."""
    native = find(method, engine, handle, with_ranks=False)
    if native is not None and not engine._gpu.is_capturing():
        return native, handle[3].shape[0], None
    return adopt(method, engine, handle, stream)


def adopt(method: Method, engine: Any, handle: Any, stream: int) -> Tuple[Any, int, Any]:
    """The same over the tensors (specification 9.1). The host looks at no element."""
    num_ranks, rank, device = engine.num_ranks, engine.rank, engine.device
    prefix, tokens, _, source, _, token_place = handle
    for index, tensor, dims in ((0, prefix, 2), (1, tokens, 2), (3, source, 1), (5, token_place, 2)):
        if not isinstance(tensor, Tensor) or tensor.get_device() != device:
            view(method.name, f"handle[{index}]", tensor, device)  # says what is wrong
        if tensor.dtype != torch.int32 or tensor.dim() != dims:
            raise method.refuse(f"handle[{index}]", f"{tensor.dtype} {list(tensor.shape)}", f"torch.int32 of {dims} dimensions")
    if prefix.shape != (num_ranks, num_ranks):
        raise method.refuse("handle[0]", list(prefix.shape), f"[{num_ranks}, {num_ranks}]")
    if tokens.shape[0] != num_ranks or tokens.shape[1] < 1:
        raise method.refuse("handle[1]", list(tokens.shape), f"[{num_ranks}, 1 or more]")
    rows_until, counts = _column(prefix, rank), _column(tokens, 0)
    num_rows = source.shape[0]
    native = engine._native.adopt(
        _View(rows_until.data_ptr(), _INT32, (num_ranks,)),
        _View(token_place.data_ptr(), _INT32, token_place.shape, token_place.stride()),
        _View(source.data_ptr(), _INT32, (num_rows,), source.stride()), _View(counts.data_ptr(), _INT32, (num_ranks,)), stream)
    return native, num_rows, (rows_until, counts)


def _column(matrix: Tensor, index: int) -> Tensor:
    """Dense. In the handles made here it lies so; in copies of them it does not."""
    column = matrix.select(1, index)
    return column if matrix.stride(0) == 1 else column.contiguous()


def cached_dispatch(runtime: Any, engine: Any, place: Place, x: Any, handle: Any, num_sms: int) -> Tuple[Any, ...]:
    payload = Payload(x, engine.device)
    with place:
        native, num_rows, _ = handle_of(DISPATCH, engine, handle, place.number)
        out, out_view, out_scales = payload.outputs(engine, num_rows, runtime.rows_in_window())
        event = engine._native.dispatch(native, payload.x_view, payload.scales, None, None, (), out_view, out_scales, None,
                                        None, (), place.number, 0.0, num_sms, [], False)
        end = place.finish(DISPATCH, event, (payload.x, payload.scales, *handle), (out, out_scales))
    return (out if out_scales is None else (out, out_scales)), None, None, None, None, end


def routed_dispatch(runtime: Any, engine: Any, place: Place, x: Any, given: Tuple[Any, Any, Any], topk_idx: Optional[Tensor],
                    topk_weights: Optional[Tensor], alignment: int, num_worst_tokens: int, num_sms: int) -> Tuple[Any, ...]:
    device, gpu = engine.device, engine._gpu
    token_in_rank, pairs = check_layout(engine, given, topk_idx, topk_weights, alignment, num_worst_tokens)
    if num_worst_tokens == 0 and gpu.is_capturing():
        raise UnsupportedError("Buffer.dispatch: num_worst_tokens = 0, allowed in a graph capture: the number of rows of the "
                               "outputs, or a handle. The host cannot wait for their number there.", op="Buffer.dispatch",
                               argument="num_worst_tokens", got="0")
    payload = Payload(x, device)
    route = (pairs.shape[0], 1 if topk_idx is None else topk_idx.shape[-1], topk_idx, token_in_rank, pairs)
    with place:
        send = _Send(engine, payload, (topk_idx, topk_weights), num_sms, place, runtime.rows_in_window())
        if num_worst_tokens:
            native, event, num_rows = send.into(num_worst_tokens, route)
        else:
            native, event, num_rows = send.exactly(route)
        out, out_scales, out_ids, out_weights = send.outputs
        counts = [] if num_worst_tokens else native.pairs_per_expert(alignment)
        prefix, tokens, source, token_place = shown = native.take_v1(device, num_rows)
        if not gpu.is_capturing():  # a graph fills the arrays anew at every replay, and the host would not know
            engine._shown.add(native, shown)
        end = place.finish(DISPATCH, event, (payload.x, payload.scales, topk_idx, topk_weights, token_in_rank, pairs),
                           (out, out_scales, out_ids, out_weights))
    handle = (prefix, tokens, tokens, source, token_in_rank, token_place)
    return (out if out_scales is None else (out, out_scales)), out_ids, out_weights, counts, handle, end


class _Send:
    """One fresh dispatch: route and dispatch as one where the number of rows need not be known."""

    def __init__(self, engine: Any, payload: Payload, choices: Tuple[Optional[Tensor], Optional[Tensor]], num_sms: int, place: Place,
                 in_window: bool) -> None:
        self.engine, self.payload, self.choices = engine, payload, choices
        self.given = (payload.x_view, payload.scales, *choices, ())
        self.num_sms, self.place, self.in_window = num_sms, place, in_window
        self.outputs: Tuple[Any, Any, Any, Any] = (None, None, None, None)  # x, scales, ids, weights

    def into(self, num_rows: int, route: Tuple[Any, ...]) -> Tuple[Any, Any, int]:
        """As many rows as the caller says; the host waits for nothing."""
        out, out_view, out_scales = self.payload.outputs(self.engine, num_rows, self.in_window)
        ids, weights = self._choices(num_rows)
        self.outputs = (out, out_scales, ids, weights)
        native, event, _ = self._fresh(route, lambda: (out_view, out_scales, ids, weights, ()), True)
        return native, event, num_rows

    def exactly(self, route: Tuple[Any, ...]) -> Tuple[Any, Any, int]:
        """As many rows as come. Where the window has free room for a guess, they move before the host knows. Their memory is found
        while the counts are on their way: that takes about as long."""
        native, payload, gpu = self.engine._native, self.payload, self.engine._gpu
        ahead: List[Any] = []  # rows and scales as Gpu.cut takes them, ids, weights

        def make() -> Optional[Tuple[Any, ...]]:
            guess = native.rows_ahead(payload.x.shape[0])
            rows = payload.outputs_ahead(self.engine, guess)
            if rows is None:
                return None
            ahead.extend((*rows, *self._choices(guess)))
            out, out_scales, ids, weights = ahead
            return payload.seen(out[0]), None if out_scales is None else out_scales[0], ids, weights, ()

        handle, event, dispatched = self._fresh(route, make, False)
        num_rows = handle.num_rows()
        if dispatched:
            out, out_scales, ids, weights = ahead
            out, out_scales = gpu.cut(out, num_rows), None if out_scales is None else gpu.cut(out_scales, num_rows)
            if not self.in_window:  # whose rows have been a stop on the way
                out, out_scales = out.clone(), None if out_scales is None else out_scales.clone()
                event = self.place.mark()
            self.outputs = (out, out_scales,
                            None if ids is None else ids.resize_(num_rows, ids.shape[1]),
                            None if weights is None else weights.resize_(num_rows, weights.shape[1]))
            return handle, event, num_rows
        ahead.clear()  # before as much is taken again
        out, out_view, out_scales = self.payload.outputs(self.engine, num_rows, self.in_window)
        ids, weights = self._choices(num_rows)
        self.outputs = (out, out_scales, ids, weights)
        event = native.dispatch(handle, *self.given, out_view, out_scales, ids, weights, (), self.place.number, 0.0, self.num_sms,
                                [], False)
        return handle, event, num_rows

    def _fresh(self, route: Tuple[Any, ...], make: Callable[[], Optional[Tuple[Any, ...]]], drop_surplus: bool
               ) -> Tuple[Any, Any, bool]:
        """Handle, event, and whether rows move to where ``make`` says."""
        return self.engine._native.dispatch_fresh(*route, *self.given, make, drop_surplus, self.place.number, 0.0, self.num_sms,
                                                  [])

    def _choices(self, num_rows: int) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Room for received ids and weights."""
        topk_idx, topk_weights = self.choices
        if topk_idx is None or topk_weights is None:
            return None, None
        shape, gpu = (num_rows, topk_idx.shape[-1]), self.engine._gpu
        return gpu.new(shape, topk_idx.dtype), gpu.new(shape, topk_weights.dtype)


def combine(engine: Any, place: Place, x: Tensor, handle: Any, topk_weights: Optional[Tensor], bias: Any, num_sms: int
            ) -> Tuple[Tensor, Optional[Tensor], EventOverlap]:
    device, gpu = engine.device, engine._gpu
    must_be_tensor("combine", "x", x, device)
    if topk_weights is not None:
        must_be_tensor("combine", "topk_weights", topk_weights, device)
    bias_0, bias_1 = unpack_bias(bias)
    with place:
        native, num_rows, _ = handle_of(COMBINE, engine, handle, place.number)
        if x.shape[0] != num_rows:
            raise COMBINE.refuse("x.shape[0]", x.shape[0], f"{num_rows}, the rows of the handle")
        num_tokens = native.num_tokens()
        out = gpu.new((num_tokens, *x.shape[1:]), x.dtype)
        out_weights = None
        if topk_weights is not None:
            out_weights = gpu.new((num_tokens, *topk_weights.shape[1:]), topk_weights.dtype)
        event = engine._native.combine(native, x, topk_weights, bias_0, bias_1, out, out_weights, place.number, 0.0, num_sms, [],
                                       False)
        end = place.finish(COMBINE, event, (x, topk_weights, bias_0, bias_1, *handle), (out, out_weights))
    return out, out_weights, end
