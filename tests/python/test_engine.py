"""anyep.Engine: arrays of every library, rows and slabs, events, hooks, memory."""

from __future__ import annotations

import gc
import threading
import time

import numpy
import pytest
import torch
from engines import IDS, RANKS_OF, ROWS_BYTES, low_latency_budget, on_ranks, rows_expected, tokens_of

import anyep


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "uint8", "float8_e4m3fn"])
def test_rows_of_every_type_arrive_in_order(dtype):
    kind = getattr(torch, dtype)

    def body(engine):
        handle = engine.route(torch.tensor(IDS), 8)
        scales = torch.ones(5, 1) if dtype == "float8_e4m3fn" else None  # FP8 bytes without scales go as uint8
        rows, event = engine.dispatch(tokens_of(engine.rank, kind), handle, scales=scales)
        event.wait()
        return engine.rank, rows.x

    for rank, x in on_ranks(4, body):
        wanted = torch.stack([tokens_of(source, kind)[token] for source, token in rows_expected(rank)])
        assert x.dtype is kind
        assert torch.equal(x.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_ids_weights_scales_and_extra_travel(library, ids):
    make = torch.tensor if library == "torch" else numpy.array
    kind = torch.Tensor if library == "torch" else numpy.ndarray

    def body(engine):
        me = engine.rank
        experts = make(IDS, dtype=getattr(torch if library == "torch" else numpy, ids))
        weights = make([[me + token / 8, me + 0.5] for token in range(5)],
                       dtype=torch.float32 if library == "torch" else numpy.float32)
        scales = make([[token, me] for token in range(5)], dtype=weights.dtype)
        extra = make([[me, token, 7] for token in range(5)], dtype=torch.uint8 if library == "torch" else numpy.uint8)
        x = make([[me + 1] * 16] * 5, dtype=extra.dtype)
        handle = engine.route(experts, 8)
        rows = engine.dispatch(x, handle, scales=scales, experts=experts, weights=weights, extra=[extra]).rows
        assert all(isinstance(array, kind) for array in (rows.x, rows.scales, rows.experts, rows.weights, *rows.extra))
        assert rows.experts.dtype == experts.dtype
        return me, handle.num_rows, rows, handle.pairs_per_expert(), handle.pairs_per_expert(4)

    for me, num_rows, rows, pairs, aligned in on_ranks(4, body):
        wanted = rows_expected(me)
        assert num_rows == len(wanted)
        assert rows.extra[0].tolist() == [[source, token, 7] for source, token in wanted]
        assert rows.scales.tolist() == [[token, source] for source, token in wanted]
        local = [[expert - 2 * me if expert // 2 == me and expert >= 0 else -1 for expert in IDS[token]]
                 for _, token in wanted]
        assert rows.experts.tolist() == local
        assert rows.weights.tolist() == [
            [(source + token / 8) if local[row][0] >= 0 else 0.0, (source + 0.5) if local[row][1] >= 0 else 0.0]
            for row, (source, token) in enumerate(wanted)]
        flat = [expert for choices in IDS for expert in choices]
        assert pairs == [4 * flat.count(2 * me), 4 * flat.count(2 * me + 1)]
        assert aligned == [-(-count // 4) * 4 for count in pairs]


def test_combine_adds_over_ranks_with_weights_and_biases():
    def body(engine):
        handle = engine.route(torch.tensor(IDS), 8)
        rows = engine.dispatch(tokens_of(engine.rank, torch.float32), handle).rows
        weights = torch.full((handle.num_rows, 3), 0.25)
        bias = torch.full((5, 32), 100.0)
        got = engine.combine(rows.x, handle, weights=weights, bias=[None, bias])
        plain = engine.combine(rows.x, handle, out=torch.full((5, 32), -1.0))
        assert engine.combine(rows.x, handle, weights=weights, out_weights=got.weights).weights is got.weights
        return engine.rank, got, plain.x

    for rank, got, plain in on_ranks(4, body):
        times = torch.tensor([len(ranks) for ranks in RANKS_OF], dtype=torch.float32).reshape(5, 1)
        assert torch.equal(plain, tokens_of(rank, torch.float32) * times)
        assert torch.equal(got.x, plain + 100)
        assert torch.equal(got.weights, (times / 4).expand(5, 3))


def test_raw_elements_with_a_type_name_and_what_only_knows_dlpack():
    class OnlyDLPack:
        def __init__(self, tensor):
            self._tensor = tensor

        def __dlpack__(self, **arguments):
            return self._tensor.__dlpack__(**arguments)

        def __dlpack_device__(self):
            return self._tensor.__dlpack_device__()

    def body(engine):
        bits = tokens_of(engine.rank, torch.bfloat16).view(torch.uint16).numpy()
        handle = engine.route(numpy.array(IDS), 8)
        typed = engine.dispatch(anyep.Typed(bits, "bfloat16"), handle).rows.x
        summed = engine.combine(typed, handle).x
        foreign = engine.dispatch(OnlyDLPack(tokens_of(engine.rank, torch.float32)), handle).rows.x
        return engine.rank, typed, summed, foreign

    for rank, typed, summed, foreign in on_ranks(4, body):
        wanted = torch.stack([tokens_of(source, torch.bfloat16)[token] for source, token in rows_expected(rank)])
        assert typed.dtype == "bfloat16" and typed.array.dtype == numpy.uint16
        assert numpy.array_equal(typed.array, wanted.view(torch.uint16).numpy())
        assert numpy.array_equal(foreign, wanted.float().numpy())
        assert summed.dtype == "bfloat16"
        times = torch.tensor([len(ranks) for ranks in RANKS_OF]).reshape(5, 1)
        assert numpy.array_equal(summed.array, (tokens_of(rank, torch.bfloat16) * times).view(torch.uint16).numpy())


def test_handles_are_values():
    def body(engine):
        x = tokens_of(engine.rank, torch.float32)
        handle = engine.route(torch.tensor(IDS), 8)
        rows_until, place, source, tokens = handle.arrays(like=x)
        assert (rows_until.shape, place.shape, source.shape, tokens.tolist()) == ((4,), (5, 4), (handle.num_rows,), [5] * 4)
        assert [(s, t) for s in range(4) for t in range(5) if place.shape == (5, 4)][:1] == [(0, 0)]
        # A column of a matrix serves as rows_until.
        matrix = torch.zeros(4, 4, dtype=torch.int32)
        matrix[:, 1] = rows_until
        again = anyep.Handle.adopt(4, engine.rank, matrix[:, 1], place.clone(), source.clone(), tokens.clone())
        assert torch.equal(engine.dispatch(x, handle).rows.x, engine.dispatch(x, again).rows.x)
        with pytest.raises(anyep.ArgumentError):
            anyep.Handle.adopt(4, engine.rank, rows_until - 1000, place, source, tokens)
        return place[:, 0].tolist(), source.tolist(), rows_until.tolist()

    for place, source, rows_until in on_ranks(4, body)[:1]:
        assert place == [0, -1, 1, -1, -1]
        assert source == [0, 2, 0, 2, 0, 2, 0, 2] and rows_until == [2, 4, 6, 8]


def test_more_rows_than_come_and_fewer():
    def body(engine):
        experts = torch.tensor(IDS)
        x = tokens_of(engine.rank, torch.float32)
        handle = engine.route(experts, 8)
        exact = engine.dispatch(x, handle, experts=experts).rows
        more = engine.dispatch(x, handle, experts=experts, num_rows=20).rows
        assert torch.equal(more.x[:handle.num_rows], exact.x)
        assert torch.equal(more.experts[:handle.num_rows], exact.experts)
        assert (more.experts[handle.num_rows:] == -1).all() and len(more.x) == 20
        if engine.rank == 0:
            with pytest.raises(anyep.CapacityError) as caught:
                engine.dispatch(x, handle, num_rows=handle.num_rows - 1)
            assert (caught.value.need, caught.value.have) == (8, 7)
        else:
            try:
                engine.dispatch(x, handle)
            except anyep.CapacityError:
                pass  # ranks that have sent what was dropped may hear of it

    on_ranks(4, body)


def test_asynchronous_operations_keep_their_tensors_alive():
    def body(engine):
        handle = engine.route(torch.tensor(IDS), 8, wait=False)
        events, results = [], []
        for step in range(20):
            x = tokens_of(engine.rank, torch.float32) + step
            done = engine.dispatch(x, handle, num_rows=40, wait=False)
            results.append(done.rows.x)
            events.append(done.event)
            del x, done
            torch.full((5, 32), -7.0)  # what was freed would be handed out again
        for event in events:
            event.wait()
            assert event.done()
        return engine.rank, results

    for rank, results in on_ranks(4, body):
        wanted = torch.stack([tokens_of(source, torch.float32)[token] for source, token in rows_expected(rank)])
        for step, x in enumerate(results):
            assert torch.equal(x[:len(wanted)], wanted + step)


def test_an_asynchronous_call_returns_while_a_peer_is_late_and_other_threads_run():
    gate = threading.Event()

    def body(engine):
        x = tokens_of(engine.rank, torch.float32)
        if engine.rank == 1:
            gate.wait()
            handle = engine.route(torch.tensor(IDS), 8)
            return engine.dispatch(x, handle).rows.x
        handle = engine.route(torch.tensor(IDS), 8, wait=False)
        done = engine.dispatch(x, handle, num_rows=10, wait=False)
        assert not done.event.done()
        ran = []
        helper = threading.Thread(target=lambda: (time.sleep(0.02), ran.append(not done.event.done()), gate.set()))
        helper.start()
        done.event.wait()  # without the interpreter's lock, else the helper never opens the gate
        helper.join()
        assert ran == [True]
        return done.rows.x

    on_ranks(2, body)


def test_after_orders_an_operation_behind_an_event():
    def body(engine):
        x = torch.zeros(5, 32)
        handle = engine.route(torch.tensor(IDS), 8)
        event = anyep.Event.manual()
        done = engine.dispatch(x, handle, after=[event], wait=False)
        time.sleep(0.01)
        x += 5  # legal: the operation has not begun
        event.complete()
        done.event.wait()
        return done.rows.x

    for x in on_ranks(2, body):
        assert (x == 5).all()


def test_rows_outlive_their_engine_and_come_from_the_window_while_there_is_room():
    def body(engine):
        handle = engine.route(torch.tensor(IDS), 8)
        x = tokens_of(engine.rank, torch.float32)
        kept = engine.dispatch(x, handle).rows.x
        window = engine.make_rows(3, 32, "float32", num_scales=2, like=x)
        window.x.fill_(3)
        assert window.scales.shape == (3, 2)
        with pytest.raises(anyep.CapacityError) as caught:
            engine.make_rows(1 << 20, 1024, "float32")
        assert caught.value.need > caught.value.have > 0
        return kept, window.x, engine.rank

    for kept, window, rank in on_ranks(4, body):
        gc.collect()
        wanted = torch.stack([tokens_of(source, torch.float32)[token] for source, token in rows_expected(rank)])
        assert torch.equal(kept, wanted)
        window += 1
        assert (window == 4).all()


def test_the_engines_memory_may_be_seen_zeroed_and_outlive_it():
    def body(engine):
        seen = []
        for mode, size in (("high_throughput", 1 << 20), ("low_latency", 4096)):
            memory = torch.frombuffer(engine.memory(mode, 64, size), dtype=torch.uint8)
            memory.zero_()
            seen.append(memory)
        buffer = engine.combine_buffer(8, 128, 8, like=seen[0])
        assert buffer.shape == (8 // engine.num_ranks, engine.num_ranks * 8, 128)
        assert buffer.data_ptr() == engine.combine_buffer(8, 128, 8, like=seen[0]).data_ptr()
        engine.barrier()
        handle = engine.route(torch.tensor(IDS), 8)
        rows = engine.dispatch(tokens_of(engine.rank, torch.float32), handle).rows.x
        return seen, buffer, rows

    for seen, buffer, _ in on_ranks(2, body, rows_bytes=ROWS_BYTES, **low_latency_budget(2)):
        gc.collect()
        for memory in seen:
            memory.fill_(1)
        buffer.fill_(2)  # a fault here would end the process


@pytest.mark.parametrize("wire", ["bf16", "fp8", "ue8m0"])
@pytest.mark.parametrize("hook", [False, True])
def test_low_latency_slabs_and_their_weighted_sum(wire, hook):
    weights = torch.tensor([[0.5, 0.25]] * 5)

    def body(engine):
        x = tokens_of(engine.rank, torch.bfloat16)[:, :1].expand(5, 128).contiguous()
        ids = torch.tensor(IDS)
        received = torch.zeros(2, dtype=torch.int32)
        waited = torch.zeros(4, dtype=torch.int64)
        call = engine.low_latency_dispatch(x, ids, 8, 8, wire=wire, round_scale=wire == "ue8m0", hook=hook,
                                           received=received, waited=waited)
        if hook:
            assert call.event is None
            call.receive()
            with pytest.raises(anyep.StateError):
                call.receive()
        slabs = call.result
        assert torch.equal(received, slabs.counts)
        values = slabs.x.float()
        if wire == "fp8":
            assert slabs.scales.stride() == (32, 1, 32)
            values *= slabs.scales.repeat_interleave(128, 2)[:, :, :128]
        elif wire == "ue8m0":
            values *= torch.exp2((slabs.scales[..., :1] & 0xFF).float() - 127)
        back = engine.low_latency_combine(values.bfloat16(), ids, weights, slabs, 8, 8, hook=hook)
        if hook:
            back.receive()
        return engine.rank, slabs, values, back.result

    for rank, slabs, values, back in on_ranks(4, body, **low_latency_budget(4)):
        for local in range(2):
            expert = 2 * rank + local
            wanted = [(source, token) for source in range(4) for token in range(5) if expert in IDS[token]]
            assert slabs.counts[local] == len(wanted)
            for row, (source, token) in enumerate(wanted):
                assert slabs.source[local, row] == token
                assert torch.allclose(values[local, row], torch.tensor(8.0 * (source + 1) + token), rtol=2 ** -4)
            for source in range(4):
                begin, count = divmod(int(slabs.range[local, source]), 1 << 32)
                assert [wanted[row][0] for row in range(begin, begin + count)] == [source] * count
        shares = torch.tensor([[(0.5 if choices[0] >= 0 else 0) + (0.25 if choices[1] >= 0 else 0)] for choices in IDS])
        assert torch.allclose(back.float(), (torch.arange(5.0).reshape(5, 1) + 8 * (rank + 1)) * shares, rtol=0.08)


def test_low_latency_fills_the_slabs_that_it_is_given():
    def body(engine):
        x, ids = tokens_of(engine.rank, torch.bfloat16)[:, :1].expand(5, 128).contiguous(), torch.tensor(IDS)
        made = engine.low_latency_dispatch(x, ids, 8, 8).result
        given = made._replace(x=torch.zeros_like(made.x), counts=torch.zeros_like(made.counts))
        with pytest.raises(anyep.ArgumentError, match="out = 5 arrays, allowed: 6"):
            engine.low_latency_dispatch(x, ids, 8, 8, out=given[:5])
        assert engine.low_latency_dispatch(x, ids, 8, 8, out=given).result is given
        sums = torch.zeros(5, 128, dtype=torch.bfloat16)
        back = engine.low_latency_combine(given.x, ids, torch.ones(5, 2), given, 8, 8, out=sums)
        assert back.result is sums
        return made, given, sums

    for made, given, sums in on_ranks(2, body, **low_latency_budget(2)):
        assert torch.equal(made.counts, given.counts) and bool(sums.any())
        for local, count in enumerate(made.counts.tolist()):
            assert torch.equal(made.x[local, :count], given.x[local, :count])


def test_a_third_unreceived_operation_is_refused_by_name():
    def body(engine):
        x, ids = torch.ones(5, 128, dtype=torch.bfloat16), torch.tensor(IDS)
        calls = [engine.low_latency_dispatch(x, ids, 8, 8, hook=True) for _ in range(2)]
        with pytest.raises(anyep.StateError, match="low_latency_dispatch"):
            engine.low_latency_dispatch(x, ids, 8, 8, hook=True)
        with pytest.raises(anyep.StateError):
            calls[1].receive()
        for call in calls:
            call.receive()

    on_ranks(2, body, **low_latency_budget(2))


def test_masks_are_local_and_only_where_they_were_allowed():
    def body(engine):
        engine.mask(1 - engine.rank)
        engine.barrier()  # of itself
        with pytest.raises(anyep.ArgumentError, match="rank = 7"):
            engine.mask(7)
        return engine.masks()

    assert on_ranks(2, body, masks=True, **low_latency_budget(2)) == [[0, 1], [1, 0]]
    with pytest.raises(anyep.StateError):
        on_ranks(1, lambda engine: engine.mask(0))


def test_layout_is_local():
    def body(engine):
        ranks, pairs, where = engine.layout(torch.tensor(IDS), 8)
        return ranks.tolist(), pairs.tolist(), where.tolist()

    for ranks, pairs, where in on_ranks(4, body):
        assert ranks == [2, 2, 1, 1] and pairs == [1, 2, 1, 1, 0, 1, 0, 1]
        assert where == [[rank in at for rank in range(4)] for at in RANKS_OF]


@pytest.mark.parametrize("library", [torch, numpy])
def test_ranks_without_tokens_and_without_rows(library):
    """All tokens are rank 1's and go to rank 0: empty arrays, with the strides that their library gives them."""
    def body(engine):
        num_tokens = 3 if engine.rank == 1 else 0
        experts = library.zeros((num_tokens, 1), dtype=library.int64)
        x = library.ones((num_tokens, 8), dtype=library.float32)
        handle = engine.route(experts, 4)
        rows = engine.dispatch(x, handle, experts=experts, weights=library.ones((num_tokens, 1), dtype=library.float32)).rows
        back = engine.combine(rows.x, handle, weights=rows.weights)
        return engine.rank, tuple(rows.x.shape), tuple(rows.experts.shape), back.x.tolist(), back.weights.tolist()

    assert on_ranks(2, body) == [(0, (3, 8), (3, 1), [], []), (1, (0, 8), (0, 1), [[1.0] * 8] * 3, [[1.0]] * 3)]
