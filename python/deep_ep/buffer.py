"""``Buffer``: V1's class. It translates and decides nothing: one Buffer is one ``anyep.Engine``.

R = ranks of the group, T = tokens of this rank, N = rows received, H = hidden, K = top-k, E = experts, L = experts of this rank,
M = num_max_dispatch_tokens_per_rank. The contract of every member: docs/python/coming_from_deep_ep.md.
"""

from __future__ import annotations

import logging
import math
import operator
import os
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch

from . import gpu, high_throughput, low_latency
from .calls import Method
from .config import Config, combine_config, dispatch_config, low_latency_size_hint
from .events import EventHandle, EventOverlap, Previous
from .handles import low_latency_handle
from .runtime import Runtime

logger = logging.getLogger("anyep")

Tensor = torch.Tensor
Handle = Sequence[Any]

_LAYOUT = Method("Buffer.get_dispatch_layout", names={
    "shape.num_experts": "num_experts", "routing.experts": "topk_idx", "experts": "topk_idx"})
_SET_NUM_SMS = Method("Buffer.set_num_sms")
_VIEW = Method("Buffer.get_local_buffer_tensor")
_CLEAN = Method("Buffer.clean_low_latency_buffer", op="barrier")
_NO_MASKS = {"the budget does not allow masks": "the Buffer was made without enable_shrink=True"}
_UPDATE_MASK = Method("Buffer.low_latency_update_mask_buffer", names={**_NO_MASKS, "rank": "rank_to_mask"})
_QUERY_MASK = Method("Buffer.low_latency_query_mask_buffer", names={**_NO_MASKS, "out": "mask_status"})
_CLEAN_MASK = Method("Buffer.low_latency_clean_mask_buffer", names=_NO_MASKS)


class Buffer:
    """Communication of one group of ranks. Collective to make, all or none: every rank calls it with the same arguments.

    Args:
        group: torch process group, perhaps smaller than the world, or None with ``comm``.
        num_nvl_bytes, num_rdma_bytes: budgets, never limits on tokens of high throughput; low latency needs
            ``num_rdma_bytes`` of ``get_low_latency_rdma_size_hint``.
        low_latency_mode: enables the low-latency methods; high throughput works as well.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: accepted, without effect on one node.
        explicitly_destroy: the caller will call ``destroy``.
        enable_shrink: enables rank masks.
        comm: mpi4py communicator, used when ``group`` is None.
    """

    num_sms: int = 20

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, low_latency_mode: bool = False,
                 num_qps_per_rank: int = 24, allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
                 use_fabric: bool = False, explicitly_destroy: bool = False, enable_shrink: bool = False,
                 comm: Any = None) -> None:
        self.runtime: Optional[Runtime] = None
        self._warned = False
        self.explicitly_destroy = explicitly_destroy
        if group is None and comm is None:
            raise ValueError("Buffer: group = None, allowed: a torch process group, or an mpi4py communicator as comm")
        self.group = group if group is not None else comm
        self.num_nvl_bytes = operator.index(num_nvl_bytes)
        self.num_rdma_bytes = operator.index(num_rdma_bytes)
        self.low_latency_mode = low_latency_mode
        self.enable_shrink = enable_shrink
        self.nvshmem_qp_depth = _qp_depth()
        self.runtime = Runtime(self.group, self.num_nvl_bytes, self.num_rdma_bytes, low_latency_mode, enable_shrink)
        self.rank: int = self.runtime.rank
        self.group_size: int = self.runtime.num_ranks

    # ---- the end

    def destroy(self) -> None:
        """Releases everything; later calls raise StateError. Idempotent. Waits for peers a short time at most."""
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            runtime.destroy()

    def __del__(self) -> None:
        runtime = self.__dict__.pop("runtime", None)
        if runtime is None:
            return
        try:
            if runtime.forget() and self.explicitly_destroy:
                logger.warning("Buffer: dropped without destroy(), though explicitly_destroy was given")
        except Exception:  # the interpreter may be half gone
            pass

    def _alive(self, method: Method) -> Runtime:
        if self.runtime is None or self.runtime.engine is None:
            raise method.not_now("the Buffer is destroyed")
        return self.runtime

    def _low_latency(self, method: Method) -> Runtime:
        if not self.low_latency_mode:
            raise method.not_now("the Buffer was made without low_latency_mode=True")
        return self._alive(method)

    def _note_ids(self, engine: Any) -> None:
        if engine.device >= 0:
            return  # the host would have to wait for the count
        if not self._warned and engine._native.ids_out_of_range:
            self._warned = True
            logger.warning("Buffer: topk_idx has ids below -1 or beyond the experts (%d so far); they count as -1. "
                           "ANYEP_CHECK=1 names the first.", engine._native.ids_out_of_range)

    # ---- configurations, hints, events

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Read as "FP8 works"."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs (threads on CPU ranks) of later default configurations, 1 or more."""
        if operator.index(new_num_sms) < 1:
            raise _SET_NUM_SMS.refuse("new_num_sms", new_num_sms, "1 or more")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """V1's table; an unlisted number takes the entry of the largest listed one below it."""
        return dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """V1's table; an unlisted number takes the entry of the largest listed one below it."""
        return combine_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int,
                                       num_experts: int) -> int:
        """V1's number, to the byte."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @staticmethod
    def capture() -> EventOverlap:
        """An event of everything before it."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> torch.cuda.Stream:
        """UnsupportedError on CPU ranks."""
        return self._alive(_COMM_STREAM).get_comm_stream()

    def get_local_buffer_tensor(self, dtype: torch.dtype, size: Optional[torch.Size] = None, offset: int = 0,
                                use_rdma_buffer: bool = False) -> Tensor:
        """View of the Buffer's own payload memory from **byte** ``offset`` on; may be zeroed while nothing is in flight."""
        tensor = self._alive(_VIEW).get_local_buffer_tensor(dtype, offset, use_rdma_buffer)
        if size is None:
            return tensor
        count = math.prod(size)
        if count > tensor.numel():
            raise _VIEW.refuse("size", list(size), f"at most {tensor.numel()} elements behind offset {offset}")
        return tensor[:count].view(size)

    @staticmethod
    def _unpack_bias(bias: Any) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        return high_throughput.unpack_bias(bias)

    # ---- high throughput

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, previous_event: Previous = None,
                            async_finish: bool = False, allocate_on_comm_stream: bool = False
                            ) -> Tuple[Tensor, Optional[Tensor], Tensor, Tensor, EventOverlap]:
        """Local. What ``dispatch`` wants to know of this rank's ``topk_idx`` [T, K].

        Returns:
            num_tokens_per_rank int32 [R], None (one node), num_tokens_per_expert int32 [E], is_token_in_rank bool [T, R],
            event.
        """
        with _LAYOUT.call(self._alive(_LAYOUT)) as engine:
            if engine.device >= 0:
                place = gpu.place_of(_LAYOUT, self.runtime, previous_event, async_finish, allocate_on_comm_stream)
                return gpu.layout(_LAYOUT, engine, place, topk_idx, _LAYOUT.number("num_experts", num_experts))
            after = high_throughput.check_events(_LAYOUT, previous_event, async_finish, allocate_on_comm_stream)
            for event in after:
                event.wait()
            counts, pairs, token_in_rank = engine.layout(topk_idx, _LAYOUT.number("num_experts", num_experts))
            return counts, None, pairs, token_in_rank, EventOverlap(EventHandle() if async_finish else None)

    def dispatch(self, x: Union[Tensor, Tuple[Tensor, Tensor]], handle: Optional[Handle] = None,
                 num_tokens_per_rank: Optional[Tensor] = None, num_tokens_per_rdma_rank: Optional[Tensor] = None,
                 is_token_in_rank: Optional[Tensor] = None, num_tokens_per_expert: Optional[Tensor] = None,
                 topk_idx: Optional[Tensor] = None, topk_weights: Optional[Tensor] = None, expert_alignment: int = 1,
                 num_worst_tokens: int = 0, config: Optional[Config] = None, previous_event: Previous = None,
                 async_finish: bool = False, allocate_on_comm_stream: bool = False
                 ) -> Tuple[Union[Tensor, Tuple[Tensor, Tensor]], Optional[Tensor], Optional[Tensor], Optional[List[int]],
                            Optional[Tuple[Tensor, ...]], EventOverlap]:
        """Sends each token once to every rank that hosts one of its experts. Collective.

        Args:
            x: [T, H] of any type, row bytes a multiple of 16, or (data of one-byte elements, scales [T, any] float32 or int32
                of any strides).
            handle: of an earlier dispatch: same routing again; the arguments from ``num_tokens_per_rank`` to
                ``num_worst_tokens`` are ignored, ``topk_idx`` and ``topk_weights`` must be None.
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of ``get_dispatch_layout``.
            topk_idx, topk_weights: [T, K] int64 or int32 global ids, -1 = unused, and float32; both or neither.
            expert_alignment: rounds the numbers of the count list up.
            num_worst_tokens: rows of the outputs, so that nobody has to wait for their number; 0 = exact.
            config: None = ``get_dispatch_config``; ``num_sms`` counts.

        Returns:
            recv_x [N, H] (or with scales [N, any]), recv_topk_idx [N, K] local ids (-1 = other ranks'), recv_topk_weights
            float32 [N, K], count list of L ints, handle, event. Rows are ordered by (source rank, source token). Cached: only
            the first and the last are not None.
        """
        with high_throughput.DISPATCH.call(self._alive(high_throughput.DISPATCH)) as engine:
            num_sms = high_throughput.num_sms_of(high_throughput.DISPATCH, config, Buffer.num_sms)
            if engine.device >= 0:
                place = gpu.place_of(high_throughput.DISPATCH, self.runtime, previous_event, async_finish,
                                     allocate_on_comm_stream)
                if handle is not None:
                    high_throughput.must_be_cached(topk_idx, topk_weights)
                    return gpu.cached_dispatch(self.runtime, engine, place, x, handle, num_sms)
                return gpu.routed_dispatch(self.runtime, engine, place, x,
                                           (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert), topk_idx,
                                           topk_weights, expert_alignment, num_worst_tokens, num_sms)
            after = high_throughput.check_events(high_throughput.DISPATCH, previous_event, async_finish,
                                                 allocate_on_comm_stream)
            send = high_throughput.Send(engine, num_sms, after, async_finish, self.runtime)
            if handle is not None:
                return send.cached(x, handle, topk_idx, topk_weights)
            layout = (num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
            received = send.routed(x, layout, topk_idx, topk_weights, expert_alignment, num_worst_tokens)
            self._note_ids(engine)
            return received

    def combine(self, x: Tensor, handle: Handle, topk_weights: Optional[Tensor] = None,
                bias: Union[None, Tensor, Tuple[Optional[Tensor], Optional[Tensor]]] = None, config: Optional[Config] = None,
                previous_event: Previous = None, async_finish: bool = False, allocate_on_comm_stream: bool = False
                ) -> Tuple[Tensor, Optional[Tensor], EventOverlap]:
        """Sums every token's rows over the ranks that received it, unweighted, in float32, rounded once. Collective.

        Args:
            x: [N, H] bfloat16, float16 or float32 in the order of dispatch.
            topk_weights: [N, any] float32, summed likewise.
            bias: one [T, H] of x's type, or two of them, each of which may be None.

        Returns:
            combined_x [T, H], combined_topk_weights float32 [T, any] or None, event.
        """
        with high_throughput.COMBINE.call(self._alive(high_throughput.COMBINE)) as engine:
            num_sms = high_throughput.num_sms_of(high_throughput.COMBINE, config, Buffer.num_sms)
            if engine.device >= 0:
                place = gpu.place_of(high_throughput.COMBINE, self.runtime, previous_event, async_finish,
                                     allocate_on_comm_stream)
                return gpu.combine(engine, place, x, handle, topk_weights, bias, num_sms)
            after = high_throughput.check_events(high_throughput.COMBINE, previous_event, async_finish,
                                                 allocate_on_comm_stream)
            return high_throughput.combine(engine, x, handle, topk_weights, bias, num_sms, after, async_finish)

    def internode_dispatch(self, x: Union[Tensor, Tuple[Tensor, Tensor]], handle: Optional[Handle] = None,
                           num_tokens_per_rank: Optional[Tensor] = None, num_tokens_per_rdma_rank: Optional[Tensor] = None,
                           is_token_in_rank: Optional[Tensor] = None, num_tokens_per_expert: Optional[Tensor] = None,
                           topk_idx: Optional[Tensor] = None, topk_weights: Optional[Tensor] = None,
                           expert_alignment: int = 1, num_worst_tokens: int = 0, config: Optional[Config] = None,
                           previous_event: Previous = None, async_finish: bool = False,
                           allocate_on_comm_stream: bool = False) -> Any:
        """``dispatch``, which serves any number of nodes."""
        return self.dispatch(x, handle, num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank,
                             num_tokens_per_expert, topk_idx, topk_weights, expert_alignment, num_worst_tokens, config,
                             previous_event, async_finish, allocate_on_comm_stream)

    def internode_combine(self, x: Tensor, handle: Handle, topk_weights: Optional[Tensor] = None,
                          bias: Union[None, Tensor, Tuple[Optional[Tensor], Optional[Tensor]]] = None,
                          config: Optional[Config] = None, previous_event: Previous = None, async_finish: bool = False,
                          allocate_on_comm_stream: bool = False) -> Any:
        """``combine``, which serves any number of nodes."""
        return self.combine(x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream)

    # ---- low latency

    def low_latency_dispatch(self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int,
                             cumulative_local_expert_recv_stats: Optional[Tensor] = None,
                             dispatch_wait_recv_cost_stats: Optional[Tensor] = None, use_fp8: bool = True,
                             round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
                             return_recv_hook: bool = False
                             ) -> Tuple[Union[Tensor, Tuple[Tensor, Tensor]], Tensor, Tuple[Any, ...], EventOverlap,
                                        Optional[Callable[[], None]]]:
        """Tokens straight into one slab per local expert. Collective.

        Args:
            x: bfloat16 [T <= M, H]. topk_idx: [T, K] int64 or int32 global ids, -1 = unused.
            num_max_dispatch_tokens_per_rank, num_experts: M and E, equal on all ranks.
            cumulative_local_expert_recv_stats: int32 [L], counts are added. dispatch_wait_recv_cost_stats: int64 [R],
                nanoseconds waited for each source are added.
            use_fp8: float8_e4m3fn with a float32 scale per 128 elements; round_scale: powers of two; use_ue8m0: those, packed.
            return_recv_hook: return when the data is on its way; calling the hook does the rest.

        Returns:
            recv_x bfloat16 [L, R*M, H], or (float8_e4m3fn, scales [L, R*M, ceil(H/128)] float32 or [L, R*M, ceil(H/512)]
            int32, token fastest); recv_count int32 [L]; handle; event; hook or None.
        """
        method = low_latency.DISPATCH
        with method.call(self._low_latency(method)) as engine:
            low_latency.check_finish(method, async_finish, return_recv_hook)
            wire = low_latency.wire_of(use_fp8, round_scale, use_ue8m0)
            max_tokens = method.number("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
            num_experts = method.number("num_experts", num_experts)
            received, waited = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
            slabs, event, hook = low_latency.run(
                method, self.runtime, engine._low_latency_dispatch,
                (x, topk_idx, num_experts, max_tokens, wire, use_fp8 and round_scale, return_recv_hook, None, received, waited,
                 0.0, (), engine.device < 0 and not async_finish),
                (x, topk_idx, received, waited), async_finish, return_recv_hook)
            self._note_ids(engine)
            packed, scales, counts, source, layout_range, rows = slabs
            low_latency.keep_rows(engine, source, layout_range, rows)
            handle = (source, layout_range, max_tokens, x.shape[1], num_experts)
            return (packed if scales is None else (packed, scales)), counts, handle, event, hook

    def low_latency_combine(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Handle, use_logfmt: bool = False,
                            zero_copy: bool = False, async_finish: bool = False, return_recv_hook: bool = False,
                            out: Optional[Tensor] = None, combine_wait_recv_cost_stats: Optional[Tensor] = None
                            ) -> Tuple[Tensor, EventOverlap, Optional[Callable[[], None]]]:
        """The weighted sum of every token's expert rows. Collective.

        Args:
            x: bfloat16 [L, R*M, H], rows where dispatch put them. topk_idx, topk_weights: as given to dispatch, [T, K].
            use_logfmt: 10 bits per element on the way; H a multiple of 128; not with zero_copy.
            zero_copy: the rows lie in ``get_next_low_latency_combine_buffer``.
            out: bfloat16 [T, H] to fill.

        Returns:
            combined_x bfloat16 [T, H], event, hook or None.
        """
        method = low_latency.COMBINE
        with method.call(self._low_latency(method)) as engine:
            low_latency.check_finish(method, async_finish, return_recv_hook)
            source, layout_range, max_tokens, _, num_experts = low_latency_handle(method, handle)
            rows = low_latency.rows_of(engine, source, layout_range, max_tokens, topk_idx)
            waited = combine_wait_recv_cost_stats
            combined, event, hook = low_latency.run(
                method, self.runtime, engine._low_latency_combine,
                (x, topk_idx, topk_weights, (source, layout_range, rows), num_experts, max_tokens, "logfmt" if use_logfmt else "bf16",
                 zero_copy, return_recv_hook, out, waited, 0.0, (), engine.device < 0 and not async_finish),
                (x, topk_idx, topk_weights, source, layout_range, rows, waited), async_finish, return_recv_hook)
            self._note_ids(engine)
            return combined, event, hook

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """bfloat16 [L, R*M, H] in the Buffer's memory, for ``low_latency_combine(..., zero_copy=True)``."""
        with low_latency.COMBINE_BUFFER.call(self._low_latency(low_latency.COMBINE_BUFFER)) as engine:
            return low_latency.combine_buffer(engine, handle)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """A barrier of the ranks that are not masked. Never required here."""
        with _CLEAN.call(self._low_latency(_CLEAN)) as engine:
            engine.barrier()

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Local. True: neither send to the rank nor wait for it; False (the default!): ask it to come back."""
        with _UPDATE_MASK.call(self._alive(_UPDATE_MASK)) as engine:
            if mask:
                engine.mask(rank_to_mask)
            else:
                engine.unmask(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Local. Fills int32 [R]: 1 = masked."""
        with _QUERY_MASK.call(self._alive(_QUERY_MASK)) as engine:
            low_latency.query_masks(engine, mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Local. Unmasks every masked rank."""
        with _CLEAN_MASK.call(self._alive(_CLEAN_MASK)) as engine:
            for rank, masked in enumerate(engine.masks()):
                if masked:
                    engine.unmask(rank)


_COMM_STREAM = Method("Buffer.get_comm_stream")


def _qp_depth() -> int:
    """Of upstream's transport; limits nothing here."""
    try:
        return int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
    except ValueError:
        return 1024
