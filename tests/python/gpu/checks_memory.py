"""Outputs lie in the engine's window and behave as all of torch's tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist

import dense
from checks_high_throughput import HIDDEN, SLEEP_CYCLES, batch, check_received, experts_of, send
from dense import assert_bits


def in_window(me, tensor):
    return in_window_of(me.buffer, tensor)


def in_window_of(buffer, tensor):
    """Does it lie among the bytes that `memory` shows? Budgets of the tests are large: the window has not grown."""
    memory = buffer.runtime.engine.memory("high_throughput", 0, 1)
    return 0 <= tensor.data_ptr() - memory.data_ptr() < 128 << 20


def lie_in_the_window(me):
    everything = batch(me, 20)
    got = send(me, everything)
    assert got[0].shape[0] == 0 or in_window(me, got[0]), "recv_x is ordinary memory"
    assert not in_window(me, got[1]) and not in_window(me, got[2])
    assert type(got[0]) is torch.Tensor and got[0].is_contiguous()


def record_stream_is_honoured(me):
    """A user on another stream, noted by record_stream: the memory goes to nobody before it is done."""
    everything = batch(me, 21)
    x, _, _, _, handle, _ = send(me, everything)
    address, expected, rows = x.data_ptr(), x.clone(), x.shape[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        seen = x.clone()
    x.record_stream(side)
    del x
    more = -everything[me.rank].x
    others = [me.buffer.dispatch(more, handle=handle)[0] for _ in range(8)]
    assert rows == 0 or all(other.data_ptr() != address for other in others), "memory in use was handed out"
    torch.cuda.current_stream().wait_stream(side)
    assert_bits(seen, expected, "what the other stream has read")


def unfinished_work_keeps_memory(me):
    """Freed while its own stream is busy: another stream does not get it."""
    everything = batch(me, 22)
    mine = everything[me.rank]
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    _, _, _, _, handle, _ = send(me, everything)
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        x = me.buffer.dispatch(mine.x, handle=handle)[0]
        expected = x.clone()
        torch.cuda._sleep(SLEEP_CYCLES)
        seen = x.clone()
        address, rows = x.data_ptr(), x.shape[0]
        del x
    with torch.cuda.stream(two):
        others = [me.buffer.dispatch(-mine.x, handle=handle)[0] for _ in range(8)]
    assert rows == 0 or all(other.data_ptr() != address for other in others), "memory in use was handed out"
    torch.cuda.synchronize()
    assert_bits(seen, expected, "what the first stream has read")


def freed_memory_is_used_again(me):
    """On the same stream at once: the window does not fill up."""
    everything = batch(me, 23)
    _, _, _, _, handle, _ = send(me, everything)
    addresses = set()
    for _ in range(50):
        addresses.add(me.buffer.dispatch(everything[me.rank].x, handle=handle)[0].data_ptr())
    assert len(addresses) <= 4, f"{len(addresses)} places for one live tensor"


def rows_are_cut_to_size(me):
    """Made for as many as may come; what is not needed is free again when the call returns."""
    import deep_ep

    buffer = deep_ep.Buffer(me.group, 128 << 20)
    tokens = 4096 // me.num_ranks * me.num_ranks
    token = torch.arange(tokens, device=me.device)
    ids = (token % me.num_ranks * 8)[:, None].contiguous()
    x = (token % 251)[:, None].expand(-1, HIDDEN).to(torch.bfloat16)
    counts, _, pairs, there, _ = buffer.get_dispatch_layout(ids, experts_of(me))
    rest = []
    for _ in range(3):
        rows, got_ids, weights, _, _, _ = buffer.dispatch(
            x, num_tokens_per_rank=counts, is_token_in_rank=there, num_tokens_per_expert=pairs, topk_idx=ids,
            topk_weights=torch.ones(tokens, 1, device=me.device))
        expected = x[me.rank::me.num_ranks].repeat(me.num_ranks, 1)
        assert_bits(rows, expected, "rows")
        assert got_ids.shape == weights.shape == (tokens, 1) and bool((got_ids == 0).all()) and bool((weights == 1).all())
        rest.append(rows)
    if buffer.runtime.engine._gpu.pool._begin is not None and in_window_of(buffer, rest[0]):
        assert rest[0].untyped_storage().nbytes() == rest[0].nbytes, "the room that was not needed is held"
    for rows in rest:
        assert_bits(rows, x[me.rank::me.num_ranks].repeat(me.num_ranks, 1), "rows of an earlier call")
    del rest, rows
    buffer.destroy()


def rows_of_a_capture_go_to_nobody(me):
    everything = batch(me, 24)
    fixed = everything[me.rank].x.clone()
    x, _, _, _, handle, _ = send(me, everything)
    del x
    me.buffer.dispatch(fixed, handle=handle)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = me.buffer.dispatch(fixed, handle=handle)[0]
        kept = rows * 1
        begin, length = rows.data_ptr(), rows.numel() * rows.element_size()
        del rows
    for _ in range(20):
        other = me.buffer.dispatch(-fixed, handle=handle)[0]
        apart = other.data_ptr() + length <= begin or other.data_ptr() >= begin + length
        assert length == 0 or apart, "rows of a capture were handed out"
        graph.replay()
        expected = dense.received(everything, experts_of(me), me.rank).x
        assert_bits(kept, expected, "what the graph has read")
        assert_bits(other, -expected, "what the eager call gave")


def without_a_pool(me):
    """Ordinary tensors serve too, through one more copy."""
    pool = me.buffer.runtime.gpu.pool
    usable, kept = pool._usable, pool._pool
    pool._usable, pool._pool = False, None
    try:
        everything = batch(me, 25)
        got = send(me, everything)
        check_received(me, everything, got)
        assert not in_window(me, got[0])
    finally:
        pool._usable, pool._pool = usable, kept


def views_of_the_payload(me):
    """A caller may zero what get_local_buffer_tensor shows; later results are none the worse."""
    import deep_ep

    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(16, HIDDEN, me.num_ranks, experts_of(me))
    buffer = deep_ep.Buffer(me.group, 32 << 20, hint, low_latency_mode=True)
    everything = batch(me, 26)
    for rdma, have in ((False, 32 << 20), (True, hint)):
        view = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=rdma)
        assert view.device == me.device and view.numel() == have
        torch.cuda.synchronize()
        dist.barrier(me.group)
        view.zero_()
        torch.cuda.synchronize()
        dist.barrier(me.group)
        check_received(me, everything, send(me, everything, buffer=buffer))
    buffer.destroy()
