"""The engine of a group of ranks: routes, dispatches and combines tokens.

Tensors are torch tensors or numpy arrays (see arrays.py). Calls are collective: every rank makes them in the same order. One
thread at a time may be inside a call. R = ranks of the group, L = experts of this rank, S = R * max_tokens.
"""

from __future__ import annotations

import collections
import logging
from typing import Any, Deque, List, Optional, Sequence, Tuple

from . import _native
from .arrays import code_of, library_of, optional_view, view
from .bootstrap import as_bootstrap
from .errors import CapacityError, argument_error
from .handle import Handle
from .rows import Combined, Dispatched, Rows, Slabs, ordinary_rows, swapped

Event = _native.Event
Tuning = _native.Tuning
WIRES = {"bf16": 0, "fp8": 1, "ue8m0": 2, "logfmt": 3}

logger = logging.getLogger("anyep")
logger.addHandler(logging.NullHandler())  # silent unless the program listens
_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
_log_waits = _native.log_waits


def _forward_log() -> None:
    for level, line in _native.take_log():
        logger.log(_LEVELS[level], line)


class LowLatency:
    """One low-latency operation: its results, and the hook that completes them.

    Attributes:
        result: Slabs of a dispatch, or the tensor [num_tokens, hidden] of a combine.
        event: ends with the operation; complete when the call waited. With a hook it is what ``receive`` gave, before that
            None.
    """

    __slots__ = ("result", "event", "_engine", "_pending", "_keep")

    def __init__(self, engine: "Engine", result: Any, pending: Any, keep: Tuple[Any, ...], hook: bool, wait: bool) -> None:
        self.result = result
        self.event: Optional[Event] = None
        self._engine = engine
        self._pending = pending
        self._keep = keep
        if hook:
            engine._sends.append(self)
        else:
            self.event = pending.receive()
            if not wait:
                engine._hold(self.event, keep)

    def receive(self) -> Event:
        """The hook: runs the receive half on this thread. Once, in the order of the sends (StateError otherwise). Results and
        statistics may be read afterwards."""
        event = self._pending.receive()
        self._engine._sends.remove(self)
        self.event = event
        return event


class Engine:
    """One engine of a group of ranks, for both modes. Make it with ``create``; ``with`` closes it.

    The methods are collective unless they say "local". Every collective one takes

    * ``wait``: True returns when the operation is done (and runs it on this thread if nothing is queued); False returns at
      once, the event ends later. Until then the engine keeps inputs and outputs alive, and inputs must not change.
    * ``after``: events that the operation comes after.
    * ``timeout_s``: seconds it may wait for peers; default: ``Tuning``.

    Errors: ArgumentError, CapacityError, StateError before anything is sent; PeerTimeoutError, PeerDeadError, MismatchError
    from the call that waits, the event, or the next call. A failed engine stays failed.
    """

    def __init__(self, native: Any) -> None:
        self._native = native
        self._running: Deque[Tuple[Event, Tuple[Any, ...]]] = collections.deque()
        self._sends: List[LowLatency] = []
        self.rank: int = native.rank
        self.num_ranks: int = native.num_ranks
        self.num_nodes: int = native.num_nodes

    @classmethod
    def create(cls, group: Any = None, *, rows_bytes: int = 0, low_latency_bytes: int = 0, max_experts: int = 1024,
               masks: bool = False, tuning: Optional[Tuning] = None) -> "Engine":
        """Collective, all or none.

        Args:
            group: a Bootstrap, a torch process group, an mpi4py communicator, or None for one rank.
            rows_bytes: window memory for high throughput; address space, never a limit on tokens.
            low_latency_bytes: memory of the low-latency regions (``low_latency_bytes`` below); a call beyond it is
                CapacityError. One of the two must be more than 0.
            max_experts: most experts of a call. masks: low latency may mask a silent rank and go on.
            tuning: limits and switches; default ``Tuning.from_environment()``.

        Raises:
            MismatchError: ranks differ in budget or version. ResourceError, PeerTimeoutError, PeerDeadError.
        """
        try:
            return cls(_native.create(as_bootstrap(group), rows_bytes, low_latency_bytes, max_experts, masks,
                                      tuning if tuning is not None else Tuning.from_environment()))
        finally:
            if _log_waits():
                _forward_log()

    # ---- high throughput

    def route(self, experts: Any, num_experts: int, *, top_k: int = 0, ranks: Any = None, pairs_per_expert: Any = None,
              timeout_s: float = 0.0, after: Sequence[Event] = (), wait: bool = True) -> Handle:
        """Counts, exchanges counts, fixes the place of every row.

        Args:
            experts: [num_tokens, top_k] int32 or int64 global ids, -1 = unused; None with ``ranks``. An id out of range counts
                as -1, or is an ArgumentError in checked mode.
            ranks: [num_tokens, R] bool: where each token goes; default: derived from experts.
            pairs_per_expert: [num_experts] int32, this rank's (token, choice) pairs; default: counted.
            top_k: needed without experts only.
        """
        op = "route"
        if experts is not None:
            experts_view = view(op, "experts", experts)
            top_k = top_k or experts.shape[-1]
        else:
            experts_view = None
        native = self._native.route(num_experts, top_k or 1, experts_view, optional_view(op, "ranks", ranks),
                                    optional_view(op, "pairs_per_expert", pairs_per_expert), timeout_s, list(after), wait)
        if not wait:
            self._hold(None, (experts, ranks, pairs_per_expert))
        if _log_waits():
            _forward_log()
        return Handle(native)

    def make_rows(self, num_rows: int, hidden: int, dtype: str, *, num_scales: int = 0, scales_dtype: str = "float32",
                  like: Any = None) -> Rows:
        """Local. Rows (x and scales) in the engine's window, where peers can write and gather: the quickest place to dispatch
        to and to combine from. They may outlive the engine. ``like``: an array of the library that is wanted (numpy).

        Raises:
            CapacityError: the window's heap has no room; ordinary tensors serve as well.
        """
        return self._rows_in_window(library_of(like), num_rows, hidden, dtype, num_scales, scales_dtype)

    def _rows_in_window(self, library: Any, num_rows: int, hidden: int, dtype: str, num_scales: int,
                        scales_dtype: str) -> Rows:
        if num_rows == 0:
            return ordinary_rows(library, 0, hidden, dtype, num_scales, scales_dtype)
        x, scales = _native.memories_of(self._native.make_rows(num_rows, hidden, code_of(dtype), num_scales))
        return Rows(library.over(x, (num_rows, hidden), dtype),
                    library.over(scales, (num_rows, num_scales), scales_dtype) if num_scales else None)

    def _rows(self, library: Any, num_rows: int, hidden: int, dtype: str, num_scales: int, scales_dtype: str) -> Rows:
        """In the window where there is room, else in ordinary memory."""
        try:
            return self._rows_in_window(library, num_rows, hidden, dtype, num_scales, scales_dtype)
        except CapacityError:
            return ordinary_rows(library, num_rows, hidden, dtype, num_scales, scales_dtype)

    def dispatch(self, x: Any, handle: Handle, *, scales: Any = None, experts: Any = None, weights: Any = None,
                 extra: Sequence[Any] = (), out: Optional[Rows] = None, num_rows: Optional[int] = None, num_sms: int = 0,
                 timeout_s: float = 0.0, after: Sequence[Event] = (), wait: bool = True) -> Dispatched:
        """Sends each token once to every rank that the handle names.

        Args:
            x: [num_tokens, hidden] bfloat16, float16, float32, int8 or uint8 (opaque bytes), or with scales float8_e4m3fn; row
                bytes a multiple of 16. scales: [num_tokens, any] float32 or int32, any strides.
            experts: [num_tokens, top_k] global ids, weights: [num_tokens, top_k] float32 and extra: further [num_tokens, any]
                tensors travel with the rows.
            out: where to; default: new rows, in the window where there is room. num_rows: rows of a new ``out``; default: as
                many as come, for which the call waits. Rows past the last have experts -1 and are otherwise unspecified.
            num_sms: most threads; 0 = the plan chooses.

        Returns:
            (rows, event): row i of rows.x is bit for bit the row of token source[i] of the rank whose range holds i; rows are
            ordered by (source rank, source token). rows.experts holds local ids, -1 = hosted elsewhere; rows.weights is 0
            there.

        Raises:
            CapacityError: ``out`` has fewer rows than come; the surplus is dropped.
        """
        op = "dispatch"
        x_view = view(op, "x", x)
        scales_view = optional_view(op, "scales", scales)
        experts_view = optional_view(op, "experts", experts)
        weights_view = optional_view(op, "weights", weights)
        extra_views = [view(op, "extra", tensor) for tensor in extra]
        if out is None:
            out = self._new_rows(x, x_view, scales_view, experts_view, weights_view, extra, extra_views,
                                 handle.num_rows if num_rows is None else num_rows)
        event = self._native.dispatch(
            handle._native, x_view, scales_view, experts_view, weights_view, extra_views, view(op, "out.x", out.x),
            optional_view(op, "out.scales", out.scales), optional_view(op, "out.experts", out.experts),
            optional_view(op, "out.weights", out.weights), [view(op, "out.extra", tensor) for tensor in out.extra],
            timeout_s, num_sms, list(after), wait)
        if not wait:
            self._hold(event, (x, scales, experts, weights, extra, out, handle))
        if _log_waits():
            _forward_log()
        return Dispatched(out, event)

    def _new_rows(self, x: Any, x_view: Any, scales: Any, experts: Any, weights: Any, extra: Sequence[Any],
                  extra_views: List[Any], num_rows: int) -> Rows:
        for name, tensor in (("x", x_view), ("scales", scales), ("experts", experts), ("weights", weights)):
            if tensor is not None and len(tensor.shape) != 2:
                raise argument_error("dispatch", name, f"tensor of shape {list(tensor.shape)}", "2 dimensions")
        library = library_of(x)
        rows = self._rows(library, num_rows, x_view.shape[1], x_view.dtype, 0 if scales is None else scales.shape[1],
                          "float32" if scales is None else scales.dtype)
        return rows._replace(
            experts=None if experts is None else library.empty((num_rows, experts.shape[1]), experts.dtype),
            weights=None if weights is None else library.empty((num_rows, weights.shape[1]), weights.dtype),
            extra=tuple(library_of(tensor).empty((num_rows, *shown.shape[1:]), shown.dtype)
                        for tensor, shown in zip(extra, extra_views)))

    def combine(self, x: Any, handle: Handle, *, weights: Any = None, bias: Sequence[Any] = (), out: Any = None,
                out_weights: Any = None, num_sms: int = 0, timeout_s: float = 0.0, after: Sequence[Event] = (),
                wait: bool = True) -> Combined:
        """out[token] = bias + the sum, over ranks ascending, of that rank's row for it: float32, rounded once, unweighted.

        Args:
            x: [num_rows, hidden] bfloat16, float16 or float32, in the order of dispatch; rows past the handle's are ignored.
            weights: [num_rows, any] float32, summed likewise. bias: up to two [num_tokens, hidden] of x's type, None among
                them allowed. out, out_weights: where to; default: new tensors.
        """
        op = "combine"
        x_view = view(op, "x", x)
        weights_view = optional_view(op, "weights", weights)
        if len(bias) > 2:
            raise argument_error(op, "bias", f"{len(bias)} tensors", "at most 2")
        biases = [optional_view(op, "bias", tensor) for tensor in bias] + [None] * (2 - len(bias))
        if out is None:
            if len(x_view.shape) != 2:
                raise argument_error(op, "x", f"tensor of shape {list(x_view.shape)}", "2 dimensions")
            out = library_of(x).empty((handle.num_tokens, x_view.shape[1]), x_view.dtype)
        if out_weights is None and weights_view is not None:
            out_weights = library_of(weights).empty((handle.num_tokens, *weights_view.shape[1:]), weights_view.dtype)
        event = self._native.combine(handle._native, x_view, weights_view, biases[0], biases[1], view(op, "out", out),
                                     optional_view(op, "out_weights", out_weights), timeout_s, num_sms, list(after), wait)
        if not wait:
            self._hold(event, (x, weights, bias, out, out_weights, handle))
        if _log_waits():
            _forward_log()
        return Combined(out, out_weights, event)

    def layout(self, experts: Any, num_experts: int) -> Tuple[Any, Any, Any]:
        """Local. tokens_per_rank int32 [R] (each token once), pairs_per_expert int32 [num_experts], token_in_rank bool
        [num_tokens, R] of this rank's own ``experts`` [num_tokens, top_k]."""
        experts_view = view("layout", "experts", experts)
        if len(experts_view.shape) != 2:
            raise argument_error("layout", "experts", f"tensor of shape {list(experts_view.shape)}", "2 dimensions")
        library = library_of(experts)
        result = (library.empty((self.num_ranks,), "int32"), library.empty((max(num_experts, 0),), "int32"),
                  library.empty((experts_view.shape[0], self.num_ranks), "bool"))
        self._native.layout(num_experts, experts_view.shape[1], experts_view,
                            *(view("layout", "out", tensor) for tensor in result))
        return result

    # ---- low latency

    def low_latency_dispatch(self, x: Any, experts: Any, num_experts: int, max_tokens: int, *, wire: str = "bf16",
                             round_scale: bool = False, hook: bool = False, out: Optional[Slabs] = None, received: Any = None,
                             waited: Any = None, timeout_s: float = 0.0, after: Sequence[Event] = (),
                             wait: bool = True) -> LowLatency:
        """Tokens straight into per-expert slabs.

        Args:
            x: [num_tokens <= max_tokens, hidden] bfloat16. experts: [num_tokens, top_k] int32 or int64, -1 = unused.
            num_experts, max_tokens: equal on all ranks; may change from call to call.
            wire: "bf16", "fp8" (float32 scale per 128 elements; powers of two with round_scale) or "ue8m0".
            hook: return when data is on its way; ``receive()`` of the result does the rest, on the thread that calls it. At
                most two operations may be unreceived.
            out: slabs to fill; default: new ones. received: int32 [L], received rows are added. waited: int64 [R],
                nanoseconds waited for each source are added.
        """
        op = "low_latency_dispatch"
        x_view = view(op, "x", x)
        experts_view = view(op, "experts", experts)
        if wire not in WIRES or wire == "logfmt":
            raise argument_error(op, "wire", repr(wire), "'bf16', 'fp8' or 'ue8m0'")
        if len(x_view.shape) != 2:
            raise argument_error(op, "x", f"tensor of shape {list(x_view.shape)}", "2 dimensions")
        hidden = x_view.shape[1]
        if out is None:
            out = self._new_slabs(library_of(x), num_experts, hidden, max_tokens, wire)
        pending = self._native.low_latency_dispatch(
            num_experts, experts_view.shape[-1], hidden, max_tokens, x_view, experts_view, view(op, "out.x", out.x),
            optional_view(op, "out.scales", out.scales), view(op, "out.counts", out.counts),
            view(op, "out.source", out.source), view(op, "out.range", out.range), optional_view(op, "received", received),
            optional_view(op, "waited", waited), WIRES[wire], round_scale, hook, timeout_s, list(after), wait)
        if _log_waits():
            _forward_log()
        return LowLatency(self, out, pending, (x, experts, out, received, waited), hook, wait)

    def _new_slabs(self, library: Any, num_experts: int, hidden: int, max_tokens: int, wire: str) -> Slabs:
        base, rest = divmod(max(num_experts, 0), self.num_ranks)
        experts = base + (self.rank < rest)
        rows = self.num_ranks * max(max_tokens, 0)
        x = library.empty((experts, rows, hidden), "bfloat16" if wire == "bf16" else "float8_e4m3fn")
        scales = None
        if wire != "bf16":
            columns, dtype = (-(-hidden // 128), "float32") if wire == "fp8" else (-(-hidden // 512), "int32")
            scales = swapped(library.empty((experts, columns, rows), dtype))
        return Slabs(x, scales, library.empty((experts,), "int32"), library.empty((experts, rows), "int32"),
                     library.empty((experts, self.num_ranks), "int64"))

    def low_latency_combine(self, x: Any, experts: Any, weights: Any, slabs: Slabs, num_experts: int, max_tokens: int, *,
                            wire: str = "bf16", zero_copy: bool = False, hook: bool = False, out: Any = None,
                            waited: Any = None, timeout_s: float = 0.0, after: Sequence[Event] = (),
                            wait: bool = True) -> LowLatency:
        """out[token] = sum over its choices of weight * that expert's row (specification: docs/concepts.md).

        Args:
            x: [L, S, hidden] bfloat16, rows where dispatch put them; with zero_copy its memory is ``combine_buffer()``.
            experts, weights: as given to dispatch, [num_tokens, top_k] global ids and float32.
            slabs: what dispatch returned; ``source`` and ``range`` are used.
            wire: "bf16" or "logfmt" (10 bits; hidden a multiple of 128; not with zero_copy).
            out: [num_tokens, hidden] bfloat16; default: new.
        """
        op = "low_latency_combine"
        x_view = view(op, "x", x)
        experts_view = view(op, "experts", experts)
        if wire not in ("bf16", "logfmt"):
            raise argument_error(op, "wire", repr(wire), "'bf16' or 'logfmt'")
        hidden = x_view.shape[-1]
        if out is None:
            out = library_of(x).empty((experts_view.shape[0], hidden), "bfloat16")
        pending = self._native.low_latency_combine(
            num_experts, experts_view.shape[-1], hidden, max_tokens, x_view, view(op, "slabs.source", slabs.source),
            view(op, "slabs.range", slabs.range), experts_view, view(op, "weights", weights), view(op, "out", out),
            optional_view(op, "waited", waited), WIRES[wire], zero_copy, hook, timeout_s, list(after), wait)
        if _log_waits():
            _forward_log()
        return LowLatency(self, out, pending, (x, experts, weights, slabs, out, waited), hook, wait)

    def combine_buffer(self, num_experts: int, hidden: int, max_tokens: int, *, like: Any = None) -> Any:
        """Local. The zero-copy input of a combine: [L, S, hidden] bfloat16 in the engine's memory, one address for its life.
        The tensor keeps the memory alive."""
        memory = self._native.combine_buffer(num_experts, hidden, max_tokens)
        base, rest = divmod(num_experts, self.num_ranks)
        shape = (base + (self.rank < rest), self.num_ranks * max_tokens, hidden)
        library = library_of(like)
        return library.over(memory, shape, "bfloat16") if memory.bytes else library.empty(shape, "bfloat16")

    # ---- the rest

    def barrier(self) -> None:
        """Of all ranks that are not masked."""
        self._native.barrier()
        if _log_waits():
            _forward_log()

    def masks(self) -> List[int]:
        """Local. 1 for every masked rank. StateError without ``masks``."""
        import array

        words = array.array("i", [0] * self.num_ranks)
        self._native.masks(view("masks", "out", memoryview(words)))
        return list(words)

    def mask(self, rank: int) -> None:
        """Local: from now on low-latency calls neither send to this rank nor wait for it."""
        self._native.mask(rank)

    def unmask(self, rank: int) -> None:
        """Asks the rank; takes effect on both sides at an operation that both agreed on."""
        self._native.unmask(rank)

    def memory(self, mode: str, offset: int, num_bytes: int) -> memoryview:
        """Local. Bytes of the engine's own payload memory; ``mode`` is "high_throughput" or "low_latency"."""
        if mode not in ("high_throughput", "low_latency"):
            raise argument_error("memory", "mode", repr(mode), "'high_throughput' or 'low_latency'")
        return memoryview(self._native.memory(mode == "low_latency", offset, num_bytes))

    @property
    def ids_out_of_range(self) -> int:
        """Expert ids that counted as -1 so far."""
        return self._native.ids_out_of_range

    def check(self) -> None:
        """Local, never waits: raises this engine's first error, every time."""
        if _log_waits():
            _forward_log()
        self._native.check()

    def abandon(self, why: str) -> None:
        """Tells the peers why this rank leaves: their calls fail with the text. The engine has failed afterwards."""
        self._native.abandon(why)

    def close(self) -> None:
        """Collective, idempotent: waits for queued operations and for every peer's closing word, at most the close limit, and
        names who did not come (PeerTimeoutError); everything local is released either way."""
        try:
            self._native.close()
        finally:
            self._running.clear()
            self._sends.clear()
            if _log_waits():
                _forward_log()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.close()
            return
        self.abandon(f"{kind.__name__}: {error}")
        try:
            self.close()
        except Exception:  # the first error is what the caller must see
            logger.debug("close after an error", exc_info=True)

    def __reduce__(self) -> Any:
        raise TypeError("an Engine belongs to the process that made it and cannot be pickled")

    def __del__(self) -> None:
        self.__dict__.pop("_native", None)  # before the tensors of operations in flight

    def _hold(self, event: Optional[Event], tensors: Tuple[Any, ...]) -> None:
        """Tensors of an operation live until it has ended; operations end in order, so a route (no event) with the next."""
        running = self._running
        done = 0
        for index, (earlier, _) in enumerate(running):
            if earlier is not None:
                if not earlier.done():
                    break
                done = index + 1
        for _ in range(done):
            running.popleft()
        running.append((event, tensors))
