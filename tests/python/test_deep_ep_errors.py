"""Bad inputs through deep_ep: the class, the argument in V1's words, the value, the rule; peers that learn; nothing kept."""

from __future__ import annotations

import gc
import sys
import threading
import time
from typing import Any, Callable, Dict

import pytest

torch = pytest.importorskip("torch")

import deep_ep  # noqa: E402
from deep_ep import ArgumentError, Buffer, CapacityError, Config, EventHandle, EventOverlap, StateError  # noqa: E402
from ranks import run  # noqa: E402

H, K, E, M, T = 64, 2, 4, 8, 6
HINT = Buffer.get_low_latency_rdma_size_hint(M, H, 2, E)


def make_buffer(comm: Any, **arguments: Any) -> Buffer:
    return Buffer(None, 1 << 20, HINT, low_latency_mode=True, comm=comm, **arguments)


class World:
    """A Buffer, arguments that are right, and results of each operation with them."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.buffer = make_buffer(comm, enable_shrink=True)
        self.ids = torch.arange(T * K).view(T, K) % E
        self.weights = torch.ones((T, K))
        self.x = torch.randn((T, H)).bfloat16()
        counts, _, pairs, in_rank, _ = self.buffer.get_dispatch_layout(self.ids, E)
        self.dispatch: Dict[str, Any] = dict(
            x=self.x, num_tokens_per_rank=counts, num_tokens_per_expert=pairs, is_token_in_rank=in_rank, topk_idx=self.ids,
            topk_weights=self.weights)
        self.rows, _, self.row_weights, _, self.handle, _ = self.buffer.dispatch(**self.dispatch)
        self.combine: Dict[str, Any] = dict(x=self.rows, handle=self.handle, topk_weights=self.row_weights)
        self.ll_dispatch: Dict[str, Any] = dict(x=self.x, topk_idx=self.ids, num_max_dispatch_tokens_per_rank=M, num_experts=E,
                                                use_fp8=False)
        self.slab, _, self.ll_handle, _, _ = self.buffer.low_latency_dispatch(**self.ll_dispatch)
        self.ll_combine: Dict[str, Any] = dict(x=self.slab, topk_idx=self.ids, topk_weights=self.weights, handle=self.ll_handle)
        self.layout: Dict[str, Any] = dict(topk_idx=self.ids, num_experts=E)

    def call(self, method: str, changes: Dict[str, Any]) -> Any:
        right = {"dispatch": self.dispatch, "combine": self.combine, "low_latency_dispatch": self.ll_dispatch,
                 "low_latency_combine": self.ll_combine, "get_dispatch_layout": self.layout}[method]
        arguments = {name: value for name, value in {**right, **changes}.items()}
        return getattr(self.buffer, method)(**arguments)

    def works(self) -> None:
        """Nothing that was refused has done harm."""
        assert torch.equal(self.buffer.dispatch(**self.dispatch)[0], self.rows)
        assert torch.equal(self.buffer.low_latency_dispatch(**self.ll_dispatch)[2][1], self.ll_handle[1])


def replaced(handle: Any, index: int, value: Any) -> list:
    parts = list(handle)
    parts[index] = value
    return parts


# method, what is wrong with it (of a World), class, argument in the text, value in the text, rule in the text
ROWS: Dict[str, Any] = {
    # 14, 15, 17, 18: ids
    "ids of float32": ("dispatch", lambda w: dict(topk_idx=w.ids.float()), ArgumentError, "topk_idx.dtype", "float32",
                       "int32, int64"),
    "ids of int16": ("get_dispatch_layout", lambda w: dict(topk_idx=w.ids.short()), ArgumentError, "topk_idx.dtype", "int16",
                     "int32, int64"),
    "LL ids of int8": ("low_latency_dispatch", lambda w: dict(topk_idx=w.ids.to(torch.int8)), ArgumentError, "topk_idx.dtype",
                       "int8", "int32, int64"),
    "ids 1-D": ("get_dispatch_layout", lambda w: dict(topk_idx=w.ids[0]), ArgumentError, "topk_idx", "[2]", "2 dimensions"),
    "ids 3-D": ("dispatch", lambda w: dict(topk_idx=w.ids[None]), ArgumentError, "topk_idx", "[1, 6, 2]", "[any, any]"),
    "ids with gaps": ("get_dispatch_layout", lambda w: dict(topk_idx=w.ids.t().contiguous().t()), ArgumentError,
                      "topk_idx.strides", "[1, 6]", "row-major"),
    "no experts": ("get_dispatch_layout", lambda w: dict(num_experts=0), ArgumentError, "num_experts", "0", "1.."),
    "negative experts": ("low_latency_dispatch", lambda w: dict(num_experts=-3), ArgumentError, "num_experts", "-3", "1.."),
    "experts above the limit": ("low_latency_dispatch", lambda w: dict(num_experts=1 << 20), ArgumentError, "num_experts",
                                "1048576", "1.."),
    "top-k 0": ("get_dispatch_layout", lambda w: dict(topk_idx=w.ids[:, :0].contiguous()), ArgumentError, "top", "0", "1..4"),
    "top-k above the experts": ("low_latency_dispatch", lambda w: dict(topk_idx=w.ids.repeat(1, 3)), ArgumentError,
                                "topk_idx.shape[1]", "6", "1..4"),
    # 26: more tokens than the maximum
    "more tokens than M": ("low_latency_dispatch", lambda w: dict(num_max_dispatch_tokens_per_rank=T - 1), CapacityError,
                           "num_max_dispatch_tokens_per_rank", "6", "5"),
    # 27: numbers of tokens that differ
    "fewer weights": ("dispatch", lambda w: dict(topk_weights=w.weights[1:]), ArgumentError, "topk_weights.shape", "[5, 2]",
                      "[6, 2]"),
    "fewer rows": ("dispatch", lambda w: dict(x=w.x[1:]), ArgumentError, "x.shape[0]", "5", "6"),
    "fewer scales": ("dispatch", lambda w: dict(x=(w.x.to(torch.float8_e4m3fn), torch.ones(T - 1, 1))), ArgumentError,
                     "scales.shape", "[5, 1]", "[6, 1]"),
    "fewer ids": ("dispatch", lambda w: dict(topk_idx=w.ids[1:], topk_weights=w.weights[1:]), ArgumentError,
                  "is_token_in_rank.shape", "[6, 2]", "[5, 2]"),
    # 28: rows
    "hidden 0": ("dispatch", lambda w: dict(x=w.x[:, :0]), ArgumentError, "x.shape[1]", "0", "1 or more"),
    "hidden 12": ("dispatch", lambda w: dict(x=w.x[:, :12].contiguous()), ArgumentError, "x.shape[1]", "12", "multiple of 16"),
    "LL hidden 12": ("low_latency_dispatch", lambda w: dict(x=w.x[:, :12].contiguous()), ArgumentError, "x.shape[1]", "12",
                     "a multiple of 8"),
    "LL FP8 hidden 24": ("low_latency_dispatch", lambda w: dict(x=w.x[:, :24].contiguous(), use_fp8=True), ArgumentError,
                         "x.shape[1]", "24", "a multiple of 16"),
    # 28, 48: beyond the budget
    "M beyond the budget": ("low_latency_dispatch", lambda w: dict(num_max_dispatch_tokens_per_rank=65536), CapacityError,
                            "num_rdma_bytes", "", "room for"),
    # 30: types
    "LL x of float32": ("low_latency_dispatch", lambda w: dict(x=w.x.float()), ArgumentError, "x.dtype", "float32", "bfloat16"),
    "scales with bfloat16": ("dispatch", lambda w: dict(x=(w.x, torch.ones(T, 1))), ArgumentError, "scales", "bfloat16",
                             "one byte"),
    "scales of float64": ("dispatch", lambda w: dict(x=(w.x.to(torch.float8_e4m3fn), torch.ones(T, 1).double())), ArgumentError,
                          "scales.dtype", "float64", "float32, int32"),
    "scales 1-D": ("dispatch", lambda w: dict(x=(w.x.to(torch.float8_e4m3fn), torch.ones(T))), ArgumentError, "scales.shape",
                   "[6]", "[any, any]"),
    # 33: weights
    "weights of float16": ("dispatch", lambda w: dict(topk_weights=w.weights.half()), ArgumentError, "topk_weights.dtype",
                           "float16", "float32"),
    # 36
    "alignment 0": ("dispatch", lambda w: dict(expert_alignment=0), ArgumentError, "expert_alignment", "0", "1 or more"),
    "alignment -1": ("dispatch", lambda w: dict(expert_alignment=-1), ArgumentError, "expert_alignment", "-1", "1 or more"),
    # arguments that V1 wants together
    "no layout": ("dispatch", lambda w: dict(num_tokens_per_rank=None), ArgumentError, "num_tokens_per_rank", "None", "tensor"),
    "no routing": ("dispatch", lambda w: dict(is_token_in_rank=None), ArgumentError, "is_token_in_rank", "None", "tensor"),
    "ids alone": ("dispatch", lambda w: dict(topk_weights=None), ArgumentError, "topk_weights", "None", "both"),
    "weights alone": ("dispatch", lambda w: dict(topk_idx=None), ArgumentError, "topk_idx", "None", "both"),
    "ids with a handle": ("dispatch", lambda w: dict(handle=w.handle), ArgumentError, "topk_idx", "a tensor", "None"),
    "worst without ids": ("dispatch", lambda w: dict(num_worst_tokens=20, topk_idx=None, topk_weights=None), ArgumentError,
                          "num_worst_tokens", "20", "0 without"),
    "worst negative": ("dispatch", lambda w: dict(num_worst_tokens=-1), ArgumentError, "num_worst_tokens", "-1", "0 or more"),
    "counts of int64": ("dispatch", lambda w: dict(num_tokens_per_rank=w.dispatch["num_tokens_per_rank"].long()), ArgumentError,
                        "num_tokens_per_rank", "int64", "int32"),
    "counts of experts of int64": ("dispatch", lambda w: dict(num_tokens_per_expert=w.dispatch["num_tokens_per_expert"].long()),
                                   ArgumentError, "num_tokens_per_expert.dtype", "int64", "int32"),
    "routing of int32": ("dispatch", lambda w: dict(is_token_in_rank=w.dispatch["is_token_in_rank"].int()), ArgumentError,
                         "is_token_in_rank.dtype", "int32", "bool"),
    "on the comm stream without an event": ("dispatch", lambda w: dict(allocate_on_comm_stream=True, async_finish=True,
                                                                       previous_event=EventOverlap(None)),
                                            ArgumentError, "allocate_on_comm_stream", "True", "previous_event"),
    "on the comm stream and synchronous": ("combine", lambda w: dict(allocate_on_comm_stream=True, previous_event=EventHandle()),
                                           ArgumentError, "allocate_on_comm_stream", "True", "async_finish"),
    # 37, 43: handles
    "handle of other tokens": ("dispatch", lambda w: dict(handle=w.handle, x=w.x[1:], topk_idx=None, topk_weights=None),
                               ArgumentError, "x.shape[0]", "5", "6"),
    "handle of another group": ("combine", lambda w: dict(handle=replaced(w.handle, 0, torch.zeros((3, 3), dtype=torch.int32))),
                                ArgumentError, "handle[0]", "", "int32 [R, R]"),
    "handle truncated": ("combine", lambda w: dict(handle=w.handle[:5]), ArgumentError, "len(handle)", "5", "6"),
    "handle of low latency": ("combine", lambda w: dict(handle=w.ll_handle), ArgumentError, "len(handle)", "5", "6"),
    "handle[0] of int64": ("combine", lambda w: dict(handle=replaced(w.handle, 0, w.handle[0].long())), ArgumentError,
                           "handle[0]", "", "int32"),
    "handle[0] falls": ("combine", lambda w: dict(handle=replaced(w.handle, 0, -w.handle[0])), ArgumentError, "handle[0]",
                        "-", ""),
    "handle[1] other": ("combine", lambda w: dict(handle=replaced(w.handle, 1, w.handle[1] * 0)), ArgumentError, "handle[", "",
                        ""),
    "handle[3] short": ("combine", lambda w: dict(handle=replaced(w.handle, 3, w.handle[3][1:])), ArgumentError, "handle[3]", "",
                        ""),
    "handle[3] out of range": ("combine", lambda w: dict(handle=replaced(w.handle, 3, w.handle[3] + 10**6)), ArgumentError,
                               "handle[3]", "", "ascending"),
    "handle[4] other": ("combine", lambda w: dict(handle=replaced(w.handle, 4, ~w.handle[4])), ArgumentError, "handle[4]", "",
                        "handle[5]"),
    "handle[5] out of range": ("combine", lambda w: dict(handle=replaced(w.handle, 5, torch.where(w.handle[4], 10**6, -1).int())),
                               ArgumentError,
                               "handle[5]", "", ""),
    "LL handle[0] of int64": ("low_latency_combine", lambda w: dict(handle=replaced(w.ll_handle, 0, w.ll_handle[0].long())),
                              ArgumentError, "handle[0].dtype", "int64", "int32"),
    "LL handle[1] of another shape": ("low_latency_combine", lambda w: dict(handle=replaced(w.ll_handle, 1, w.ll_handle[1][1:])),
                                      ArgumentError, "handle[1].shape", "[1, 2]", "[2, 2]"),
    "LL handle of another M": ("low_latency_combine", lambda w: dict(handle=replaced(w.ll_handle, 2, M + 1)), ArgumentError,
                               "x.shape", "[2, 16, 64]", "[2, 18, 64]"),
    "LL handle truncated": ("low_latency_combine", lambda w: dict(handle=w.ll_handle[:4]), ArgumentError, "len(handle)", "4",
                            "5"),
    # 44, 45: combine
    "a row less": ("combine", lambda w: dict(x=w.rows[1:], topk_weights=None), ArgumentError, "x.shape[0]", "", "the rows"),
    "weights of another count": ("combine", lambda w: dict(topk_weights=w.row_weights[1:]), ArgumentError, "topk_weights.shape",
                                 "", ""),
    "combine of int32": ("combine", lambda w: dict(x=w.rows.view(torch.int32)), ArgumentError, "x.dtype", "int32", "bfloat16"),
    "bias of another type": ("combine", lambda w: dict(bias=w.x.float()), ArgumentError, "bias[0].dtype", "float32", "bfloat16"),
    "bias of another shape": ("combine", lambda w: dict(bias=(None, w.x[1:])), ArgumentError, "bias[1].shape", "[5, 64]",
                              "[6, 64]"),
    "three biases": ("combine", lambda w: dict(bias=(w.x, w.x, w.x)), ArgumentError, "bias", "tuple of 3", "two"),
    "out of another shape": ("low_latency_combine", lambda w: dict(out=w.x[1:]), ArgumentError, "out.shape", "[5, 64]",
                             "[6, 64]"),
    "out of another type": ("low_latency_combine", lambda w: dict(out=w.x.float()), ArgumentError, "out.dtype", "float32",
                            "bfloat16"),
    "out in x": ("low_latency_combine", lambda w: dict(out=w.slab[0, :T]), ArgumentError, "out", "overlaps", "its own"),
    # 47: zero copy
    "zero copy of another shape": ("low_latency_combine", lambda w: dict(zero_copy=True, x=w.slab[:, 1:]), ArgumentError,
                                   "x.shape", "[2, 15, 64]", "[2, 16, 64]"),
    "logfmt and zero copy": ("low_latency_combine", lambda w: dict(zero_copy=True, use_logfmt=True), ArgumentError, "", "", ""),
    "logfmt of hidden 64": ("low_latency_combine", lambda w: dict(use_logfmt=True), ArgumentError, "x.shape[2]", "64",
                            "multiple of 128"),
    # 40
    "no SMs": ("dispatch", lambda w: dict(config=Config(0)), ArgumentError, "config.num_sms", "0", "1 or more"),
    # options that exclude each other
    "hook and async": ("low_latency_dispatch", lambda w: dict(async_finish=True, return_recv_hook=True), ArgumentError,
                       "async_finish", "True", "return_recv_hook"),
    "ue8m0 without rounding": ("low_latency_dispatch", lambda w: dict(use_fp8=True, use_ue8m0=True), ArgumentError, "use_ue8m0",
                               "True", "round_scale"),
    # 51: statistics
    "statistics of int64": ("low_latency_dispatch", lambda w: dict(cumulative_local_expert_recv_stats=torch.zeros(2).long()),
                            ArgumentError, "cumulative_local_expert_recv_stats.dtype", "int64", "int32"),
    "statistics of another size": ("low_latency_dispatch",
                                   lambda w: dict(cumulative_local_expert_recv_stats=torch.zeros(3).int()),
                                   ArgumentError, "cumulative_local_expert_recv_stats.shape", "[3]", "[2]"),
    "waits [R, R]": ("low_latency_dispatch", lambda w: dict(dispatch_wait_recv_cost_stats=torch.zeros(2, 2).long()),
                     ArgumentError, "dispatch_wait_recv_cost_stats.shape", "[2, 2]", "[2]"),
    "waits of float": ("low_latency_combine", lambda w: dict(combine_wait_recv_cost_stats=torch.zeros(2)), ArgumentError,
                       "combine_wait_recv_cost_stats.dtype", "float32", "int64"),
    # 62: what is no tensor, or none that can be read
    "x a list": ("dispatch", lambda w: dict(x=[[1.0]]), (TypeError, ArgumentError), "x", "list", ""),
    "x None": ("low_latency_dispatch", lambda w: dict(x=None), TypeError, "x", "NoneType", "tensor"),
    "ids a list": ("dispatch", lambda w: dict(topk_idx=[[0, 1]]), TypeError, "topk_idx", "list", "tensor"),
    "ids None": ("low_latency_dispatch", lambda w: dict(topk_idx=None), TypeError, "topk_idx", "NoneType", "tensor"),
    "layout a list": ("dispatch", lambda w: dict(num_tokens_per_rank=[1, 2]), TypeError, "num_tokens_per_rank", "list", "tensor"),
    "combine of an object": ("combine", lambda w: dict(x=object()), TypeError, "x", "object", "tensor"),
    "combine of a sparse tensor": ("combine", lambda w: dict(x=w.rows.float().to_sparse()), ArgumentError, "x", "", ""),
    "HT x sparse": ("dispatch", lambda w: dict(x=w.x.float().to_sparse()), ArgumentError, "x", "", "strid"),
    "HT x of int64 with gaps": ("dispatch", lambda w: dict(x=w.x.long().t().contiguous().t()), ArgumentError, "x", "[1, 6]",
                                "rows without gaps"),
    "HT x of int64 and 3-D": ("dispatch", lambda w: dict(x=w.x.long()[None]), ArgumentError, "x", "[1, 6, 64]", "2 dimensions"),
    "HT x with gaps": ("dispatch", lambda w: dict(x=w.x.t().contiguous().t()), ArgumentError, "x.strides", "[1, 6]",
                       "without gaps"),
    "x on meta": ("low_latency_dispatch", lambda w: dict(x=w.x.to("meta")), ArgumentError, "x", "", "CPU"),
    "HT x on meta": ("dispatch", lambda w: dict(x=w.x.to("meta")), ArgumentError, "x", "", "CPU"),
    "x 0-D": ("dispatch", lambda w: dict(x=torch.tensor(1.0)), ArgumentError, "x", "[]", "dimensions"),
    "ids 0-D": ("get_dispatch_layout", lambda w: dict(topk_idx=torch.tensor(1)), ArgumentError, "topk_idx", "[]", "dimensions"),
    "x a tuple of 3": ("dispatch", lambda w: dict(x=(w.x, w.x, w.x)), ArgumentError, "x", "tuple of 3", "(data, scales)"),
    "handle a dict": ("combine", lambda w: dict(handle={}), TypeError, "handle", "dict", "tuple"),
    "handle of None": ("combine", lambda w: dict(handle=[None] * 6), TypeError, "handle[0]", "NoneType", "tensor"),
    "handle with a float": ("low_latency_combine", lambda w: dict(handle=replaced(w.ll_handle, 2, 8.0)), TypeError, "handle[2]",
                            "float", "int"),
    "another event": ("dispatch", lambda w: dict(previous_event=object()), TypeError, "previous_event", "object",
                      "EventOverlap"),
    "an unknown keyword": ("low_latency_dispatch", lambda w: dict(use_nvfp4=True), TypeError, "use_nvfp4", "", "unexpected"),
    "experts a string": ("get_dispatch_layout", lambda w: dict(num_experts="4"), TypeError, "num_experts", "str", "int"),
    "M a string": ("low_latency_dispatch", lambda w: dict(num_max_dispatch_tokens_per_rank="8"), TypeError,
                   "num_max_dispatch_tokens_per_rank", "str", "int"),
    "M beyond 32 bits": ("low_latency_dispatch", lambda w: dict(num_max_dispatch_tokens_per_rank=2**70), ArgumentError,
                         "num_max_dispatch_tokens_per_rank", f"{2**70}", "32 bits"),
    "handle with a number beyond": ("low_latency_combine", lambda w: dict(handle=replaced(w.ll_handle, 4, 2**70)),
                                    ArgumentError, "handle[4]", f"{2**70}", "32 bits"),
}


def check(error: BaseException, method: str, argument: str, value: str, rule: str) -> None:
    text = str(error)
    if isinstance(error, deep_ep.Error):
        assert text.startswith(f"Buffer.{method}: "), text
        for word in ("routing.", "shape.num", "shape.h", "options.", "budget.", "in.x", "x.x"):  # the library's own names
            assert word not in text, text
    if isinstance(error, ArgumentError) and argument:
        assert argument in error.argument and error.argument in text and "allowed: " in text, text
    for part in (argument, value, rule):
        assert part in text, (part, text)


def test_each_bad_input_is_refused_in_words_and_harms_nobody():
    """All ranks make the same mistake, so that the Buffer goes on: afterwards everything still works."""
    def body(comm):
        world = World(comm)
        wrong = []
        for name, (method, change, kind, argument, value, rule) in ROWS.items():
            try:
                world.call(method, change(world))
                wrong.append(f"{name}: nothing was raised")
            except kind as error:
                try:
                    check(error, method, argument, value, rule)
                except AssertionError as differs:
                    wrong.append(f"{name}: {differs}")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
        assert not wrong, "\n".join(wrong)
        world.works()
        world.buffer.destroy()

    run(2, body)


@pytest.mark.parametrize("name", ["fewer rows", "ids alone", "x a list", "handle truncated", "handle[3] out of range",
                                  "hook and async", "more tokens than M", "LL x of float32", "x None", "M a string"])
def test_the_peers_of_a_mistake_learn_of_it(name):
    """On one rank only: the other does not wait for the limit of 100 s, and reads the reason."""
    method, change, kind, *_ = ROWS[name]

    def body(comm):
        world = World(comm)
        comm.allgather(None)
        if comm.Get_rank() == 0:
            with pytest.raises(kind) as caught:
                world.call(method, change(world))
            reason = str(caught.value)
        else:
            with pytest.raises(deep_ep.PeerDeadError) as caught:
                world.call(method, {})
            assert caught.value.peers == [0] and caught.value.code == "aborted"
            reason = str(caught.value)
        texts = comm.allgather(reason)
        assert texts[0].split(": ", 1)[-1].split(",")[0][:30] in texts[1], texts
        del world.buffer  # not destroy(): that would report the failed group again

    run(2, body, timeout_s=20)


def test_references_are_unchanged_by_a_refusal():
    """Row 62: whatever is refused, no argument is kept."""
    def body(comm):
        world = World(comm)
        x, ids, weights = world.x, world.ids, world.weights
        gc.collect()
        before = [sys.getrefcount(tensor) for tensor in (x, ids, weights)]
        for method, change, kind, *_ in ROWS.values():
            try:
                world.call(method, change(world))
            except kind:
                pass
        gc.collect()
        assert [sys.getrefcount(tensor) for tensor in (x, ids, weights)] == before
        world.buffer.destroy()

    run(1, lambda comm: None)
    run(2, body)


# ---- what is legal (rows 21, 23, 24, 25, 31, 32, 34)


LEGAL: Dict[str, Callable[[World], Dict[str, Any]]] = {
    "all ids -1": lambda w: dict(topk_idx=torch.full_like(w.ids, -1)),
    "one expert": lambda w: dict(topk_idx=torch.zeros_like(w.ids)),
    "no tokens": lambda w: dict(x=w.x[:0], topk_idx=w.ids[:0]),
    "int32 ids": lambda w: dict(topk_idx=w.ids.int()),
    "as many choices as experts": lambda w: dict(topk_idx=w.ids.repeat(1, 2)),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_extremes(name):
    def body(comm):
        world = World(comm)
        changes = LEGAL[name](world)
        ids = changes["topk_idx"]
        x = changes.get("x", world.x)
        weights = torch.ones(ids.shape)
        counts, _, pairs, in_rank, _ = world.buffer.get_dispatch_layout(ids, E)
        rows, got, got_weights, _, handle, _ = world.buffer.dispatch(x, None, counts, None, in_rank, pairs, ids, weights)
        assert rows.shape[0] == got.shape[0] == 2 * int(in_rank[:, comm.Get_rank()].sum()) and rows.shape[1] == H
        assert world.buffer.combine(rows, handle, got_weights)[0].shape == x.shape
        slab, _, handle, _, _ = world.buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False)
        assert world.buffer.low_latency_combine(slab, ids, weights, handle)[0].shape == x.shape
        world.buffer.destroy()

    run(2, body)


# ---- state (rows 42, 47, 49, 52, 55, 56, 57)


def test_low_latency_needs_its_mode_and_masks_their_feature():
    def body(comm):
        world = World(comm)
        plain = Buffer(None, 0, 1 << 20, comm=comm)
        status = torch.zeros(2, dtype=torch.int32)
        for call in (lambda: plain.low_latency_dispatch(**world.ll_dispatch),
                     lambda: plain.low_latency_combine(**world.ll_combine),
                     lambda: plain.get_next_low_latency_combine_buffer(world.ll_handle),
                     lambda: plain.clean_low_latency_buffer(M, H, E)):
            with pytest.raises(StateError, match="low_latency_mode=True"):
                call()
        for call in (lambda: plain.low_latency_update_mask_buffer(1, True), lambda: plain.low_latency_query_mask_buffer(status),
                     lambda: plain.low_latency_clean_mask_buffer()):
            with pytest.raises(StateError, match="enable_shrink=True"):
                call()
        for rank in (-1, 2, comm.Get_rank()):
            with pytest.raises(ArgumentError, match=r"^Buffer.low_latency_update_mask_buffer: rank_to_mask = "):
                world.buffer.low_latency_update_mask_buffer(rank, True)
        for wrong in (status.long(), torch.zeros(3, dtype=torch.int32)):
            with pytest.raises(ArgumentError, match=r"^Buffer.low_latency_query_mask_buffer: mask_status."):
                world.buffer.low_latency_query_mask_buffer(wrong)
        plain.destroy()
        world.buffer.destroy()

    run(2, body)


def test_zero_copy_without_the_buffer():
    def body(comm):
        world = World(comm)
        with pytest.raises(StateError, match=r"^Buffer.low_latency_combine: .*get_next_low_latency_combine_buffer"):
            world.call("low_latency_combine", dict(zero_copy=True))
        world.buffer.destroy()

    run(2, body)


def test_two_threads_in_one_buffer():
    def body(comm):
        world = World(comm)
        if comm.Get_rank() == 0:
            other = threading.Thread(target=lambda: world.call("dispatch", {}))  # waits for rank 1
            other.start()
            while not world.buffer.runtime.entered.locked():
                time.sleep(0.001)
            for call in (lambda: world.call("dispatch", {}), lambda: world.call("low_latency_dispatch", {}),
                         lambda: world.buffer.low_latency_clean_mask_buffer()):
                with pytest.raises(StateError, match="another thread is inside"):
                    call()
            comm.allgather(None)
            other.join()
        else:
            comm.allgather(None)
            world.call("dispatch", {})
        world.works()
        world.buffer.destroy()

    run(2, body)


# ---- checked mode (rows 19, 39)


def test_checked_mode_names_the_id_and_the_count(monkeypatch):
    monkeypatch.setenv("ANYEP_CHECK", "1")

    def body(comm):
        world = World(comm)
        wrong = world.ids.clone()
        wrong[3, 1] = 2**32 + 3
        for method, word in (("dispatch", "topk_idx[3, 1]"), ("low_latency_dispatch", "topk_idx[3, 1]"),
                             ("low_latency_combine", "topk_idx[3, 1]")):
            with pytest.raises(ArgumentError) as caught:
                world.call(method, dict(topk_idx=wrong))
            assert caught.value.argument == word and f"{2**32 + 3}, allowed: -1..3" in str(caught.value)
        for name in ("num_tokens_per_rank", "num_tokens_per_expert"):
            with pytest.raises(ArgumentError) as caught:
                world.call("dispatch", {name: world.dispatch[name] + 1})
            assert caught.value.argument.startswith(name)
        with pytest.raises(ArgumentError, match=r"is_token_in_rank\["):
            world.call("dispatch", dict(is_token_in_rank=~world.dispatch["is_token_in_rank"]))
        world.works()
        world.buffer.destroy()

    run(2, body)


def test_contradicting_counts_are_memory_safe():
    """Without the checks: an error of this or a later call, or results that nobody can use; never a fault."""
    def body(comm):
        world = World(comm)
        try:
            world.call("dispatch", dict(num_tokens_per_expert=world.dispatch["num_tokens_per_expert"] * 1000,
                                        is_token_in_rank=torch.ones_like(world.dispatch["is_token_in_rank"])))
            world.buffer.combine(world.rows, world.handle)
        except deep_ep.Error:
            pass

    run(2, body)
