"""deep_ep's low latency on one rank of several."""

from __future__ import annotations

import time

import pytest
import torch

import anyep

import dense
from dense import assert_bits

HIDDEN, TOP_K, M = 1024, 4, 64


def experts_of(me):
    return 4 * me.num_ranks


def batch(me, seed, tokens=(17, 5), hidden=HIDDEN):
    return dense.inputs(seed, me.num_ranks, tokens, hidden, experts_of(me), TOP_K)


def rows_of(everything, num_experts, rank):
    """{local expert: [(source rank, token)]}, in order."""
    first, last = dense.block(num_experts, len(everything), rank)
    found = {}
    for expert in range(first, last):
        found[expert - first] = [(source, token) for source, mine in enumerate(everything)
                                 for token in (mine.ids == expert).any(dim=1).nonzero().flatten().tolist()]
    return found


def decoded(x, scales):
    """FP8 rows [.., H] with scales [.., P] float32, or packed UE8M0 in int32."""
    if scales.dtype == torch.int32:
        # Not contiguous(): that leaves the stride of a single column as it is.
        exponents = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).view(*scales.shape[:-1], -1)
        scales = (exponents.to(torch.int32) << 23).view(torch.float32)
    spread = scales[..., :-(-x.shape[-1] // 128)].repeat_interleave(128, dim=-1)[..., :x.shape[-1]]
    return x.float() * spread


def check_dispatched(me, everything, got, fp8):
    x, count, handle, event, _ = got
    assert event.event is None
    source, ranges, m, hidden, num_experts = handle
    scales = None
    if fp8:
        x, scales = x
        assert scales.stride(1) == 1 and x.dtype == torch.float8_e4m3fn
    for expert, rows in rows_of(everything, experts_of(me), me.rank).items():
        assert int(count[expert]) == len(rows)
        assert source[expert, :len(rows)].tolist() == [token for _, token in rows]
        begin = 0
        for rank in range(me.num_ranks):
            mine = sum(1 for origin, _ in rows if origin == rank)
            assert int(ranges[expert, rank]) == (begin << 32) | mine
            begin += mine
        if not rows:
            continue
        expected = torch.stack([everything[origin].x[token] for origin, token in rows])
        if fp8:
            torch.testing.assert_close(decoded(x[expert, :len(rows)], scales[expert, :len(rows)]), expected.float(),
                                       rtol=0.07, atol=0.02)
        else:
            assert_bits(x[expert, :len(rows)], expected, "packed_recv_x")
    assert (m, hidden, num_experts) == (M, everything[0].x.shape[1], experts_of(me))


def answers(me, everything, shape):
    """Every expert's answer to a token: the row times (expert + 1); garbage elsewhere."""
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    first, _ = dense.block(experts_of(me), me.num_ranks, me.rank)
    for expert, rows in rows_of(everything, experts_of(me), me.rank).items():
        for at, (origin, token) in enumerate(rows):
            out[expert, at] = everything[origin].x[token] * (first + expert + 1)
    return out


def check_combined(me, everything, got):
    mine = everything[me.rank]
    factors = torch.where(mine.ids >= 0, mine.weights * (mine.ids + 1), 0.0).double()
    terms = factors.unsqueeze(2) * mine.x.double().unsqueeze(1)
    expected = terms.sum(dim=1)
    bound = terms.abs().sum(dim=1) * 2**-6 + 1e-3
    assert got.dtype == torch.bfloat16 and got.shape == mine.x.shape
    off = (got.double() - expected).abs() > bound
    assert not bool(off.any()), f"{int(off.sum())} of {off.numel()} elements are off"


def dispatch(me, everything, **more):
    mine = everything[me.rank]
    return me.buffer.low_latency_dispatch(mine.x, mine.ids, M, experts_of(me), **more)


def combine(me, everything, x, handle, **more):
    mine = everything[me.rank]
    return me.buffer.low_latency_combine(x, mine.ids, mine.weights, handle, **more)


def pairs(me, wire):
    more = {"bf16": {"use_fp8": False}, "fp8": {}, "ue8m0": {"round_scale": True, "use_ue8m0": True}}[wire]
    for seed, tokens, hidden in ((30, (17, 5), HIDDEN), (31, (0, 64), HIDDEN), (32, (1, 1), 1536), (33, (64, 64), 512)):
        everything = batch(me, seed, tokens, hidden)
        stats = torch.zeros(4, dtype=torch.int32, device="cuda")
        waited = torch.zeros(me.num_ranks, dtype=torch.int64, device="cuda")
        got = dispatch(me, everything, cumulative_local_expert_recv_stats=stats, dispatch_wait_recv_cost_stats=waited, **more)
        assert got[4] is None and got[3].event is None
        check_dispatched(me, everything, got, wire != "bf16")
        assert_bits(stats, got[1], "statistics")
        slab = answers(me, everything, (4, me.num_ranks * M, hidden))
        x, event, hook = combine(me, everything, slab, got[2])
        assert event.event is None and hook is None
        check_combined(me, everything, x)
        out = torch.empty_like(x)
        again, event, _ = combine(me, everything, slab, list(got[2]), out=out, async_finish=True)
        event.current_stream_wait()
        assert again is out
        assert_bits(again, x, "combined_x of an asynchronous call")


def kept(me):
    """Handles and counts of many calls, whose memory is cut from common blocks, and some that end in between."""
    made = []
    for seed in range(40):
        everything = batch(me, 100 + seed, (3, 9), 512)
        got = dispatch(me, everything, use_fp8=seed % 2 == 0)
        if seed % 3 != 1:
            made.append((everything, got))
    for everything, got in made:
        check_dispatched(me, everything, got, isinstance(got[0], tuple))
        x, _, _ = combine(me, everything, answers(me, everything, (4, me.num_ranks * M, 512)), got[2])
        check_combined(me, everything, x)


def hooks(me):
    one, two = batch(me, 34), batch(me, 35)
    first, second = (dispatch(me, everything, use_fp8=False, return_recv_hook=True) for everything in (one, two))
    assert first[3].event is None
    with pytest.raises(anyep.StateError):
        dispatch(me, one, return_recv_hook=True)
    with pytest.raises(anyep.StateError):
        second[4]()
    first[4]()
    first[4]()
    second[4]()
    for everything, got in ((one, first), (two, second)):
        check_dispatched(me, everything, got, False)
        x, _, hook = combine(me, everything, answers(me, everything, got[0].shape), got[2], return_recv_hook=True)
        hook()
        check_combined(me, everything, x)


def zero_copy(me):
    everything = batch(me, 36)
    got = dispatch(me, everything, use_fp8=False)
    buffer = me.buffer.get_next_low_latency_combine_buffer(got[2])
    assert buffer.device == me.device and buffer.shape == got[0].shape
    assert buffer.data_ptr() == me.buffer.get_next_low_latency_combine_buffer(got[2]).data_ptr()
    buffer.copy_(answers(me, everything, got[0].shape))
    x, _, _ = combine(me, everything, buffer, got[2], zero_copy=True)
    check_combined(me, everything, x)


def log_format(me):
    everything = batch(me, 37)
    everything = [each._replace(x=each.x * 1e-3) for each in everything]
    got = dispatch(me, everything, use_fp8=False)
    slab = answers(me, everything, got[0].shape)
    exact, _, _ = combine(me, everything, slab, got[2])
    x, _, _ = combine(me, everything, slab, got[2], use_logfmt=True)
    torch.testing.assert_close(x.float(), exact.float(), rtol=0.1, atol=5e-4)


def graphs(me, wire, hook):
    """Odd numbers of pairs, two graphs, other routing at every replay, eager calls between."""
    made = []
    for length, seed in ((1, 38), (3, 39)):
        everything = batch(me, seed, (16, 16))
        fixed = dense.Inputs(*(tensor.clone() for tensor in everything[me.rank]))
        slab = torch.zeros(4, me.num_ranks * M, HIDDEN, dtype=torch.bfloat16, device="cuda")

        def step(fixed=fixed, slab=slab):
            got = me.buffer.low_latency_dispatch(fixed.x, fixed.ids, M, experts_of(me), use_fp8=wire == "fp8",
                                                 return_recv_hook=hook)
            if hook:
                got[4]()
            x, _, receive = me.buffer.low_latency_combine(slab, fixed.ids, fixed.weights, got[2], return_recv_hook=hook)
            if hook:
                receive()
            return got, x

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            me.buffer.clean_low_latency_buffer(M, HIDDEN, experts_of(me))
            results = [step() for _ in range(length)]
        made.append((graph, fixed, slab, results))
    for seed in (40, 41, 42):
        everything = batch(me, seed, (16, 16))
        for graph, fixed, slab, results in made:
            for tensor, value in zip(fixed, everything[me.rank]):
                tensor.copy_(value)
            slab.copy_(answers(me, everything, slab.shape))
            graph.replay()
            for got, x in results:
                check_dispatched(me, everything, got, wire == "fp8")
                check_combined(me, everything, x)
            check_dispatched(me, everything, dispatch(me, everything), True)


def switches_of_mode(me):
    import checks_high_throughput as high

    for seed in range(3):
        everything = high.batch(me, 50 + seed)
        got = high.send(me, everything)
        high.check_received(me, everything, got)
        me.buffer.clean_low_latency_buffer(M, HIDDEN, experts_of(me))
        few = batch(me, 60 + seed)
        check_dispatched(me, few, dispatch(me, few), True)
        high.check_combined(me, everything, me.buffer.combine(got[0], got[4]))


def masks(me):
    import deep_ep

    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(M, HIDDEN, me.num_ranks, experts_of(me))
    buffer = deep_ep.Buffer(me.group, 16 << 20, hint, low_latency_mode=True, enable_shrink=True)
    status = torch.full((me.num_ranks,), 7, dtype=torch.int32, device="cuda")
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * me.num_ranks
    everything = batch(me, 70)
    mine = everything[me.rank]
    check_dispatched(me, everything, buffer.low_latency_dispatch(mine.x, mine.ids, M, experts_of(me)), True)
    peer = (me.rank + 1) % me.num_ranks
    if me.num_ranks > 1:
        buffer.low_latency_update_mask_buffer(peer, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(rank == peer) for rank in range(me.num_ranks)]
    buffer.destroy()


def wrong_devices(me):
    everything = batch(me, 71)
    mine = everything[me.rank]
    with pytest.raises(anyep.ArgumentError, match="topk_idx = "):
        me.buffer.low_latency_dispatch(mine.x, mine.ids.cpu(), M, experts_of(me))
    check_dispatched(me, everything, dispatch(me, everything), True)


def host_time(me):
    """Microseconds of the host per call, medians; nothing is asserted but that there is no wait."""
    import checks_high_throughput as high

    few, many = batch(me, 72, (1, 1)), high.batch(me, 73)
    got = dispatch(me, few)
    slab = answers(me, few, (4, me.num_ranks * M, HIDDEN))
    x, _, _, _, handle, _ = high.send(me, many)
    rows = sum(each.x.shape[0] for each in many)
    mine = many[me.rank]
    layout = me.buffer.get_dispatch_layout(mine.ids, high.experts_of(me))
    calls = {
        "low_latency_dispatch": lambda: dispatch(me, few),
        "low_latency_combine": lambda: combine(me, few, slab, got[2]),
        "get_dispatch_layout": lambda: me.buffer.get_dispatch_layout(mine.ids, high.experts_of(me)),
        "dispatch, worst": lambda: me.buffer.dispatch(
            mine.x, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3], num_tokens_per_expert=layout[2],
            topk_idx=mine.ids, topk_weights=mine.weights, num_worst_tokens=rows),
        "dispatch, cached": lambda: me.buffer.dispatch(mine.x, handle=handle),
        "combine": lambda: me.buffer.combine(x, handle),
    }
    medians = {}
    for name, call in calls.items():
        times = []
        for at in range(300):
            if at % 20 == 0:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        medians[name] = round(1e6 * sorted(times)[len(times) // 2], 1)
        torch.cuda.synchronize()
    return medians
