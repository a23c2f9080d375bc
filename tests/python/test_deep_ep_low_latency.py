"""deep_ep's low latency against a slow formula of the contract, ranks as threads and as gloo processes."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any, List

import pytest

torch = pytest.importorskip("torch")

import deep_ep  # noqa: E402
from deep_ep import Buffer, EventHandle  # noqa: E402
from ranks import run, run_gloo  # noqa: E402
from v1_formula import block, cast_fp8, combined, expert_rows, make_inputs, pack_ue8m0, received, slab, weighted  # noqa: E402

M = 24  # num_max_dispatch_tokens_per_rank
NAN = float("nan")


def make_buffer(comm: Any, hidden: int, num_experts: int, max_tokens: int = M, **arguments: Any) -> Buffer:
    """Exactly the hinted size."""
    hint = Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, comm.Get_size(), num_experts)
    return Buffer(None, 0, hint, low_latency_mode=True, comm=comm, **arguments)


def answers_of(inputs: Any, num_experts: int) -> List[torch.Tensor]:
    """What every expert makes of its rows."""
    return [(expert_rows(inputs, expert).float() * (1 + expert / 8)).bfloat16() for expert in range(num_experts)]


def check_handle(inputs: Any, me: int, num_experts: int, count: torch.Tensor, handle: Any, hidden: int,
                 max_tokens: int = M) -> None:
    num_ranks = len(inputs)
    mine = block(me, num_ranks, num_experts)
    assert isinstance(handle, tuple) and handle[2:] == (max_tokens, hidden, num_experts)
    assert all(type(number) is int for number in handle[2:])
    assert handle[0].dtype == torch.int32 and handle[0].shape == (len(mine), num_ranks * max_tokens)
    assert handle[1].dtype == torch.int64 and handle[1].shape == (len(mine), num_ranks)
    assert count.dtype == torch.int32 and count.shape == (len(mine),)
    for local, expert in enumerate(mine):
        want = slab(inputs, expert)
        assert count[local] == len(want.places)
        assert handle[0][local, :count[local]].tolist() == [token for _, token in want.places]
        assert handle[1][local].tolist() == [begin << 32 | number for begin, number in zip(want.begin, want.count)]


def fill(recv_x: torch.Tensor, inputs: Any, me: int, num_experts: int, out: Any = None) -> torch.Tensor:
    """The experts' answers where dispatch put the rows; NaN everywhere else."""
    x = torch.full(recv_x.shape, NAN, dtype=torch.bfloat16) if out is None else out.fill_(NAN)
    for local, expert in enumerate(block(me, len(inputs), num_experts)):
        rows = answers_of(inputs, num_experts)[expert]
        x[local, :rows.shape[0]] = rows
    return x


CASES = [  # ranks, tokens, hidden, top-k, experts, duplicates
    (2, (24, 24), 128, 2, 8, False), (3, (5, 0, 24), 72, 3, 8, False), (4, (7, 24, 1, 20), 256, 4, 16, False),
    (3, (12, 24, 12), 136, 8, 10, True), (1, (9,), 64, 2, 4, False), (2, (0, 0), 128, 1, 2, False),
    (3, (9, 24, 2), 64, 2, 2, False)]


@pytest.mark.parametrize("num_ranks, tokens, hidden, top_k, num_experts, duplicates", CASES)
@pytest.mark.parametrize("mode", ["plain", "async", "hook", "zero_copy", "int32"])
def test_round_trip_bf16(num_ranks, tokens, hidden, top_k, num_experts, duplicates, mode):
    inputs = make_inputs(num_ranks, tokens, hidden, top_k, num_experts, seed=3, duplicates=duplicates,
                         ids_dtype=torch.int32 if mode == "int32" else torch.int64)
    how = {"async": dict(async_finish=True), "hook": dict(return_recv_hook=True)}.get(mode, {})

    def finish(event, hook):
        assert (hook is None) == (mode != "hook") and (event.event is None) == (mode != "async")
        assert mode != "async" or isinstance(event.event, EventHandle)
        if hook is not None:
            hook()
            hook()  # does nothing
        event.current_stream_wait()

    def body(comm):
        buffer = make_buffer(comm, hidden, num_experts)
        me, given = buffer.rank, inputs[buffer.rank]
        rows, count, handle, event, hook = buffer.low_latency_dispatch(given.x, given.ids, M, num_experts, use_fp8=False, **how)
        finish(event, hook)
        mine = block(me, num_ranks, num_experts)
        assert rows.shape == (len(mine), num_ranks * M, hidden) and rows.dtype == torch.bfloat16 and rows.is_contiguous()
        check_handle(inputs, me, num_experts, count, handle, hidden)
        for local, expert in enumerate(mine):
            assert torch.equal(rows[local, :count[local]], expert_rows(inputs, expert))
        view = buffer.get_next_low_latency_combine_buffer(handle) if mode == "zero_copy" else None
        if view is not None:
            assert view.shape == rows.shape and view.dtype == torch.bfloat16 and view.stride(2) == 1
            assert view.numel() == 0 or view.data_ptr() % 16 == 0 and view.stride(1) * 2 % 16 == 0
            assert buffer.get_next_low_latency_combine_buffer(list(handle)).data_ptr() == view.data_ptr()
        x = fill(rows, inputs, me, num_experts, view)
        if view is not None:
            x = torch.full(rows.shape, NAN, dtype=torch.bfloat16)  # its data is ignored
        out = torch.full(given.x.shape, NAN, dtype=torch.bfloat16) if mode == "async" else None
        sums, event, hook = buffer.low_latency_combine(x, given.ids, given.weights, handle, zero_copy=view is not None, out=out,
                                                       **how)
        finish(event, hook)
        assert out is None or sums is out
        assert sums.dtype == torch.bfloat16
        assert torch.equal(sums, weighted(inputs, me, num_experts, answers_of(inputs, num_experts)))
        # A second time, with a list of clones.
        again = buffer.low_latency_combine(fill(rows, inputs, me, num_experts), given.ids, given.weights,
                                           [part.clone() if isinstance(part, torch.Tensor) else part for part in handle])
        assert torch.equal(again[0], sums)
        buffer.destroy()

    run(num_ranks, body)


@pytest.mark.parametrize("hidden", [128, 512, 80, 144, 640])
@pytest.mark.parametrize("scales", ["plain", "rounded", "ue8m0"])
def test_fp8(hidden, scales):
    inputs = make_inputs(2, (20, 9), hidden, 2, 6, seed=hidden)
    for given in inputs:
        given.x[0] = 0  # amax below its least
        given.x[1] *= 2.0**20
        given.x[2] *= 2.0**-20

    def body(comm):
        buffer = make_buffer(comm, hidden, 6)
        given = inputs[buffer.rank]
        (rows, got), count, handle, _, _ = buffer.low_latency_dispatch(
            given.x, given.ids, M, 6, round_scale=scales != "plain", use_ue8m0=scales == "ue8m0")
        check_handle(inputs, buffer.rank, 6, count, handle, hidden)
        columns = -(-hidden // (512 if scales == "ue8m0" else 128))
        assert rows.dtype == torch.float8_e4m3fn and rows.shape == (3, 2 * M, hidden) and rows.is_contiguous()
        assert got.dtype == (torch.int32 if scales == "ue8m0" else torch.float32) and got.shape == (3, 2 * M, columns)
        assert got.stride()[1] == 1 and got.transpose(1, 2).is_contiguous()  # the token runs fastest
        for local, expert in enumerate(block(buffer.rank, 2, 6)):
            values, stored = cast_fp8(expert_rows(inputs, expert), scales != "plain")
            want = pack_ue8m0(stored) if scales == "ue8m0" else stored
            assert torch.equal(rows[local, :count[local]].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(got[local, :count[local]], want)
        buffer.destroy()

    run(2, body)


def test_bf16_rows_are_bits():
    """Others' bytes seen as bfloat16, NaN patterns included."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (4, 64), generator=generator, dtype=torch.int16)

    def body(comm):
        buffer = make_buffer(comm, 64, 1)
        rows, count, *_ = buffer.low_latency_dispatch(  # the options of FP8 are ignored without it
            bits.view(torch.bfloat16), torch.zeros((4, 1), dtype=torch.int64), M, 1, use_fp8=False, use_ue8m0=True)
        assert count.tolist() == [4] and torch.equal(rows[0, :4].view(torch.int16), bits)
        buffer.destroy()

    run(1, body)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_hint_is_enough(num_ranks):
    """Small rows, many choices, fewer experts than ranks: what takes most beside V1's arithmetic. Each call in each form."""
    shapes = [(1, 8, 1, 1), (64, 8, 32, 32), (1, 16, 2, 2), (128, 16, 32, 32), (32, 128, 33, 32), (17, 2880, 4, 4),
              (64, 1024, 2, 1)]

    def body(comm):
        for max_tokens, hidden, num_experts, top_k in shapes:
            buffer = make_buffer(comm, hidden, num_experts, max_tokens)
            ids = (torch.arange(max_tokens * top_k) % num_experts).view(max_tokens, top_k)
            x, weights = torch.ones((max_tokens, hidden), dtype=torch.bfloat16), torch.ones((max_tokens, top_k))
            if hidden % 16 == 0:
                buffer.low_latency_dispatch(x, ids, max_tokens, num_experts)
            for hooks in (False, True):
                for logfmt in (False, True)[:1 + (hidden % 128 == 0)]:
                    rows, _, handle, _, hook = buffer.low_latency_dispatch(x, ids, max_tokens, num_experts, use_fp8=False,
                                                                           return_recv_hook=hooks)
                    if hook is not None:
                        hook()
                    sums, _, hook = buffer.low_latency_combine(rows, ids, weights, handle, use_logfmt=logfmt,
                                                               return_recv_hook=hooks)
                    if hook is not None:
                        hook()
                    assert (sums == top_k).all()
            buffer.destroy()

    run(num_ranks, body)


def logfmt_rows(scale: float, hidden: int, num_rows: int) -> torch.Tensor:
    return (torch.randn((num_rows, hidden), generator=torch.Generator().manual_seed(5)) * scale).clamp(-0.9, 0.9).bfloat16()


@pytest.mark.parametrize("hook", [False, True])
def test_logfmt_codes_small_rows_and_leaves_others_as_they_are(hook):
    hidden, ids = 512, torch.tensor([[0], [1], [0], [1]])

    def body(comm):
        buffer = make_buffer(comm, hidden, 2)
        small, large = logfmt_rows(0.1, hidden, 4), logfmt_rows(0.1, hidden, 4) + 2
        for given, exact in ((small, False), (large, True)):
            rows, _, handle, _, _ = buffer.low_latency_dispatch(given, ids, M, 2, use_fp8=False)
            sums, _, receive = buffer.low_latency_combine(rows, ids, torch.ones(4, 1), handle, use_logfmt=True,
                                                          return_recv_hook=hook)
            if hook:
                receive()
            assert torch.equal(sums, given) == exact
            # log2(amax / amin) is 32 at most: 2.2 % of a value, and what lies below amax * 2^-32 becomes 0.
            assert ((sums.float() - given.float()).abs() <= 0.03 * given.float().abs() + 2.0**-32).all()
        buffer.destroy()

    run(2, body)


def test_statistics_are_added():
    inputs = make_inputs(2, (20, 9), 128, 2, 6)

    def body(comm):
        buffer = make_buffer(comm, 128, 6)
        given = inputs[buffer.rank]
        stats = torch.full((3,), 100, dtype=torch.int32)
        waited, waited_too = (torch.full((2,), 7, dtype=torch.int64) for _ in range(2))
        for turn in (1, 2):
            if turn == 2 and buffer.rank == 1:
                threading.Event().wait(0.05)  # the other waits for this rank, and counts it
            rows, count, handle, _, hook = buffer.low_latency_dispatch(
                given.x, given.ids, M, 6, use_fp8=False, cumulative_local_expert_recv_stats=stats,
                dispatch_wait_recv_cost_stats=waited, return_recv_hook=turn == 2)
            if hook is not None:
                hook()
            assert torch.equal(stats, 100 + turn * count)
            if turn == 2 and buffer.rank == 1:
                threading.Event().wait(0.05)
            buffer.low_latency_combine(rows, given.ids, given.weights, handle, combine_wait_recv_cost_stats=waited_too)
        assert (waited >= 7).all() and (waited_too >= 7).all()
        if buffer.rank == 0:
            assert waited[1] >= 7 + 30_000_000 and waited_too[1] >= 7 + 30_000_000
        buffer.destroy()

    run(2, body)


def test_two_hooks_in_flight_and_a_third_send_is_refused():
    inputs = make_inputs(2, (20, 9), 128, 2, 6)

    def body(comm):
        buffer = make_buffer(comm, 128, 6)
        given = inputs[buffer.rank]

        def send():
            return buffer.low_latency_dispatch(given.x, given.ids, M, 6, use_fp8=False, return_recv_hook=True)

        first, second = send(), send()
        with pytest.raises(deep_ep.StateError, match=r"^Buffer.low_latency_dispatch: two low-latency operations are in flight"):
            send()
        with pytest.raises(deep_ep.StateError, match="order of their sends"):
            second[4]()
        first[4]()
        first[4]()
        second[4]()  # refused before, possible now
        for rows, count, handle, _, _ in (first, second):  # both results stay valid
            check_handle(inputs, buffer.rank, 6, count, handle, 128)
            for local, expert in enumerate(block(buffer.rank, 2, 6)):
                assert torch.equal(rows[local, :count[local]], expert_rows(inputs, expert))
        # A combine and the next dispatch overlap; an odd number of operations.
        mine = fill(first[0], inputs, buffer.rank, 6)
        sums, _, receive = buffer.low_latency_combine(mine, given.ids, given.weights, first[2], return_recv_hook=True)
        third = send()
        receive()
        third[4]()
        assert torch.equal(sums, weighted(inputs, buffer.rank, 6, answers_of(inputs, 6)))
        assert torch.equal(third[1], first[1])
        buffer.destroy()

    run(2, body)


def test_a_hook_keeps_its_tensors_and_may_be_forgotten():
    inputs = make_inputs(2, (20, 9), 128, 2, 6)

    def body(comm):
        buffer = make_buffer(comm, 128, 6)
        given = inputs[buffer.rank]
        hook = buffer.low_latency_dispatch(given.x.clone(), given.ids.clone(), M, 6, return_recv_hook=True)[4]
        torch.full((1 << 16,), NAN)
        hook()  # its results are gone, its memory is not
        late = buffer.low_latency_dispatch(given.x, given.ids, M, 6, return_recv_hook=True)[4]
        buffer.destroy()
        with pytest.raises(deep_ep.StateError):
            late()

    run(2, body)


@pytest.mark.parametrize("how", ["drop", "destroy"])
def test_a_buffer_that_ends_with_an_open_hook_keeps_nothing(how, monkeypatch):
    """At once, not when the garbage collector comes: peers learn of it, and the tensors are free."""
    monkeypatch.setenv("ANYEP_CLOSE_TIMEOUT_S", "0.2")
    inputs = make_inputs(2, (20, 9), 128, 2, 6)

    def body(comm):
        buffer = make_buffer(comm, 128, 6)
        given = inputs[buffer.rank]
        if buffer.rank == 0:
            x = given.x.clone()
            gone = weakref.ref(x)
            hook = buffer.low_latency_dispatch(x, given.ids, M, 6, return_recv_hook=True)[4]
            comm.allgather(None)
            if how == "destroy":
                buffer.destroy()
            del x, buffer
            with pytest.raises(deep_ep.StateError):
                hook()
            del hook
            assert gone() is None
            comm.allgather(None)
        else:
            buffer.low_latency_dispatch(given.x, given.ids, M, 6, return_recv_hook=True)[4]()
            comm.allgather(None)
            comm.allgather(None)
            with pytest.raises(deep_ep.PeerDeadError):
                buffer.low_latency_dispatch(given.x, given.ids, M, 6)

    gc.disable()
    try:
        run(2, body)
    finally:
        gc.enable()


def test_both_modes_alternate_in_one_buffer():
    """xtuner and LMDeploy: one Buffer of the hinted sizes, cleaned at every switch; M, E, hidden change from call to call."""
    inputs = make_inputs(2, (20, 9), 128, 2, 6)
    other = make_inputs(2, (3, 4), 64, 1, 3)

    def body(comm):
        nvl = Buffer.get_dispatch_config(2).get_nvl_buffer_size_hint(256, 2)
        buffer = Buffer(None, nvl, Buffer.get_low_latency_rdma_size_hint(M, 128, 2, 6), low_latency_mode=True, comm=comm)
        me, given = buffer.rank, inputs[buffer.rank]
        for turn in range(3):
            buffer.clean_low_latency_buffer(M, 128, 6)
            rows, count, handle, _, _ = buffer.low_latency_dispatch(given.x, given.ids, M, 6, use_fp8=False)
            check_handle(inputs, me, 6, count, handle, 128)
            small = buffer.low_latency_dispatch(other[me].x, other[me].ids, 4, 3, use_fp8=False)
            check_handle(other, me, 3, small[1], small[2], 64, max_tokens=4)
            counts, _, pairs, token_in_rank, _ = buffer.get_dispatch_layout(given.ids, 6)
            ht_rows, _, _, _, ht_handle, _ = buffer.dispatch(given.x, None, counts, None, token_in_rank, pairs, given.ids,
                                                             given.weights)
            assert torch.equal(ht_rows, received(inputs, me, 6).x)
            raw = [received(inputs, rank, 6).x for rank in range(2)]
            assert torch.equal(buffer.combine(ht_rows, ht_handle)[0], combined(inputs, me, 6, raw))
            sums = buffer.low_latency_combine(fill(rows, inputs, me, 6), given.ids, given.weights, handle)[0]
            assert torch.equal(sums, weighted(inputs, me, 6, answers_of(inputs, 6)))
            if turn == 1:  # recovery code does this
                buffer.clean_low_latency_buffer(M, 128, 6)
                buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True).zero_()
                buffer.get_local_buffer_tensor(torch.int8).zero_()
                buffer.clean_low_latency_buffer(M, 128, 6)
        buffer.destroy()

    run(2, body)


@pytest.mark.parametrize("hook", [False, True])
def test_exact_combine_rounds_once(hook, monkeypatch):
    monkeypatch.setenv("ANYEP_COMBINE", "exact")
    inputs = make_inputs(3, (20, 9, 14), 128, 5, 6, seed=1)

    def body(comm):
        buffer = make_buffer(comm, 128, 6)
        me, given = buffer.rank, inputs[buffer.rank]
        rows, _, handle, _, _ = buffer.low_latency_dispatch(given.x, given.ids, M, 6, use_fp8=False)
        sums, _, receive = buffer.low_latency_combine(fill(rows, inputs, me, 6), given.ids, given.weights, handle,
                                                      return_recv_hook=hook)
        if hook:
            receive()
        answers = answers_of(inputs, 6)
        assert torch.equal(sums, weighted(inputs, me, 6, answers, exact=True))
        assert not torch.equal(sums, weighted(inputs, me, 6, answers))
        buffer.destroy()

    run(3, body)


def test_combine_of_another_hidden_by_a_rebuilt_handle():
    inputs = make_inputs(2, (6, 9), 128, 2, 4)

    def body(comm):
        buffer = make_buffer(comm, 256, 4)
        given = inputs[buffer.rank]
        rows, count, handle, _, _ = buffer.low_latency_dispatch(given.x, given.ids, M, 4, use_fp8=False)
        rebuilt = [handle[0], handle[1], handle[2], 256, handle[4]]
        x = fill(rows, inputs, buffer.rank, 4).repeat(1, 1, 2)
        sums = buffer.low_latency_combine(x, given.ids, given.weights, rebuilt)[0]
        assert torch.equal(sums, weighted(inputs, buffer.rank, 4, answers_of(inputs, 4)).repeat(1, 2))
        assert buffer.get_next_low_latency_combine_buffer(rebuilt).shape == (2, 2 * M, 256)
        buffer.destroy()

    run(2, body)


def test_cleaning_is_a_barrier():
    late = threading.Event()

    def body(comm):
        buffer = make_buffer(comm, 128, 6)
        if buffer.rank == 1:
            threading.Event().wait(0.05)
            late.set()
        buffer.clean_low_latency_buffer(num_max_dispatch_tokens_per_rank=M, hidden=128, num_experts=6)
        assert late.is_set()
        buffer.destroy()

    run(2, body)


# ---- processes


def _gloo_body(group: Any) -> None:
    num_ranks, hidden, num_experts = group.size(), 256, 10
    inputs = make_inputs(num_ranks, (24, 0, 17, 5)[:num_ranks], hidden, 4, num_experts, seed=11)
    hint = Buffer.get_low_latency_rdma_size_hint(M, hidden, num_ranks, num_experts)
    buffer = Buffer(group, num_rdma_bytes=hint, low_latency_mode=True)
    me, given = buffer.rank, inputs[buffer.rank]
    for hooks in (False, True):
        rows, count, handle, _, hook = buffer.low_latency_dispatch(given.x, given.ids, M, num_experts, use_fp8=False,
                                                                   return_recv_hook=hooks)
        fp8 = buffer.low_latency_dispatch(given.x, given.ids, M, num_experts, return_recv_hook=hooks)
        if hooks:
            hook()
            fp8[4]()
        check_handle(inputs, me, num_experts, count, handle, hidden)
        check_handle(inputs, me, num_experts, fp8[1], fp8[2], hidden)
        sums, _, hook = buffer.low_latency_combine(fill(rows, inputs, me, num_experts), given.ids, given.weights, handle,
                                                   return_recv_hook=hooks)
        if hooks:
            hook()
        assert torch.equal(sums, weighted(inputs, me, num_experts, answers_of(inputs, num_experts)))
    buffer.destroy()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_processes_with_a_gloo_group(num_ranks):
    run_gloo(num_ranks, _gloo_body)
