"""deep_ep's high throughput on one rank of several: each function runs on all of them."""

from __future__ import annotations

import time

import pytest
import torch

import anyep
from deep_ep import Buffer, Config, EventHandle, EventOverlap

import dense
from dense import assert_bits

HIDDEN, TOP_K = 1024, 4
SLEEP_CYCLES = 400_000_000  # a fifth of a second and more


def experts_of(me):
    return 8 * me.num_ranks


def batch(me, seed, tokens=(96, 61), **more):
    return dense.inputs(seed, me.num_ranks, tokens, HIDDEN, experts_of(me), TOP_K, **more)


def send(me, everything, buffer=None, **more):
    """layout + dispatch of this rank's inputs."""
    buffer = buffer or me.buffer
    mine = everything[me.rank]
    counts, nodes, pairs, token_in_rank, event = buffer.get_dispatch_layout(mine.ids, experts_of(me))
    assert nodes is None and event.event is None
    x = more.pop("x", mine.x)
    return buffer.dispatch(x, num_tokens_per_rank=counts, is_token_in_rank=token_in_rank, num_tokens_per_expert=pairs,
                           topk_idx=mine.ids, topk_weights=mine.weights, **more)


def check_received(me, everything, got, rows=None):
    x, ids, weights, _, handle, _ = got
    expected = dense.received(everything, experts_of(me), me.rank)
    count = expected.x.shape[0]
    assert x.shape[0] == (count if rows is None else rows)
    assert_bits(x[:count], expected.x, "recv_x")
    assert_bits(ids[:count], expected.ids, "recv_topk_idx")
    assert_bits(weights[:count], expected.weights, "recv_topk_weights")
    assert bool((ids[count:] == -1).all())
    if handle is not None:
        prefix = [int((expected.source_rank <= source).sum()) for source in range(me.num_ranks)]
        assert handle[0].shape == (me.num_ranks, me.num_ranks)
        assert handle[0][:, me.rank].tolist() == prefix
        assert handle[3].shape[0] == x.shape[0]
        assert_bits(handle[3][:count].long(), expected.source, "recv_src_idx")
        assert_bits(handle[5] >= 0, handle[4], "send_head against is_token_in_rank")
    return expected


def check_combined(me, everything, got):
    x, weights, _ = got
    mine = everything[me.rank]
    assert_bits(x, dense.combined(everything, experts_of(me), me.rank, lambda rows, _: rows), "combined_x")
    if weights is not None:
        valid = (mine.ids >= 0) & (mine.ids < experts_of(me))
        assert_bits(weights, torch.where(valid, mine.weights, 0.0), "combined_topk_weights")


def layout(me):
    everything = batch(me, 1)
    mine = everything[me.rank]
    first = torch.randint(0, experts_of(me), ((1 << 15) + 1, 1), device="cuda")
    many = (first + torch.arange(3, device="cuda")) % experts_of(me)
    many = torch.where(torch.rand(many.shape, device="cuda") < 0.1, -1, many)
    for ids in (mine.ids, many, many[:-1], many[:4097], many[:513], many[:1], many[:0]):  # one cluster counts up to 1 << 15
        counts, nodes, pairs, token_in_rank, _ = me.buffer.get_dispatch_layout(ids, experts_of(me))
        expected = dense.in_rank(ids, experts_of(me), me.num_ranks)
        assert nodes is None
        assert_bits(token_in_rank, expected, "is_token_in_rank")
        assert counts.tolist() == expected.sum(dim=0).tolist()
        assert pairs.tolist() == torch.bincount(ids[ids >= 0], minlength=experts_of(me)).tolist()
    *_, event = me.buffer.get_dispatch_layout(mine.ids, experts_of(me), async_finish=True)
    assert event.event is not None
    event.current_stream_wait()


def exact(me, dtype, tokens, ids_dtype="int64"):
    everything = batch(me, 2, tokens, dtype=getattr(torch, dtype), ids_dtype=getattr(torch, ids_dtype))
    got = send(me, everything, expert_alignment=16)
    expected = check_received(me, everything, got)
    assert got[3] == [(pairs + 15) // 16 * 16 for pairs in expected.pairs]
    assert got[5].event is None
    if dtype in ("bfloat16", "float16", "float32"):
        check_combined(me, everything, me.buffer.combine(got[0], got[4], topk_weights=got[2]))


def with_scales(me):
    everything = batch(me, 3, dtype=torch.int8)
    mine = everything[me.rank]
    payload = [each.x.view(torch.float8_e4m3fn) for each in everything]
    scales = [torch.rand(7, each.x.shape[0], device="cuda", generator=torch.Generator("cuda").manual_seed(rank)).t()
              for rank, each in enumerate(everything)]  # the token is fastest: any strides
    (x, got_scales), ids, weights, _, handle, _ = send(me, everything, x=(payload[me.rank], scales[me.rank]))
    expected = dense.received([each._replace(x=bits) for each, bits in zip(everything, payload)], experts_of(me), me.rank)
    assert_bits(x.view(torch.uint8), expected.x.view(torch.uint8), "recv_x")
    rows = torch.stack([scales[int(rank)][int(token)] for rank, token in zip(expected.source_rank, expected.source)]) \
        if x.shape[0] else scales[0][:0]
    assert got_scales.is_contiguous()
    assert_bits(got_scales, rows.contiguous(), "scales")
    (again, again_scales), *_ = me.buffer.dispatch((payload[me.rank], scales[me.rank]), handle=handle)
    assert_bits(again.view(torch.uint8), x.view(torch.uint8), "cached recv_x")
    assert_bits(again_scales, got_scales, "cached scales")
    assert mine.x.shape[1] == x.shape[1]


def cached(me):
    everything = batch(me, 4)
    x, ids, weights, counts, handle, _ = send(me, everything)
    kept = [tensor.clone() for tensor in handle]
    for form in (handle, list(handle), tuple(tensor.clone() for tensor in handle),
                 tuple(tensor.cpu().to(me.device) for tensor in handle)):
        more = everything[me.rank].x * 2
        again = me.buffer.dispatch(more, handle=form)
        assert again[1:5] == (None, None, None, None)
        assert_bits(again[0], x * 2, "cached recv_x")
        check_combined(me, everything, me.buffer.combine(x, form))
    for index, (tensor, before) in enumerate(zip(handle, kept)):
        assert_bits(tensor, before, f"handle[{index}] after its use")
    mine = everything[me.rank].x
    bias = torch.ones_like(mine)
    got, _, _ = me.buffer.combine(x, handle, bias=(bias, None))
    expected = dense.combined(everything, experts_of(me), me.rank, lambda rows, _: rows)
    torch.testing.assert_close(got.float(), expected.float() + 1, rtol=1e-2, atol=1e-2)


def worst_tokens(me):
    everything = batch(me, 5)
    rows = sum(each.x.shape[0] for each in everything) + 5
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    mine = everything[me.rank]
    layout_of = me.buffer.get_dispatch_layout(mine.ids, experts_of(me))
    torch.cuda._sleep(SLEEP_CYCLES)
    done.record()
    begin = time.perf_counter()
    got = me.buffer.dispatch(mine.x, num_tokens_per_rank=layout_of[0], is_token_in_rank=layout_of[3],
                             num_tokens_per_expert=layout_of[2], topk_idx=mine.ids, topk_weights=mine.weights,
                             num_worst_tokens=rows)
    again = me.buffer.dispatch(mine.x, handle=got[4])
    dispatched = not done.query()
    host_s = time.perf_counter() - begin
    sums = me.buffer.combine(got[0], got[4])
    assert got[3] == []
    check_received(me, everything, got, rows)
    count = dense.received(everything, experts_of(me), me.rank).x.shape[0]
    assert_bits(again[0][:count], got[0][:count], "cached recv_x")
    check_combined(me, everything, sums)
    assert dispatched, f"dispatch waited on the host ({host_s:.3f} s)"


def ahead(me):
    """Rows move before the host knows how many come, at some ranks and not at others, for guesses too small and large."""
    gpu = me.buffer.runtime.engine._gpu
    try:
        for call, tokens in enumerate([(96, 61), (0, 700), (900, 1), (0, 0), (3, 2), (0, 40), (700, 700), (1, 900)] * 2):
            gpu.__dict__.pop("rows_ahead", None)
            if (call + me.rank) % 3 == 0:
                gpu.rows_ahead = lambda *parts: [None] * len(parts)  # no room in the window
            everything = batch(me, 50 + call, tokens)
            got = send(me, everything)
            check_received(me, everything, got)
            check_combined(me, everything, me.buffer.combine(got[0], got[4], topk_weights=got[2]))
    finally:
        gpu.__dict__.pop("rows_ahead", None)


def combine_does_not_wait(me):
    """Neither with a handle that comes back as the tensors that it was, nor with copies of them, which the host never reads."""
    everything = batch(me, 14)
    got = send(me, everything)
    waited = []
    for handle in (got[4], tuple(tensor.clone() for tensor in got[4])):
        me.buffer.combine(got[0], handle)
        torch.cuda.synchronize()
        done = torch.cuda.Event()
        torch.cuda._sleep(SLEEP_CYCLES)
        done.record()
        sums = me.buffer.combine(got[0], handle)
        waited.append(done.query())
        check_combined(me, everything, sums)
    return any(waited)


def streams(me):
    buffer, everything = me.buffer, batch(me, 6)
    mine = everything[me.rank]
    assert buffer.get_comm_stream() is buffer.get_comm_stream()
    for previous in (EventOverlap(None), Buffer.capture(), EventHandle(), None):
        for on_comm in (False, True):
            if on_comm and (previous is None or isinstance(previous, EventOverlap) and previous.event is None):
                continue
            layout_of = buffer.get_dispatch_layout(mine.ids, experts_of(me), previous_event=previous, async_finish=True,
                                                   allocate_on_comm_stream=on_comm)
            got = buffer.dispatch(mine.x, num_tokens_per_rank=layout_of[0], is_token_in_rank=layout_of[3],
                                  num_tokens_per_expert=layout_of[2], topk_idx=mine.ids, topk_weights=mine.weights,
                                  previous_event=layout_of[4], async_finish=True, allocate_on_comm_stream=on_comm)
            assert got[5].event is not None
            with got[5]:
                pass
            check_received(me, everything, got)
            sums = buffer.combine(got[0], got[4], topk_weights=got[2], previous_event=Buffer.capture(), async_finish=True)
            sums[2].current_stream_wait(release_handle=True)
            assert sums[2].event is None
            check_combined(me, everything, sums)
            once = buffer.combine(got[0], got[4], previous_event=Buffer.capture())  # synchronous, after an event
            assert once[2].event is None
            check_combined(me, everything, once)
    with torch.cuda.stream(buffer.get_comm_stream()):
        got = send(me, everything, async_finish=True)
        check_received(me, everything, got)
    torch.cuda.current_stream().wait_stream(buffer.get_comm_stream())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        check_received(me, everything, send(me, everything, config=Config(num_sms=7)))
        assert torch.cuda.current_stream() == side
    torch.cuda.current_stream().wait_stream(side)
    with pytest.raises(anyep.ArgumentError, match="allocate_on_comm_stream"):
        buffer.combine(got[0], got[4], allocate_on_comm_stream=True)


def graphs(me):
    """Two graphs, with other routing at every replay, and eager calls between."""
    buffer = me.buffer
    made = []
    for seed in (7, 8):
        everything = batch(me, seed)
        mine = everything[me.rank]
        rows = sum(each.x.shape[0] for each in everything)
        fixed = dense.Inputs(*(tensor.clone() for tensor in mine))
        graph = torch.cuda.CUDAGraph()

        def step(fixed=fixed, rows=rows):
            counts, _, pairs, there, _ = buffer.get_dispatch_layout(fixed.ids, experts_of(me))
            got = buffer.dispatch(fixed.x, num_tokens_per_rank=counts, is_token_in_rank=there, num_tokens_per_expert=pairs,
                                  topk_idx=fixed.ids, topk_weights=fixed.weights, num_worst_tokens=rows)
            return got, buffer.combine(got[0], got[4], topk_weights=got[2]), buffer.dispatch(fixed.x, handle=got[4])

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            result = step()
        made.append((graph, fixed, rows, result))
    for seed in (7, 8, 9, 10):
        everything = batch(me, seed)
        for graph, fixed, rows, result in made:
            for tensor, value in zip(fixed, everything[me.rank]):
                tensor.copy_(value)
            graph.replay()
            check_received(me, everything, (*result[0][:4], None, None), rows)
            check_combined(me, everything, result[1])
            expected = dense.received(everything, experts_of(me), me.rank)
            assert_bits(result[2][0][:expected.x.shape[0]], expected.x, "cached recv_x")
            check_received(me, everything, send(me, everything))


def exact_size_in_a_capture(me):
    everything = batch(me, 11)
    mine = everything[me.rank]
    counts, _, pairs, there, _ = me.buffer.get_dispatch_layout(mine.ids, experts_of(me))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ones(1, device="cuda")
        with pytest.raises(anyep.UnsupportedError, match="num_worst_tokens"):
            me.buffer.dispatch(mine.x, num_tokens_per_rank=counts, is_token_in_rank=there, num_tokens_per_expert=pairs,
                               topk_idx=mine.ids, topk_weights=mine.weights)
    check_received(me, everything, send(me, everything))


def wrong_devices(me):
    everything = batch(me, 12)
    mine = everything[me.rank]
    x, ids, weights, _, handle, _ = send(me, everything)
    refused = [("x", lambda: me.buffer.dispatch(mine.x.cpu(), handle=handle)),
               (r"handle\[5\]", lambda: me.buffer.dispatch(mine.x, handle=(*handle[:5], handle[5].cpu()))),
               ("topk_idx", lambda: me.buffer.get_dispatch_layout(mine.ids.cpu(), experts_of(me))),
               ("x", lambda: me.buffer.combine(x.cpu(), handle))]
    if torch.cuda.device_count() > 1:
        other = torch.device("cuda", (me.device.index + 1) % torch.cuda.device_count())
        refused.append(("x", lambda: me.buffer.combine(x.to(other), handle)))
    for name, call in refused:
        with pytest.raises(anyep.ArgumentError, match=rf"{name} = .*allowed: .*GPU {me.device.index}"):
            call()
    assert torch.cuda.current_device() == me.device.index
    check_combined(me, everything, me.buffer.combine(x, handle))


def destroyed(me):
    """What a Buffer returned outlives it."""
    everything = batch(me, 13)
    other = Buffer(me.group, 16 << 20)
    x, ids, weights, _, handle, _ = send(me, everything, buffer=other)
    other.destroy()
    other.destroy()
    check_received(me, everything, (x, ids, weights, None, handle, None))
    with pytest.raises(anyep.StateError):
        other.combine(x, handle)
    del x, handle, other
