"""deep_ep's high throughput against a slow formula of the contract, ranks as threads and as gloo processes."""

from __future__ import annotations

import threading
from typing import Any, Tuple

import pytest

torch = pytest.importorskip("torch")

import deep_ep  # noqa: E402
from deep_ep import Buffer, Config, EventHandle, EventOverlap  # noqa: E402
from ranks import run, run_gloo  # noqa: E402
from v1_formula import block, combined, layout, make_inputs, received  # noqa: E402

HIDDEN = 64
NVL_BYTES = 1 << 24


def make_buffer(comm: Any, **arguments: Any) -> Buffer:
    return Buffer(None, NVL_BYTES, comm=comm, **arguments)


def layout_arguments(buffer: Buffer, ids: torch.Tensor, num_experts: int) -> dict:
    counts, _, pairs, token_in_rank, _ = buffer.get_dispatch_layout(ids, num_experts)
    return dict(num_tokens_per_rank=counts, num_tokens_per_expert=pairs, is_token_in_rank=token_in_rank)


def dispatch(buffer: Buffer, inputs: Any, num_experts: int, **arguments: Any) -> Tuple[Any, ...]:
    given = inputs[buffer.rank]
    x = arguments.pop("x", given.x)
    return buffer.dispatch(x, topk_idx=given.ids, topk_weights=given.weights,
                           **layout_arguments(buffer, given.ids, num_experts), **arguments)


def answer(rank: int, rows: torch.Tensor) -> torch.Tensor:
    """What the experts of a rank make of its rows: differs per rank, bfloat16."""
    return (rows.float() * (rank + 1.5)).to(rows.dtype)


CASES = [  # ranks, tokens per rank, top-k, experts, duplicates
    (2, (16, 16), 2, 8, False), (3, (5, 0, 19), 3, 8, False), (4, (7, 33, 1, 20), 4, 16, False),
    (2, (0, 0), 2, 4, False), (3, (12, 12, 12), 8, 10, True), (4, (6, 6, 6, 6), 1, 2, False),
    (1, (9,), 2, 4, False), (4, (40, 3, 40, 0), 4, 6, True)]


@pytest.mark.parametrize("num_ranks, tokens, top_k, num_experts, duplicates", CASES)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_round_trip(num_ranks, tokens, top_k, num_experts, duplicates, ids_dtype):
    inputs = make_inputs(num_ranks, tokens, HIDDEN, top_k, num_experts, seed=num_ranks, duplicates=duplicates,
                         ids_dtype=ids_dtype)

    def body(comm):
        buffer = make_buffer(comm)
        me = buffer.rank
        given, want = inputs[me], received(inputs, me, num_experts)
        rows, ids, weights, counts, handle, event = dispatch(buffer, inputs, num_experts, expert_alignment=4)
        assert event.event is None
        assert torch.equal(rows, want.x) and rows.dtype == torch.bfloat16
        assert torch.equal(ids, want.ids) and ids.dtype == ids_dtype
        assert torch.equal(weights, want.weights)
        assert counts == [-(-pairs // 4) * 4 for pairs in want.counts] and all(type(count) is int for count in counts)
        # The public parts of the handle, and that it is a flat tuple of tensors.
        assert type(handle) is tuple and all(isinstance(part, torch.Tensor) for part in handle)
        assert handle[0].dtype == torch.int32 and handle[0].shape == (num_ranks, num_ranks)
        assert [handle[0][source][me].item() for source in range(num_ranks)] == want.until
        assert handle[1].shape[0] == handle[2].shape[0] == num_ranks
        assert handle[3].dtype == torch.int32 and handle[3].tolist() == [token for _, token in want.places]
        assert torch.equal(handle[4], layout(given.ids, num_ranks, num_experts)[2])
        assert handle[5].dtype == torch.int32 and torch.equal(handle[5] >= 0, handle[4])

        answers = [answer(rank, received(inputs, rank, num_experts).x) for rank in range(num_ranks)]
        sums, sum_weights, event = buffer.combine(answer(me, rows), handle, topk_weights=weights)
        assert event.event is None
        assert torch.equal(sums, combined(inputs, me, num_experts, answers))
        assert torch.equal(sum_weights, torch.where(given.ids >= 0, given.weights, torch.zeros_like(given.weights)))
        again = buffer.dispatch(given.x, handle=handle)
        assert torch.equal(again[0], rows) and again[1:5] == (None, None, None, None) and again[5].event is None
        buffer.destroy()

    run(num_ranks, body)


def test_layout_is_the_formula():
    inputs = make_inputs(3, (20, 0, 5), HIDDEN, 4, 10, duplicates=True)

    def body(comm):
        buffer = make_buffer(comm)
        ids = inputs[buffer.rank].ids
        counts, nodes, pairs, token_in_rank, event = buffer.get_dispatch_layout(ids, 10)
        for got, want in zip((counts, pairs, token_in_rank), layout(ids, 3, 10)):
            assert got.dtype == want.dtype and torch.equal(got, want)
        assert nodes is None and event.event is None
        assert isinstance(buffer.get_dispatch_layout(topk_idx=ids, num_experts=10, async_finish=True)[4].event, EventHandle)
        buffer.destroy()

    run(3, body)


def test_without_choices_the_layout_alone_decides():
    inputs = make_inputs(2, (8, 11), HIDDEN, 2, 6)

    def body(comm):
        buffer = make_buffer(comm)
        given, want = inputs[buffer.rank], received(inputs, buffer.rank, 6)
        rows, ids, weights, counts, handle, _ = buffer.dispatch(
            given.x, **layout_arguments(buffer, given.ids, 6), expert_alignment=2)
        assert torch.equal(rows, want.x) and ids is None and weights is None
        assert counts == [-(-pairs // 2) * 2 for pairs in want.counts]
        buffer.destroy()

    run(2, body)


PAYLOADS = {
    "fp8 and transposed float32": lambda x: (x.to(torch.float8_e4m3fn), torch.arange(3 * x.shape[0]).float().view(3, -1).t()),
    "fp8 and one scale": lambda x: (x.to(torch.float8_e4m3fn), torch.arange(x.shape[0]).float().view(-1, 1)),
    "int8 and int32": lambda x: ((x * 10).to(torch.int8), torch.arange(2 * x.shape[0], dtype=torch.int32).view(-1, 2)),
    "float16": lambda x: x.half(), "float32": lambda x: x.float(), "float64": lambda x: x.double(),
    "int64": lambda x: (x * 100).long(), "bool": lambda x: x > 0, "fp8 alone": lambda x: x.to(torch.float8_e4m3fn),
    "e5m2 and float32": lambda x: (x.to(torch.float8_e5m2), torch.ones(x.shape[0], 2)),
    "rows of a wider tensor": lambda x: torch.cat([x, x], dim=1)[:, :HIDDEN],
    "a view that is not aligned": lambda x: torch.cat([x.flatten().new_zeros(1), x.flatten()])[1:].view(x.shape),
    "needs grad": lambda x: x.float().requires_grad_(), "NaN": lambda x: torch.full_like(x, float("nan")),
}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kind", PAYLOADS)
def test_any_payload_arrives_bit_for_bit(kind):
    inputs = make_inputs(2, (9, 14), HIDDEN, 2, 6)

    def body(comm):
        buffer = make_buffer(comm)
        sent = [PAYLOADS[kind](given.x) for given in inputs]
        got = dispatch(buffer, inputs, 6, x=sent[buffer.rank])[0]
        sent, got = ([one if isinstance(one, tuple) else (one,) for one in many] for many in (sent, [got]))
        places = received(inputs, buffer.rank, 6).places
        for part in range(len(got[0])):
            want = torch.stack([sent[source][part].detach()[token] for source, token in places])
            assert same_bits(got[0][part], want)
            assert got[0][part].is_contiguous() and not got[0][part].requires_grad
        buffer.destroy()

    run(2, body)


@pytest.mark.parametrize("async_finish", [False, True])
def test_worst_case_rows_begin_with_the_exact_ones(async_finish):
    inputs = make_inputs(3, (10, 4, 15), HIDDEN, 3, 9)

    def body(comm):
        buffer = make_buffer(comm)
        exact = dispatch(buffer, inputs, 9)
        num_rows = exact[0].shape[0]
        rows, ids, weights, counts, handle, event = dispatch(buffer, inputs, 9, num_worst_tokens=40, async_finish=async_finish)
        event.current_stream_wait()
        assert rows.shape[0] == ids.shape[0] == weights.shape[0] == handle[3].shape[0] == 40 and counts == []
        assert torch.equal(rows[:num_rows], exact[0]) and torch.equal(ids[:num_rows], exact[1])
        assert torch.equal(weights[:num_rows], exact[2]) and (ids[num_rows:] == -1).all()
        assert handle[0][2][buffer.rank].item() == num_rows
        answers = [answer(rank, received(inputs, rank, 9).x) for rank in range(3)]
        mine = torch.full((40, HIDDEN), float("nan"), dtype=torch.bfloat16)
        mine[:num_rows] = answers[buffer.rank]
        assert torch.equal(buffer.combine(mine, handle)[0], combined(inputs, buffer.rank, 9, answers))
        again = buffer.dispatch(inputs[buffer.rank].x, handle=handle)[0]
        assert again.shape[0] == 40 and torch.equal(again[:num_rows], exact[0])
        buffer.destroy()

    run(3, body)


def test_surplus_rows_are_dropped_and_reported_and_the_buffer_goes_on():
    inputs = make_inputs(2, (12, 12), HIDDEN, 4, 4)

    def body(comm):
        buffer = make_buffer(comm)
        with pytest.raises(deep_ep.CapacityError) as error:
            dispatch(buffer, inputs, 4, num_worst_tokens=3)
        assert (error.value.need, error.value.have) == (len(received(inputs, buffer.rank, 4).places), 3)
        assert str(error.value).startswith("Buffer.dispatch: ")
        late = dispatch(buffer, inputs, 4, num_worst_tokens=3, async_finish=True)[5]
        with pytest.raises(deep_ep.CapacityError):
            late.current_stream_wait()
        assert torch.equal(dispatch(buffer, inputs, 4)[0], received(inputs, buffer.rank, 4).x)
        buffer.destroy()

    run(2, body)


def test_peers_of_a_call_after_a_failed_event_learn_of_it():
    inputs = make_inputs(2, (12, 12), HIDDEN, 4, 4)

    def body(comm):
        buffer = make_buffer(comm)
        handle = dispatch(buffer, inputs, 4)[4]
        event = dispatch(buffer, inputs, 4, num_worst_tokens=3 if buffer.rank == 0 else 24, async_finish=True)[5]
        with pytest.raises(deep_ep.CapacityError if buffer.rank == 0 else deep_ep.PeerDeadError, match="room for 3"):
            buffer.dispatch(inputs[buffer.rank].x, handle=handle, previous_event=event)
        comm.allgather(None)

    run(2, body, timeout_s=20)


def bias_of(rank: int, salt: int, tokens: int) -> torch.Tensor:
    return torch.randn((tokens, HIDDEN), generator=torch.Generator().manual_seed(10 * rank + salt)).bfloat16()


@pytest.mark.parametrize("form", ["one", "two", "list", "none and one", "one and none", "two nones"])
def test_bias(form):
    inputs = make_inputs(2, (9, 6), HIDDEN, 2, 6)  # some tokens go nowhere: they keep the bias

    def body(comm):
        buffer = make_buffer(comm)
        me = buffer.rank
        one, two = (bias_of(me, salt, inputs[me].x.shape[0]) for salt in (1, 2))
        bias = {"one": one, "two": (one, two), "list": [one, two], "none and one": (None, one), "one and none": (one, None),
                "two nones": (None, None)}[form]
        rows, _, _, _, handle, _ = dispatch(buffer, inputs, 6)
        answers = [answer(rank, received(inputs, rank, 6).x) for rank in range(2)]
        terms = (bias,) if isinstance(bias, torch.Tensor) else bias
        assert torch.equal(buffer.combine(answer(me, rows), handle, bias=bias)[0], combined(inputs, me, 6, answers, terms))
        buffer.destroy()

    run(2, body)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_combine_of_other_types_and_of_another_hidden(dtype):
    inputs = make_inputs(3, (9, 6, 2), HIDDEN, 2, 6)

    def body(comm):
        buffer = make_buffer(comm)
        handle = dispatch(buffer, inputs, 6)[4]
        answers = []
        for rank in range(3):
            shape = (len(received(inputs, rank, 6).places), 24)
            answers.append(torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype))
        sums = buffer.combine(answers[buffer.rank], handle, config=Config(2))[0]
        assert sums.dtype == dtype and torch.equal(sums, combined(inputs, buffer.rank, 6, answers))
        buffer.destroy()

    run(3, body)


def test_a_handle_is_values_only():
    """Lists, clones, another Buffer, an earlier one that is gone, many at once, any order."""
    rounds = [make_inputs(2, (9, 6), HIDDEN, 2, 6, seed=seed) for seed in range(3)]

    def body(comm):
        first, second = make_buffer(comm), make_buffer(comm)
        me = first.rank
        kept = []
        for inputs in rounds:
            rows, _, _, _, handle, _ = dispatch(first, inputs, 6)
            kept.append((answer(me, rows).clone(), [part.clone() for part in handle]))
            first.get_local_buffer_tensor(torch.uint8).zero_()
        first.destroy()
        for turn in (1, 0, 2, 1):
            mine, handle = kept[turn]
            answers = [answer(rank, received(rounds[turn], rank, 6).x) for rank in range(2)]
            assert torch.equal(second.combine(mine, handle)[0], combined(rounds[turn], me, 6, answers))
            assert torch.equal(second.dispatch(rounds[turn][me].x, handle=tuple(handle))[0], received(rounds[turn], me, 6).x)
        second.destroy()

    run(2, body)


def test_asynchronous_calls_in_a_chain():
    inputs = make_inputs(3, (30, 11, 0), HIDDEN, 3, 9)

    def body(comm):
        buffer = make_buffer(comm)
        me = buffer.rank
        layout_event = Buffer.capture()
        rows, ids, weights, _, handle, sent = dispatch(buffer, inputs, 9, previous_event=layout_event, async_finish=True,
                                                       allocate_on_comm_stream=True)
        assert isinstance(sent.event, EventHandle)
        # The second operation takes the first one's rows before anybody waited for them.
        sums, sum_weights, event = buffer.combine(rows, handle, weights, previous_event=sent, async_finish=True)
        ran = []
        event.register_hook_after_wait(lambda: ran.append(True))
        with event(release_handle=True):
            assert ran == []
        assert ran == [True] and event.event is None and event.hook_after_wait is None
        event.current_stream_wait()  # nothing to wait for
        raw = [received(inputs, rank, 9).x for rank in range(3)]
        assert torch.equal(rows, raw[me]) and torch.equal(sums, combined(inputs, me, 9, raw))
        assert torch.equal(sum_weights, torch.where(inputs[me].ids >= 0, inputs[me].weights, 0.0))
        # Every form of previous_event, and an asynchronous cached call.
        for before in (None, EventOverlap(None), EventOverlap(EventHandle()), EventHandle(), sent):
            again = buffer.dispatch(inputs[me].x, handle=handle, previous_event=before, async_finish=before is not None)
            again[5].current_stream_wait()
            assert torch.equal(again[0], raw[me])
        buffer.destroy()

    run(3, body)


def test_inputs_of_an_asynchronous_call_live_until_it_ends():
    """One rank comes late: the others' tensors have no owner but the Buffer meanwhile."""
    inputs = make_inputs(2, (16, 16), HIDDEN, 2, 4)
    dropped = threading.Event()

    def body(comm):
        buffer = make_buffer(comm)
        handle = dispatch(buffer, inputs, 4)[4]
        rows = received(inputs, buffer.rank, 4).x
        if buffer.rank == 0:
            sums, _, event = buffer.combine(rows.clone(), handle, bias=bias_of(0, 1, 16), async_finish=True)
            torch.full((16 * 1024,), float("nan"))  # would reuse freed memory
            dropped.set()
            event.current_stream_wait()
            raw = [received(inputs, rank, 4).x for rank in range(2)]
            assert torch.equal(sums, combined(inputs, 0, 4, raw, (bias_of(0, 1, 16),)))
        else:
            assert dropped.wait(20)
            buffer.combine(rows, handle)
        buffer.destroy()

    run(2, body)


@pytest.mark.parametrize("nvl_bytes", [0, 1, Buffer.get_dispatch_config(2).get_nvl_buffer_size_hint(2 * HIDDEN, 2)])
def test_a_budget_is_no_limit_on_tokens(nvl_bytes):
    """Also with long rows in float32 and in a low-latency Buffer; the attribute keeps the number."""
    inputs = make_inputs(2, (3000, 1), HIDDEN, 2, 4)
    wide = torch.randn((2, 16384), generator=torch.Generator().manual_seed(0))

    def body(comm):
        buffer = Buffer(None, nvl_bytes, 1000, low_latency_mode=True, comm=comm, num_qps_per_rank=12.0)
        assert buffer.num_nvl_bytes == nvl_bytes and buffer.num_rdma_bytes == 1000
        rows, _, _, _, handle, _ = dispatch(buffer, inputs, 4)
        assert rows.shape[0] == len(received(inputs, buffer.rank, 4).places)
        assert torch.equal(rows[:3], received(inputs, buffer.rank, 4).x[:3])
        assert buffer.combine(rows, handle)[0].shape == inputs[buffer.rank].x.shape
        ids = torch.zeros((2, 1), dtype=torch.int64)
        rows, _, _, _, handle, _ = buffer.dispatch(wide, topk_idx=ids, topk_weights=torch.ones(2, 1),
                                                   **layout_arguments(buffer, ids, 2))
        assert torch.equal(buffer.combine(rows, handle)[0], wide)
        buffer.destroy()

    run(2, body)


def test_equal_calls_give_equal_bits_whatever_num_sms():
    inputs = make_inputs(2, (50, 60), HIDDEN, 4, 8)

    def body(comm):
        buffer = make_buffer(comm)
        results = []
        for num_sms in (1, 2, 20):
            received_now = dispatch(buffer, inputs, 8, config=Config(num_sms))
            sums = buffer.combine(received_now[0], received_now[4], config=Config(num_sms))[0]
            results.append((*received_now[:3], *received_now[4], sums))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))
        buffer.destroy()

    run(2, body)


def test_ids_out_of_range_count_as_unused_with_one_warning(caplog, monkeypatch):
    monkeypatch.setenv("ANYEP_CHECK", "0")
    ids = torch.tensor([[4, -2], [2**32 + 3, 1], [2**63 - 1, -(2**63)]])

    def body(comm):
        buffer = make_buffer(comm)
        for _ in range(3):
            rows, got, _, counts, _, _ = buffer.dispatch(
                torch.ones(3, 8), topk_idx=ids, topk_weights=torch.ones(3, 2), **layout_arguments(buffer, ids, 4))
        assert rows.shape[0] == 1 and got.tolist() == [[-1, 1]] and counts == [0, 3 - 2, 0, 0]
        buffer.destroy()

    with caplog.at_level("WARNING", logger="anyep"):
        run(1, body)
    assert sum("topk_idx" in record.getMessage() for record in caplog.records) == 1


def test_rows_are_safe_from_a_view_of_the_memory_once_it_was_asked_for():
    inputs = make_inputs(2, (9, 6), HIDDEN, 2, 6)

    def body(comm):
        buffer = make_buffer(comm)
        view = buffer.get_local_buffer_tensor(torch.uint8)
        rows = dispatch(buffer, inputs, 6)[0]
        comm.allgather(None)
        view.zero_()
        assert torch.equal(rows, received(inputs, buffer.rank, 6).x)
        buffer.destroy()

    run(2, body)


def test_destroy_logs_who_did_not_come(monkeypatch, caplog):
    """A peer that dropped its Buffer, or that stays away: destroy() returns, and everything local is released."""
    monkeypatch.setenv("ANYEP_CLOSE_TIMEOUT_S", "0.2")
    inputs = make_inputs(3, (2, 2, 2), HIDDEN, 1, 3)
    destroyed = threading.Event()

    def body(comm):
        buffer = make_buffer(comm)
        dispatch(buffer, inputs, 3)
        comm.allgather(None)
        if comm.Get_rank() == 0:
            buffer.destroy()
            assert buffer.runtime is None
            destroyed.set()
        elif comm.Get_rank() == 1:
            del buffer
        else:
            assert destroyed.wait(20)

    with caplog.at_level("WARNING", logger="anyep"):
        run(3, body)
    assert any(record.getMessage().startswith("Buffer.destroy: ") for record in caplog.records)


def test_a_communicator_of_mpi4py():
    MPI = pytest.importorskip("mpi4py.MPI")
    buffer = Buffer(None, NVL_BYTES, comm=MPI.COMM_SELF)
    assert buffer.group is MPI.COMM_SELF and (buffer.rank, buffer.group_size) == (0, 1)
    inputs = make_inputs(1, (5,), HIDDEN, 2, 4)
    assert torch.equal(dispatch(buffer, inputs, 4)[0], received(inputs, 0, 4).x)
    buffer.destroy()


def _gloo_body(group: Any) -> None:
    num_ranks = group.size()
    inputs = make_inputs(num_ranks, (21, 0, 17, 40)[:num_ranks], HIDDEN, 4, 10, seed=7)
    buffer = Buffer(group, NVL_BYTES, explicitly_destroy=True)
    me = buffer.rank
    assert buffer.group is group and buffer.group_size == num_ranks
    raw = [received(inputs, rank, 10).x for rank in range(num_ranks)]
    for async_finish in (False, True):
        rows, ids, weights, counts, handle, event = dispatch(
            buffer, inputs, 10, previous_event=EventOverlap(EventHandle()), async_finish=async_finish,
            allocate_on_comm_stream=async_finish)
        sums, sum_weights, done = buffer.combine(rows, handle, weights, previous_event=event, async_finish=async_finish)
        done.current_stream_wait()
        assert torch.equal(rows, raw[me]) and counts == received(inputs, me, 10).counts
        assert torch.equal(sums, combined(inputs, me, 10, raw))
        assert torch.equal(sum_weights, torch.where(inputs[me].ids >= 0, inputs[me].weights, 0.0))
    assert list(block(me, num_ranks, 10)) and ids.max() < len(counts)
    buffer.destroy()
    torch.distributed.barrier(group)  # the group is the caller's
    again = Buffer(group, 0)  # dropped without destroy()
    del again
    # Groups smaller than the world, side by side; the Buffers end after torch's groups.
    dist = torch.distributed
    halves = [dist.new_group(list(range(half, num_ranks, 2))) for half in range(2)]
    mine = halves[dist.get_rank() % 2]
    part = Buffer(mine, NVL_BYTES)
    assert part.group is mine and (part.rank, part.group_size) == (dist.get_rank() // 2, num_ranks // 2)
    few = make_inputs(part.group_size, (5, 9)[:part.group_size], HIDDEN, 2, 4)
    assert torch.equal(dispatch(part, few, 4)[0], received(few, part.rank, 4).x)
    with pytest.raises((deep_ep.ArgumentError, ValueError, TypeError)):
        Buffer(halves[1 - dist.get_rank() % 2], NVL_BYTES)  # this rank is in the other
    dist.destroy_process_group()
    part.destroy()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_processes_with_a_gloo_group(num_ranks):
    run_gloo(num_ranks, _gloo_body)
