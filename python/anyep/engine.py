"""The engine of a group of ranks: routes, dispatches and combines tokens.

Tensors are torch tensors or numpy arrays (see arrays.py), on GPU ranks CUDA tensors. Calls are collective: every rank makes them
in the same order. One thread at a time may be inside a call. R = ranks of the group, L = experts of this rank, S = R * max_tokens.
"""

from __future__ import annotations

import collections
from typing import Any, Deque, List, Optional, Sequence, Tuple

from . import _native
from ._ahead import dispatch_ahead
from ._calls import LowLatency, _forward_log, _log_waits, logger, on_stream
from ._gpu import Gpu, device_of, must_have_torch
from ._slabs import WIRES, GpuSlabs, on_cpu, sums_by
from .arrays import code_of, library_of, optional_view, view
from .bootstrap import as_bootstrap
from .errors import CapacityError, UnsupportedError, argument_error
from .handle import Handle
from .rows import Combined, Dispatched, Rows, Slabs, ordinary_rows

Event = _native.Event
Tuning = _native.Tuning

class Engine:
    """One engine of a group of ranks, for both modes. Make it with ``create``; ``with`` closes it.

    The methods are collective unless they say "local". Every collective one takes

    * ``wait``: True returns when the operation is done (and runs it on this thread if nothing is queued); False returns at
      once, the event ends later. Until then the engine keeps inputs and outputs alive, and inputs must not change. Default:
      True on CPU ranks; False on GPU ranks, where what follows on the stream comes after the operation anyway.
    * ``after``: events that the operation comes after; on GPU ranks its stream waits for them, the host does not.
    * ``timeout_s``: seconds it may wait for peers; default: ``Tuning``.

    GPU ranks (``device`` >= 0) take tensors of that GPU and put their work on torch's current stream, or on ``stream`` (of torch
    or CuPy, or its number), which every method with tensors takes: then the call is made as if that stream were the current one.
    Outputs are torch tensors of that stream. The host waits for the numbers of ``route`` only where they are asked for. Calls
    may be captured into CUDA graphs (docs/python/gpus.md).

    Errors: ArgumentError, CapacityError, StateError before anything is sent; PeerTimeoutError, PeerDeadError, MismatchError
    from the call that waits, the event, or the next call. A failed engine stays failed.
    """

    def __init__(self, native: Any, device: int = -1) -> None:
        self._native = native
        self.device: int = device  #: the GPU of this rank; -1 = a CPU rank
        self._gpu: Optional[Gpu] = Gpu(native, device) if device >= 0 else None
        self._running: Deque[Tuple[Event, Tuple[Any, ...]]] = collections.deque()
        self._sends: List[LowLatency] = []
        self._shown = _native.ShownHandles()  # for handles that are tensors, deep_ep's: what goes with them
        self.rank: int = native.rank
        self.num_ranks: int = native.num_ranks
        self._slabs = None if self._gpu is None else GpuSlabs(self._gpu, self.num_ranks, self.rank)
        self.num_nodes: int = native.num_nodes

    @classmethod
    def create(cls, group: Any = None, *, rows_bytes: int = 0, low_latency_bytes: int = 0, max_experts: int = 1024,
               masks: bool = False, tuning: Optional[Tuning] = None, device: Any = None) -> "Engine":
        """Collective, all or none.

        Args:
            group: a Bootstrap, a torch process group, an mpi4py communicator, or None for one rank.
            device: this rank's GPU: its number, "cuda" (torch's current one), "cuda:N" or a torch.device; -1 or "cpu" for CPU
                ranks. Default: torch's current GPU for a group of NCCL, else the CPU. ANYEP_BACKEND=cpu or cuda overrides.
            rows_bytes: window memory for high throughput; address space, never a limit on tokens.
            low_latency_bytes: memory of the low-latency regions (``low_latency_bytes`` below); a call beyond it is
                CapacityError. One of the two must be more than 0.
            max_experts: most experts of a call. masks: low latency may mask a silent rank and go on.
            tuning: limits and switches; default ``Tuning.from_environment()``.

        Raises:
            MismatchError: ranks differ in budget or version. ResourceError, PeerTimeoutError, PeerDeadError.
            UnsupportedError: a GPU is asked for, and this build, torch or the machine has none.
        """
        number = device_of(device, group)
        if number >= 0:
            must_have_torch(number)
        try:
            return cls(_native.create(as_bootstrap(group), number, rows_bytes, low_latency_bytes, max_experts, masks,
                                      tuning if tuning is not None else Tuning.from_environment()), number)
        finally:
            if _log_waits():
                _forward_log()

    def _on(self, stream: Any) -> Any:
        if self._gpu is None:
            raise argument_error("stream", "stream", stream, "None on CPU ranks", "They have a queue and no streams")
        return self._gpu.on(stream)

    def _library(self, like: Any) -> Any:
        """What makes outputs."""
        return library_of(like) if self._gpu is None else self._gpu

    def _stream(self) -> int:
        return 0 if self._gpu is None else self._gpu.stream()

    # ---- high throughput

    @on_stream
    def route(self, experts: Any, num_experts: int, *, top_k: int = 0, ranks: Any = None, pairs_per_expert: Any = None,
              timeout_s: float = 0.0, after: Sequence[Event] = (), wait: Optional[bool] = None) -> Handle:
        """Counts, exchanges counts, fixes the place of every row.

        Args:
            experts: [num_tokens, top_k] int32 or int64 global ids, -1 = unused; None with ``ranks``. An id out of range counts
                as -1, or is an ArgumentError in checked mode.
            ranks: [num_tokens, R] bool: where each token goes; default: derived from experts.
            pairs_per_expert: [num_experts] int32, this rank's (token, choice) pairs; default: counted.
            top_k: needed without experts only.
        """
        device = self.device
        wait = device < 0 if wait is None else wait
        if experts is not None and not top_k:
            experts_view = view("route", "experts", experts, device)
            top_k = experts_view.shape[-1]
        else:
            experts_view = experts
        native = self._native.route(num_experts, top_k or 1, experts_view, ranks, pairs_per_expert, self._stream(), timeout_s,
                                    list(after), wait)
        if not wait and device < 0:
            self._hold(None, (experts, ranks, pairs_per_expert))
        if _log_waits():
            _forward_log()
        return Handle(native, self._gpu)

    @on_stream
    def adopt(self, rows_until: Any, place: Any, source: Any, tokens: Any) -> Handle:
        """Local. A handle from arrays that a caller kept (see ``Handle.arrays``). On a GPU nothing is copied: the tensors must
        live, unchanged, as long as the handle; values that no route has given make wrong results, never foreign writes."""
        if self._gpu is None:
            return Handle.adopt(self.num_ranks, self.rank, rows_until, place, source, tokens)
        op, device = "adopt", self.device
        native = self._native.adopt(view(op, "rows_until", rows_until, device), view(op, "place", place, device),
                                    view(op, "source", source, device), view(op, "tokens", tokens, device), self._stream())
        return Handle(native, self._gpu, (rows_until, place, source, tokens))

    @on_stream
    def make_rows(self, num_rows: int, hidden: int, dtype: str, *, num_scales: int = 0, scales_dtype: str = "float32",
                  like: Any = None) -> Rows:
        """Local. Rows (x and scales) in the engine's window, where peers can write and gather: the quickest place to dispatch
        to and to combine from. They may outlive the engine. ``like``: an array of the library that is wanted (numpy).

        Raises:
            CapacityError: the window's heap has no room; ordinary tensors serve as well, and are what GPU ranks get then.
        """
        if self._gpu is not None:
            return self._gpu_rows(num_rows, hidden, dtype, num_scales, scales_dtype)
        return self._rows_in_window(library_of(like), num_rows, hidden, dtype, num_scales, scales_dtype)

    def _gpu_rows(self, num_rows: int, hidden: int, dtype: str, num_scales: int, scales_dtype: str) -> Rows:
        gpu = self._gpu
        assert gpu is not None
        x = (num_rows, hidden), gpu.dtype_of[dtype]
        return Rows(*(gpu.rows(x, ((num_rows, num_scales), gpu.dtype_of[scales_dtype])) if num_scales else gpu.rows(x)))

    def _rows_in_window(self, library: Any, num_rows: int, hidden: int, dtype: str, num_scales: int,
                        scales_dtype: str) -> Rows:
        if num_rows == 0:
            return ordinary_rows(library, 0, hidden, dtype, num_scales, scales_dtype)
        x, scales = _native.memories_of(self._native.make_rows(num_rows, hidden, code_of(dtype), num_scales))
        return Rows(library.over(x, (num_rows, hidden), dtype),
                    library.over(scales, (num_rows, num_scales), scales_dtype) if num_scales else None)

    def _rows(self, library: Any, num_rows: int, hidden: int, dtype: str, num_scales: int, scales_dtype: str) -> Rows:
        """In the window where there is room, else in ordinary memory."""
        if self._gpu is not None:
            return self._gpu_rows(num_rows, hidden, dtype, num_scales, scales_dtype)
        try:
            return self._rows_in_window(library, num_rows, hidden, dtype, num_scales, scales_dtype)
        except CapacityError:
            return ordinary_rows(library, num_rows, hidden, dtype, num_scales, scales_dtype)

    @on_stream
    def dispatch(self, x: Any, handle: Handle, *, scales: Any = None, experts: Any = None, weights: Any = None,
                 extra: Sequence[Any] = (), out: Optional[Rows] = None, num_rows: Optional[int] = None, num_sms: int = 0,
                 timeout_s: float = 0.0, after: Sequence[Event] = (), wait: Optional[bool] = None) -> Dispatched:
        """Sends each token once to every rank that the handle names.

        Args:
            x: [num_tokens, hidden] bfloat16, float16, float32, int8 or uint8 (opaque bytes), or with scales float8_e4m3fn; row
                bytes a multiple of 16. scales: [num_tokens, any] float32 or int32, any strides.
            experts: [num_tokens, top_k] global ids, weights: [num_tokens, top_k] float32 and extra: further [num_tokens, any]
                tensors travel with the rows.
            out: where to; default: new rows, in the window where there is room. num_rows: rows of a new ``out``; default: as
                many as come, for which the call waits. Rows past the last have experts -1 and are otherwise unspecified. A
                CUDA graph can capture the call only with one of the two.
            num_sms: most threads; 0 = the plan chooses.

        Returns:
            (rows, event): row i of rows.x is bit for bit the row of token source[i] of the rank whose range holds i; rows are
            ordered by (source rank, source token). rows.experts holds local ids, -1 = hosted elsewhere; rows.weights is 0
            there.

        Raises:
            CapacityError: ``out`` has fewer rows than come; the surplus is dropped.
        """
        op, device = "dispatch", self.device
        wait = device < 0 if wait is None else wait
        if out is None:
            if num_rows is None and self._gpu is not None and self._gpu.is_capturing():
                raise UnsupportedError("dispatch: num_rows = None, allowed in a capture: a number of rows. Nobody can wait for "
                                       "their number there.", op=op, argument="num_rows")
            x_view = view(op, "x", x, device)
            views = (x_view, optional_view(op, "scales", scales, device), optional_view(op, "experts", experts, device),
                     optional_view(op, "weights", weights, device))
            extra_views = [view(op, "extra", tensor, device) for tensor in extra]
            if num_rows is None and self._gpu is not None and not handle._native.has_counts():
                done = dispatch_ahead(self, handle, Rows(x, scales, experts, weights, tuple(extra)), (*views, extra_views),
                                      (timeout_s, num_sms, list(after), wait))
                if done is not None:
                    return done
            out = self._new_rows(x, views, extra, extra_views, handle.num_rows if num_rows is None else num_rows)
        else:
            views, extra_views = (x, scales, experts, weights), extra
        event = self._native.dispatch(handle._native, *views, extra_views, out.x, out.scales, out.experts, out.weights,
                                      out.extra, self._stream(), timeout_s, num_sms, list(after), wait)
        if not wait and device < 0:
            self._hold(event, (x, scales, experts, weights, extra, out, handle))
        if _log_waits():
            _forward_log()
        return Dispatched(out, event)

    def _new_rows(self, x: Any, views: Tuple[Any, ...], extra: Sequence[Any], extra_views: List[Any], num_rows: int) -> Rows:
        """``views``: of x, scales, experts and weights."""
        x_view, scales, experts, weights = views
        for name, tensor in zip(("x", "scales", "experts", "weights"), views):
            if tensor is not None and len(tensor.shape) != 2:
                raise argument_error("dispatch", name, f"tensor of shape {list(tensor.shape)}", "2 dimensions")
        library = self._library(x)
        rows = self._rows(library, num_rows, x_view.shape[1], x_view.dtype, 0 if scales is None else scales.shape[1],
                          "float32" if scales is None else scales.dtype)
        return rows._replace(
            experts=None if experts is None else library.empty((num_rows, experts.shape[1]), experts.dtype),
            weights=None if weights is None else library.empty((num_rows, weights.shape[1]), weights.dtype),
            extra=tuple(self._library(tensor).empty((num_rows, *shown.shape[1:]), shown.dtype)
                        for tensor, shown in zip(extra, extra_views)))

    @on_stream
    def combine(self, x: Any, handle: Handle, *, weights: Any = None, bias: Sequence[Any] = (), out: Any = None,
                out_weights: Any = None, num_sms: int = 0, timeout_s: float = 0.0, after: Sequence[Event] = (),
                wait: Optional[bool] = None) -> Combined:
        """out[token] = bias + the sum, over ranks ascending, of that rank's row for it: float32, rounded once, unweighted.

        Args:
            x: [num_rows, hidden] bfloat16, float16 or float32, in the order of dispatch; rows past the handle's are ignored.
            weights: [num_rows, any] float32, summed likewise. bias: up to two [num_tokens, hidden] of x's type, None among
                them allowed. out, out_weights: where to; default: new tensors.
        """
        op, device = "combine", self.device
        wait = device < 0 if wait is None else wait
        if len(bias) > 2:
            raise argument_error(op, "bias", f"{len(bias)} tensors", "at most 2")
        x_view, weights_view = x, weights
        if out is None:
            x_view = view(op, "x", x, device)
            shape = x_view.shape
            if len(shape) != 2:
                raise argument_error(op, "x", f"tensor of shape {list(shape)}", "2 dimensions")
            out = self._library(x).empty((handle.num_tokens, shape[1]), x_view.dtype)
        if out_weights is None and weights is not None:
            weights_view = view(op, "weights", weights, device)
            out_weights = self._library(weights).empty((handle.num_tokens, *weights_view.shape[1:]), weights_view.dtype)
        event = self._native.combine(handle._native, x_view, weights_view, *bias, *[None] * (2 - len(bias)), out, out_weights,
                                     self._stream(), timeout_s, num_sms, list(after), wait)
        if not wait and device < 0:
            self._hold(event, (x, weights, bias, out, out_weights, handle))
        if _log_waits():
            _forward_log()
        return Combined(out, out_weights, event)

    @on_stream
    def layout(self, experts: Any, num_experts: int) -> Tuple[Any, Any, Any]:
        """Local. tokens_per_rank int32 [R] (each token once), pairs_per_expert int32 [num_experts], token_in_rank bool
        [num_tokens, R] of this rank's own ``experts`` [num_tokens, top_k]."""
        if len(getattr(experts, "shape", ())) != 2:
            shape = view("layout", "experts", experts, self.device).shape  # which says what else may be wrong
            if len(shape) != 2:
                raise argument_error("layout", "experts", f"tensor of shape {list(shape)}", "2 dimensions")
        empty, num_ranks = self._library(experts).empty, self.num_ranks

        def out(num_tokens: int) -> Tuple[Any, Any, Any]:
            return empty((num_ranks,), "int32"), empty((max(num_experts, 0),), "int32"), empty((num_tokens, num_ranks), "bool")

        return self._native.layout(num_experts, experts, out, self._stream())

    # ---- low latency

    @on_stream
    def low_latency_dispatch(self, x: Any, experts: Any, num_experts: int, max_tokens: int, *, wire: str = "bf16",
                             round_scale: bool = False, hook: bool = False, out: Optional[Slabs] = None, received: Any = None,
                             waited: Any = None, timeout_s: float = 0.0, after: Sequence[Event] = (),
                             wait: Optional[bool] = None) -> LowLatency:
        """Tokens straight into per-expert slabs.

        Args:
            x: [num_tokens <= max_tokens, hidden] bfloat16. experts: [num_tokens, top_k] int32 or int64, -1 = unused.
            num_experts, max_tokens: equal on all ranks; may change from call to call.
            wire: "bf16", "fp8" (float32 scale per 128 elements; powers of two with round_scale) or "ue8m0".
            hook: return when data is on its way; ``receive()`` of the result does the rest, on the thread that calls it. At
                most two operations may be unreceived.
            out: slabs to fill; default: new ones. received: int32 [L], received rows are added. waited: int64 [R],
                nanoseconds (on GPU ranks clock cycles) waited for each source are added.
        """
        device = self.device
        wait = device < 0 if wait is None else wait
        out, done, stream = self._low_latency_dispatch(x, experts, num_experts, max_tokens, wire, round_scale, hook, out, received,
                                                       waited, timeout_s, after, wait)
        return LowLatency(self, out, done, (x, experts, out, received, waited), hook, wait, stream)

    def _low_latency_dispatch(self, x: Any, experts: Any, num_experts: int, max_tokens: int, wire: str, round_scale: bool,
                              hook: bool, out: Any, received: Any, waited: Any, timeout_s: float, after: Any, wait: bool
                              ) -> Tuple[Slabs, Any, int]:
        """The slabs, what receives with ``hook``, else the event, and the stream."""
        if wire not in WIRES or wire == "logfmt":
            raise argument_error("low_latency_dispatch", "wire", repr(wire), "'bf16', 'fp8' or 'ue8m0'")
        if out is None:
            out = on_cpu(self, library_of(x)) if self._slabs is None else self._slabs.make
        elif len(out) != len(Slabs._fields):
            raise argument_error("low_latency_dispatch", "out", f"{len(out)} arrays", f"{len(Slabs._fields)}, as Slabs has them")
        stream = self._stream()
        out, done = self._native.low_latency_dispatch(num_experts, max_tokens, x, experts, out, received, waited, WIRES[wire],
                                                      round_scale, hook, stream, timeout_s, list(after), wait)
        if _log_waits():
            _forward_log()
        return out, done, stream

    @on_stream
    def low_latency_combine(self, x: Any, experts: Any, weights: Any, slabs: Slabs, num_experts: int, max_tokens: int, *,
                            wire: str = "bf16", zero_copy: bool = False, hook: bool = False, out: Any = None,
                            waited: Any = None, timeout_s: float = 0.0, after: Sequence[Event] = (),
                            wait: Optional[bool] = None) -> LowLatency:
        """out[token] = sum over its choices of weight * that expert's row (specification: docs/concepts.md).

        Args:
            x: [L, S, hidden] bfloat16, rows where dispatch put them; with zero_copy its memory is ``combine_buffer()``.
            experts, weights: as given to dispatch, [num_tokens, top_k] global ids and float32.
            slabs: what dispatch returned; ``source``, ``range`` and ``rows`` are used.
            wire: "bf16" or "logfmt" (10 bits; hidden a multiple of 128; not with zero_copy).
            out: [num_tokens, hidden] bfloat16; default: new.
        """
        device = self.device
        wait = device < 0 if wait is None else wait
        out, done, stream = self._low_latency_combine(x, experts, weights, slabs[3:], num_experts, max_tokens, wire,
                                                      zero_copy, hook, out, waited, timeout_s, after, wait)
        return LowLatency(self, out, done, (x, experts, weights, slabs, out, waited), hook, wait, stream)

    def _low_latency_combine(self, x: Any, experts: Any, weights: Any, origin: Tuple[Any, Any, Any], num_experts: int,
                             max_tokens: int, wire: str, zero_copy: bool, hook: bool, out: Any, waited: Any, timeout_s: float,
                             after: Any, wait: bool) -> Tuple[Any, Any, int]:
        """The sums, what receives with ``hook``, else the event, and the stream. ``origin``: source, range and rows of slabs."""
        if wire not in ("bf16", "logfmt"):
            raise argument_error("low_latency_combine", "wire", repr(wire), "'bf16' or 'logfmt'")
        if out is None:
            out = sums_by(self._library(x))
        stream = self._stream()
        out, done = self._native.low_latency_combine(num_experts, max_tokens, x, *origin, experts, weights, out, waited, WIRES[wire],
                                                     zero_copy, hook, stream, timeout_s, list(after), wait)
        if _log_waits():
            _forward_log()
        return out, done, stream

    def combine_buffer(self, num_experts: int, hidden: int, max_tokens: int, *, like: Any = None) -> Any:
        """Local. The zero-copy input of a combine: [L, S, hidden] bfloat16 in the engine's memory, one address for its life.
        The tensor keeps the memory alive."""
        memory = self._native.combine_buffer(num_experts, hidden, max_tokens)
        base, rest = divmod(num_experts, self.num_ranks)
        shape = (base + (self.rank < rest), self.num_ranks * max_tokens, hidden)
        library = self._library(like)
        return library.over(memory, shape, "bfloat16") if memory.bytes else library.empty(shape, "bfloat16")

    # ---- the rest

    @on_stream
    def barrier(self) -> None:
        """Of all ranks that are not masked. On a GPU what follows on the stream waits, the host does not."""
        self._native.barrier(self._stream())
        if _log_waits():
            _forward_log()

    def masks(self) -> List[int]:
        """Local. 1 for every masked rank. StateError without ``masks``."""
        if self._gpu is not None:
            status = self._gpu.empty((self.num_ranks,), "int32")
            self._native.masks(view("masks", "out", status, self.device), self._gpu.stream())
            return status.tolist()
        import array

        words = array.array("i", [0] * self.num_ranks)
        self._native.masks(view("masks", "out", memoryview(words)), 0)
        return list(words)

    def mask(self, rank: int) -> None:
        """Local: from now on low-latency calls neither send to this rank nor wait for it."""
        self._native.mask(rank, self._stream())

    def unmask(self, rank: int) -> None:
        """Asks the rank; takes effect on both sides at an operation that both agreed on."""
        self._native.unmask(rank, self._stream())

    def memory(self, mode: str, offset: int, num_bytes: int) -> Any:
        """Local. Bytes of the engine's own payload memory, a memoryview, on a GPU a torch tensor of uint8; ``mode`` is
        "high_throughput" or "low_latency"."""
        if mode not in ("high_throughput", "low_latency"):
            raise argument_error("memory", "mode", repr(mode), "'high_throughput' or 'low_latency'")
        memory = self._native.memory(mode == "low_latency", offset, num_bytes)
        if self._gpu is not None:
            return self._gpu.over(memory, (num_bytes,), "uint8")
        return memoryview(memory)

    @property
    def ids_out_of_range(self) -> int:
        """Expert ids that counted as -1 so far. On a GPU the host waits for all operations."""
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
            if self._gpu is not None:
                self._gpu.pool.close()
            self._running.clear()
            self._sends.clear()
            self._shown.clear()
            if self._slabs is not None:
                self._slabs.clear()
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
