"""anyep.Engine and anyep.torch on one rank of several."""

from __future__ import annotations

import pytest
import torch

import anyep
from anyep.torch import ExpertParallel, local_experts

import dense
from checks_high_throughput import batch, check_combined, check_received, experts_of
from dense import assert_bits


def high_throughput(me):
    engine, everything = me.engine, batch(me, 80)
    mine = everything[me.rank]
    assert engine.device == me.device.index
    stream = torch.cuda.Stream()
    for more in ({}, {"wait": True}, {"stream": stream}, {"stream": stream.cuda_stream}):
        stream.wait_stream(torch.cuda.current_stream())
        handle = engine.route(mine.ids, experts_of(me), **more)
        rows, event = engine.dispatch(mine.x, handle, experts=mine.ids, weights=mine.weights, **more)
        back = engine.combine(rows.x, handle, weights=rows.weights, **more)
        torch.cuda.current_stream().wait_event(event)
        torch.cuda.current_stream().wait_stream(stream)
        check_received(me, everything, (rows.x, rows.experts, rows.weights, None, None, None))
        check_combined(me, everything, (back.x, back.weights, None))
        back.event.synchronize()
        assert back.event.query() and event.done()
    expected = dense.received(everything, experts_of(me), me.rank)
    assert handle.num_rows == expected.x.shape[0] and handle.pairs_per_expert() == expected.pairs
    rows_until, place, source, tokens = arrays = handle.arrays()
    assert_bits(source[:handle.num_rows].long(), expected.source, "source")
    assert tokens.tolist() == [each.x.shape[0] for each in everything]
    adopted = engine.adopt(*arrays)
    again = engine.dispatch(mine.x, adopted, num_rows=handle.num_rows).rows.x
    assert_bits(again, expected.x, "rows by an adopted handle")
    check_combined(me, everything, (engine.combine(again, adopted).x, None, None))
    for array in engine.layout(mine.ids, experts_of(me)):
        assert array.device == me.device
    engine.barrier()


def low_latency(me):
    import checks_low_latency as low

    engine, everything = me.engine, low.batch(me, 81)
    mine = everything[me.rank]
    for hook in (False, True):
        sent = engine.low_latency_dispatch(mine.x, mine.ids, low.experts_of(me), low.M, hook=hook)
        if hook:
            sent.receive()
        slabs = sent.result
        low.check_dispatched(me, everything, (slabs.x, slabs.counts, (slabs.source, slabs.range, low.M, low.HIDDEN,
                                                                      low.experts_of(me)), low_event(), None), False)
        back = engine.low_latency_combine(low.answers(me, everything, slabs.x.shape), mine.ids, mine.weights, slabs,
                                          low.experts_of(me), low.M, hook=hook)
        if hook:
            back.receive()
        low.check_combined(me, everything, back.result)


def low_event():
    from deep_ep import EventOverlap

    return EventOverlap(None)


def wrong_devices(me):
    engine, everything = me.engine, batch(me, 82)
    mine = everything[me.rank]
    handle = engine.route(mine.ids, experts_of(me))
    with pytest.raises(anyep.ArgumentError, match=rf"x = .*GPU {me.device.index}") as caught:
        engine.dispatch(mine.x.cpu(), handle)
    assert caught.value.argument == "x"
    with pytest.raises(anyep.ArgumentError, match="experts"):
        engine.route(mine.ids.cpu(), experts_of(me))
    with pytest.raises(anyep.ArgumentError, match="CPU"):
        with anyep.Engine.create(None, rows_bytes=8 << 20) as cpu:
            cpu.route(mine.ids, experts_of(me))
    engine.dispatch(mine.x, handle)


class Expert(torch.nn.Module):
    def __init__(self, index, hidden):
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        self.one = torch.nn.Parameter((torch.randn(hidden, 48, generator=generator) / hidden**0.5).cuda())
        self.two = torch.nn.Parameter((torch.randn(48, hidden, generator=generator) / 7).cuda())

    def forward(self, x):
        return torch.relu(x @ self.one) @ self.two


def autograd(me):
    """A layer's result and gradients equal those of all experts in one process."""
    hidden, num_experts = 64, 4 * me.num_ranks
    everything = dense.inputs(83, me.num_ranks, (21, 13), hidden, num_experts, 3, dtype=torch.float32)
    mine = everything[me.rank]
    x, weights = mine.x.clone().requires_grad_(), mine.weights.clone().requires_grad_()
    layer = ExpertParallel([Expert(index, hidden) for index in local_experts(num_experts, me.num_ranks, me.rank)],
                           num_experts, me.engine)
    y = layer(x, mine.ids, weights)
    y.square().sum().backward()

    experts = [Expert(index, hidden) for index in range(num_experts)]
    for rank, each in enumerate(everything):
        dense_x, dense_weights = each.x.clone().requires_grad_(), each.weights.clone().requires_grad_()
        dense_y = sum(expert(dense_x) * (dense_weights * (each.ids == index)).sum(dim=1, keepdim=True)
                      for index, expert in enumerate(experts))
        dense_y.square().sum().backward()
        if rank == me.rank:
            close = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(y, dense_y, **close)
            torch.testing.assert_close(x.grad, dense_x.grad, **close)
            torch.testing.assert_close(weights.grad, dense_weights.grad, rtol=1e-4, atol=1e-3)
    for index, expert in zip(local_experts(num_experts, me.num_ranks, me.rank), layer.experts):
        for name in ("one", "two"):
            torch.testing.assert_close(getattr(expert, name).grad, getattr(experts[index], name).grad, rtol=1e-3, atol=1e-3)
