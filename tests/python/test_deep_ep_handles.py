"""V1's handles give back the engine's handle that they were made from, where their tensors are the same objects with the same
values; else one is made from the values. Results are the same: test_deep_ep_high_throughput.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import anyep
import deep_ep
from anyep import _native
from deep_ep import handles, low_latency

NUM_EXPERTS = 4
IDS = torch.tensor([[0, 2], [3, -1], [-1, -1]])
X = torch.arange(3 * 16, dtype=torch.float32).view(3, 16)
RECEIVED, SUMS = X[:2], torch.cat([X[:2], torch.zeros(1, 16)])


@pytest.fixture
def buffer():
    made = deep_ep.Buffer(anyep.LocalGroup(1).member(0), 8 << 20, explicitly_destroy=True)
    yield made
    made.destroy()


@pytest.fixture
def adopted(monkeypatch):
    """The handles that were made from values so far."""
    made = []
    adopt = handles.adopt
    monkeypatch.setattr(handles, "adopt", lambda *arguments: made.append(adopt(*arguments)) or made[-1])
    return made


def dispatch(buffer, ids=IDS):
    counts, _, pairs, there, _ = buffer.get_dispatch_layout(ids, NUM_EXPERTS)
    return buffer.dispatch(X, num_tokens_per_rank=counts, is_token_in_rank=there, num_tokens_per_expert=pairs, topk_idx=ids,
                           topk_weights=torch.ones(3, 2))


def use(buffer, handle):
    """The rows of a cached dispatch and the sums of a combine."""
    received = buffer.dispatch(X, handle=handle)[0]
    return received, buffer.combine(received, handle)[0]


def is_right(results):
    return torch.equal(results[0], RECEIVED) and torch.equal(results[1], SUMS)


def known(buffer):
    return len(buffer.runtime.engine._shown)


def test_the_same_tensors_are_known(buffer, adopted):
    handle = dispatch(buffer)[4]
    for form in (handle, list(handle)):
        assert is_right(use(buffer, form)) and adopted == []


@pytest.mark.parametrize("change", [
    lambda handle: tuple(tensor.clone() for tensor in handle),
    lambda handle: tuple(tensor.detach() for tensor in handle),
    lambda handle: (*handle[:5], handle[5].clone()),
    lambda handle: (*handle[:2], handle[1].clone(), *handle[3:]),
], ids=["all cloned", "other objects", "one cloned", "the second tokens cloned"])
def test_other_tensors_are_adopted(buffer, adopted, change):
    assert is_right(use(buffer, change(dispatch(buffer)[4]))) and len(adopted) == 2


def test_tensors_of_two_handles_are_adopted(buffer, adopted):
    one, two = dispatch(buffer)[4], dispatch(buffer)[4]
    assert is_right(use(buffer, (*one[:3], *two[3:]))) and len(adopted) == 2


@pytest.mark.parametrize("index", [0, 1, 3, 4, 5])
def test_a_change_in_place_is_seen(buffer, adopted, index):
    handle = dispatch(buffer)[4]
    handle[index].copy_(handle[index].clone())
    assert is_right(use(buffer, handle)) and len(adopted) == 2


def test_changed_values_count(buffer):
    handle = dispatch(buffer)[4]
    handle[5].fill_(-1)
    with pytest.raises(anyep.ArgumentError, match=r"handle\[4\]"):
        buffer.combine(RECEIVED, handle)


def test_in_inference_mode(buffer, adopted):
    with torch.inference_mode():
        handle = dispatch(buffer)[4]
        assert is_right(use(buffer, handle)) and adopted == []
    assert is_right(use(buffer, handle)) and adopted == []


def test_another_buffer_adopts(buffer, adopted):
    other = deep_ep.Buffer(anyep.LocalGroup(1).member(0), 8 << 20)
    assert is_right(use(other, dispatch(buffer)[4])) and len(adopted) == 2
    other.destroy()


def test_what_autograd_saved_is_known(buffer, adopted):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            received, _, _, _, handle, _ = dispatch(buffer)
            ctx.save_for_backward(received, *handle)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            received, *handle = ctx.saved_tensors
            return buffer.combine(received, handle)[0]

    x = X.clone().requires_grad_()
    y = Function.apply(x)
    gc.collect()
    assert known(buffer) == 1
    y.sum().backward()
    assert torch.equal(x.grad, SUMS) and adopted == []
    del y
    gc.collect()
    assert known(buffer) == 0


@pytest.fixture
def low_latency_calls(monkeypatch):
    """A Buffer, the table that a dispatch leaves, as on GPUs, and the tables that combines get; CPU ranks have none."""
    made = deep_ep.Buffer(anyep.LocalGroup(1).member(0), 8 << 20, 8 << 20, low_latency_mode=True, explicitly_destroy=True)
    left, got, run = torch.zeros(1, 4, 2, dtype=torch.int32), [], low_latency.run

    def run_with_rows(method, runtime, send, arguments, *rest):
        if method is low_latency.DISPATCH:
            slabs, event, hook = run(method, runtime, send, arguments, *rest)
            return (*slabs[:5], left), event, hook
        source, layout_range, rows = arguments[3]
        got.append(rows)
        return run(method, runtime, send, (*arguments[:3], (source, layout_range, None), *arguments[4:]), *rest)

    monkeypatch.setattr(low_latency, "run", run_with_rows)
    yield made, left, got
    made.destroy()


def test_low_latency_rows_go_with_the_tensors_of_their_dispatch(low_latency_calls):
    buffer, left, got = low_latency_calls
    x, weights = torch.ones(3, 128, dtype=torch.bfloat16), torch.ones(3, 2)

    def combine(handle, ids=IDS):
        buffer.low_latency_combine(rows, ids, weights[:, :ids.shape[1]].contiguous(), handle)
        return got.pop()

    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, IDS, 4, NUM_EXPERTS, use_fp8=False)
    assert combine(handle) is left and combine(list(handle)) is left
    assert combine((handle[0].clone(), *handle[1:])) is None
    assert combine((handle[0], handle[1].clone(), *handle[2:])) is None
    assert combine(handle, IDS[:, :1].contiguous()) is None  # a table of another shape
    handle[0].copy_(handle[0].clone())
    assert combine(handle) is None  # the rows are where the tensor says now
    assert known(buffer) == 1
    del handle
    assert known(buffer) == 0


def test_nothing_is_kept_alive(buffer):
    handle = dispatch(buffer)[4]
    held = [weakref.ref(tensor) for tensor in handle]
    assert known(buffer) == 1
    del handle
    assert known(buffer) == 0 and all(tensor() is None for tensor in held)


def test_destroyed_buffers_forget(buffer):
    engine = buffer.runtime.engine
    handle = dispatch(buffer)[4]
    assert len(engine._shown) == 1 and len(handle) == 6
    buffer.destroy()
    assert len(engine._shown) == 0


def test_ranks_may_differ():
    """One rank passes the tensors that it got, the other copies."""
    def rank(bootstrap):
        buffer = deep_ep.Buffer(bootstrap, 8 << 20)
        handle = dispatch(buffer)[4]
        form = handle if bootstrap.rank == 0 else [tensor.clone() for tensor in handle]
        received = buffer.dispatch(X, handle=form)[0]
        sums = buffer.combine(received, form)[0]
        buffer.destroy()
        return sums

    both = torch.cat([2 * X[:1], X[1:2], torch.zeros(1, 16)])  # token 0 goes to both ranks, token 1 to one
    assert all(torch.equal(sums, both) for sums in anyep.run_threads(2, rank))


def test_a_number_of_another_object_is_nobody():
    """Python gives the address of a dead object to the next one."""
    shown = _native.ShownHandles()
    one, two = torch.zeros(1), torch.zeros(1)
    shown.add("handle", (one, two))
    assert shown.find((one, two)) == "handle"
    assert shown.find((two, one)) is None and shown.find((one,)) is None and shown.find((one, one)) is None
    address = id(two)
    del two
    others = []
    while len(others) < 1000 and (not others or id(others[-1]) != address):
        others.append(torch.zeros(1))
    assert id(others[-1]) == address and shown.find((one, others[-1])) is None
    del one
    assert len(shown) == 0


def test_tables_may_go_before_tensors():
    shown, tensor = _native.ShownHandles(), torch.zeros(1)
    shown.add("handle", (tensor,))
    shown.add("another", (tensor,))
    assert shown.find((tensor,)) == "another" and len(shown) == 1
    del shown
    gc.collect()
    del tensor
