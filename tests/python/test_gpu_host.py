"""What the packages do for GPUs on the host, without one: streams, views, memory that torch's allocator takes from a window, and
deep_ep's calls for GPUs on CPU ranks that play them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import types
import weakref

import numpy as np
import pytest
import torch

import anyep
from anyep import Rows, _gpu, _native
from anyep._ahead import dispatch_ahead
from anyep.arrays import torch_library, view
from deep_ep import EventHandle, EventOverlap
from deep_ep import gpu as deep_ep_gpu
from deep_ep import high_throughput, streams
from engines import IDS, on_ranks, rows_expected, tokens_of

SUM_OF_IDS = torch.tensor(IDS)


# ---- where an engine lies


class Stream:
    def __init__(self, number):
        self.cuda_stream = number


def test_streams_by_number():
    cupy = types.SimpleNamespace(ptr=5)
    protocol = types.SimpleNamespace(__cuda_stream__=lambda: (0, 6))
    assert [_gpu.number_of(stream) for stream in (0, 7, Stream(4), cupy, protocol)] == [0, 7, 4, 5, 6]
    with pytest.raises(TypeError, match="CUDA stream"):
        _gpu.number_of("side")


def test_the_device_of_an_engine(monkeypatch):
    monkeypatch.delenv("ANYEP_BACKEND", raising=False)
    assert _gpu.device_of(None, None) == -1
    assert [_gpu.device_of(device, None) for device in (-1, "cpu", torch.device("cpu"), 3, "cuda:2", torch.device("cuda", 1))
            ] == [-1, -1, -1, 3, 2, 1]
    for wrong in (-2, "mps", "nothing"):
        with pytest.raises(anyep.ArgumentError, match="device"):
            _gpu.device_of(wrong, None)
    monkeypatch.setenv("ANYEP_BACKEND", "cpu")
    assert _gpu.device_of(3, None) == -1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.delenv("ANYEP_BACKEND", raising=False)
    with pytest.raises(anyep.UnsupportedError, match="torch sees no GPU"):
        anyep.Engine.create(None, rows_bytes=1 << 20, device=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_library_itself_says_so_too(monkeypatch):
    monkeypatch.delenv("ANYEP_BACKEND", raising=False)
    with pytest.raises(anyep.UnsupportedError, match="ANYEP_CUDA|driver|GPU"):
        _native.create(anyep.LocalGroup(1).member(0), 0, 8 << 20, 0, 64, False, anyep.Tuning())


def test_cpu_ranks_have_no_streams():
    with anyep.Engine.create(None, rows_bytes=8 << 20) as engine:
        assert engine.device == -1
        with pytest.raises(anyep.ArgumentError, match="stream"):
            engine.route(SUM_OF_IDS, 8, stream=1)


# ---- views


def on_gpu(array, device=0):
    interface = {"data": (array.ctypes.data, False), "shape": array.shape, "strides": array.strides,
                 "typestr": array.dtype.str, "version": 3}
    return types.SimpleNamespace(__cuda_array_interface__=interface, device=types.SimpleNamespace(id=device),
                                 dtype=array.dtype, shape=array.shape)


def test_cuda_array_interface():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    seen = view("dispatch", "x", on_gpu(array), 0)
    assert (seen.address, seen.dtype, seen.shape, seen.strides) == (array.ctypes.data, "float32", (4, 3), (6, 2))
    bits = np.zeros((2, 8), dtype=np.uint16)
    typed = view("dispatch", "x", anyep.Typed(on_gpu(bits), "bfloat16"), 0)
    assert typed.dtype == "bfloat16" and typed.strides == (8, 1)


@pytest.mark.parametrize("array, device, allowed", [
    (on_gpu(np.zeros((2, 2), np.float32)), -1, "CPU"), (on_gpu(np.zeros((2, 2), np.float32)), 1, "GPU 1"),
    (torch.zeros(2, 2), 0, r"GPU 0 \(cuda:0\)"), (torch.zeros(2, 2, device="meta"), 0, "GPU 0"),
    (np.zeros((2, 2), np.float32), 0, "GPU")], ids=["gpu for cpu", "other gpu", "torch", "meta", "numpy"])
def test_tensors_elsewhere_are_refused(array, device, allowed):
    with pytest.raises(anyep.ArgumentError, match=rf"dispatch: x = .*allowed: .*{allowed}") as caught:
        view("dispatch", "x", array, device)
    assert caught.value.argument == "x"


# ---- memory


def test_torchs_allocator_takes_memory_from_the_window():
    library = ctypes.CDLL(_native.__file__)
    allocate, free = getattr(library, _native.ALLOCATE), getattr(library, _native.FREE)
    allocate.restype, allocate.argtypes = ctypes.c_void_p, (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
    free.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
    assert allocate(64, 0, None) is None and "no engine" in _native.refusal()
    with anyep.Engine.create(None, rows_bytes=8 << 20) as engine:
        window = engine._native.memory(False, 0, 8 << 20)
        freed = _native.num_freed()
        _native.allocate_from(engine._native)
        try:
            first, second = allocate(1 << 20, 0, None), allocate(1 << 20, 0, None)
            assert allocate(1 << 30, 0, None) is None and "need" in _native.refusal()
        finally:
            _native.allocate_from(None)
        assert all(window.address <= address < window.address + window.bytes for address in (first, second))
        assert abs(first - second) >= 1 << 20
        ctypes.memset(second, 7, 1 << 20)
        free(first, 1 << 20, 0, None)
        free(0x1000, 1, 0, None)  # of nobody
        assert _native.num_freed() == freed + 1
    free(second, 1 << 20, 0, None)  # behind the engine's end
    assert _native.num_freed() == freed + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_pools_there_is_ordinary_memory():
    with anyep.Engine.create(None, rows_bytes=8 << 20) as engine:
        pool = _gpu.WindowPool(engine._native, 0)
        assert pool.empty(None, [((4, 4), torch.float32)] * 2) == [None, None]
        assert pool.empty(None, [((4, 4), torch.float32)] * 2) == [None, None]


class Shelf(_gpu.WindowPool):
    """A pool as torch has it: a tensor comes from the smallest free block that it fits into, at its front."""

    def __init__(self, blocks):
        super().__init__(None, 0)
        self._begin = "torch has what it takes"
        self._memory = torch.zeros(sum(blocks), dtype=torch.uint8)
        self._blocks = [(sum(blocks[:at]), size) for at, size in enumerate(blocks)]
        self._taken = {}

    def empty(self, gpu, parts, ahead=False):
        (shape, dtype), = parts
        num_bytes = math.prod(shape) * dtype.itemsize
        free = [block for block in self._blocks if self._taken.get(block[0], lambda: None)() is None and block[1] >= num_bytes]
        if not free:
            return [None]
        begin = min(free, key=lambda block: block[1])[0]
        tensor = self._memory[begin:begin + num_bytes].view(dtype).view(shape)
        self._taken[begin] = weakref.ref(tensor)
        return [tensor]


MIB = 1 << 20


@pytest.mark.parametrize("blocks, whole_block", [([8 * MIB], False), ([4 * MIB, 8 * MIB], True), ([9 * MIB, 8 * MIB], False)],
                         ids=["one block", "a smaller one fits better", "a larger one"])
def test_rows_made_ahead_are_cut_where_they_lie(blocks, whole_block):
    pool = Shelf(blocks)
    held = pool.empty(None, [((8, MIB), torch.uint8)], ahead=True)
    address = held[0].data_ptr()
    held[0][:3] = 7
    rows = pool.cut(held, 3, None)
    assert held == [] and rows.shape == (3, MIB) and rows.data_ptr() == address and bool((rows == 7).all())
    if not whole_block:  # a view of the whole, whose life this shelf does not see
        again = pool.empty(None, [((8, MIB), torch.uint8)])[0]
        assert again is None or again.data_ptr() != address  # the rows' place is taken


def test_little_is_not_worth_a_cut():
    pool = Shelf([8 * MIB])
    for num_rows in (7, 8, 0):
        held = pool.empty(None, [((8, MIB), torch.uint8)], ahead=True)
        pool._begin = "something" if num_rows else None  # nor where torch lacks what it takes
        assert pool.cut(held, num_rows, None).shape == (num_rows, MIB)


@pytest.mark.parametrize("by_functions", [True, False], ids=["functions for C callers", "capsules"])
def test_tensors_keep_what_they_show(by_functions):
    torch_library()
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if by_functions and exchange is None:
        pytest.skip("this torch has none")  # before 2.10; the packages serve it, by the capsules of the other case
    _native.use_torch(torch.Tensor, exchange if by_functions else None, torch._C._from_dlpack)
    try:
        with anyep.Engine.create(None, rows_bytes=8 << 20) as engine:
            memory = engine._native.memory(False, 4096, 24)
            shown = _native.tensor_of(_native.View(memory.address, _native.DTYPES["int32"][0], (2, 2), (1, 0)), -1, memory)
            address = memory.address
            del memory
        torch.frombuffer((ctypes.c_int32 * 2).from_address(address), dtype=torch.int32)[:] = torch.tensor([3, 5], dtype=torch.int32)
        assert shown.dtype == torch.int32 and shown.stride() == (1, 0) and shown.tolist() == [[3, 3], [5, 5]]
    finally:
        _native.use_torch(torch.Tensor, exchange, torch._C._from_dlpack)


# ---- deep_ep's calls for GPUs, on CPU ranks that play them


class Played:
    """The native engine of a CPU rank, with what only GPUs have."""

    def __init__(self, native):
        self._native = native

    def __getattr__(self, name):
        return getattr(self._native, name)

    def route(self, *arguments):
        handle = self._native.route(*arguments)
        handle.num_rows()  # what follows looks at arrays, for which a CPU rank would wait with the interpreter's lock
        return handle

    def dispatch_fresh(self, *arguments):
        handle, event, dispatched = self._native.dispatch_fresh(*arguments)
        handle.num_rows()  # likewise
        if dispatched:
            event.wait()  # what torch does next would come behind it on a stream
        return handle, event, dispatched

    def adopt(self, rows_until, place, source, tokens, stream):
        return _native.Handle.adopt(self._native.num_ranks, self._native.rank, rows_until, place, source, tokens)


def cut(held, num_rows):
    """As ``Gpu.cut``: a place is kept only where nobody else holds the tensor."""
    whole = held.pop()
    gone, rows = weakref.ref(whole), torch.empty(0, dtype=whole.dtype).set_(whole.untyped_storage(), 0, whole.shape)[:num_rows]
    del whole
    assert gone() is None
    return rows


def play(engine, guess=None, in_window=True):
    """``guess``: rows that are made ahead; None: the window has no room for any. ``in_window``: may results lie there?"""
    engine._native = Played(engine._native)
    engine._native.rows_ahead = lambda num_tokens: guess
    empty = lambda shape, dtype: torch.empty(shape, dtype=dtype)  # noqa: E731
    rows = lambda *parts: [empty(*part) for part in parts]  # noqa: E731
    ahead = lambda *parts: [None if guess is None else [empty(*part)] for part in parts]  # noqa: E731
    engine._gpu = types.SimpleNamespace(device=-1, stream=lambda: 0, is_capturing=lambda: False, new=empty, rows=rows,
                                        rows_ahead=ahead, cut=cut,
                                        torch_device=torch.device("cpu"), pool=types.SimpleNamespace(close=lambda: None))
    return types.SimpleNamespace(gpu=engine._gpu, rows_in_window=lambda: in_window)


@pytest.mark.parametrize("worst, guess, in_window", [(0, None, True), (0, 20, True), (0, 1, True), (40, None, True), (0, 20, False)],
                         ids=["no room ahead", "room ahead", "too little room", "worst", "a stop on the way"])
def test_calls_for_gpus(worst, guess, in_window):
    def body(engine):
        counts, pairs, there = engine.layout(torch.tensor(IDS), 8)
        # Ranks differ in what they do, and their peers cannot tell.
        runtime = play(engine, None if engine.rank == 3 else guess, in_window)
        ids, weights = torch.tensor(IDS), torch.ones(5, 2)
        x = tokens_of(engine.rank, torch.bfloat16)

        def place():
            return deep_ep_gpu.place_of(high_throughput.DISPATCH, runtime, None, False, False)

        got, got_ids, got_weights, count_list, handle, end = deep_ep_gpu.routed_dispatch(
            runtime, engine, place(), x, (counts, there, pairs), ids, weights, 1, worst, 1)
        engine.barrier()
        expected = rows_expected(engine.rank)
        count = len(expected)
        assert end.event is None and got.shape == (worst or count, 32) and (count_list == []) == bool(worst)
        for row, (source, token) in enumerate(expected):
            assert torch.equal(got[row], tokens_of(source, torch.bfloat16)[token])
        assert got.untyped_storage().nbytes() == got.nbytes or (in_window and guess == 20)  # what was made ahead is larger
        assert bool((got_ids[count:] == -1).all()) and got_weights.shape == (worst or count, 2)
        prefix = [sum(source <= rank for source, _ in expected) for rank in range(4)]
        assert handle[0].shape == (4, 4) and handle[0][:, engine.rank].tolist() == prefix
        assert handle[1].tolist() == [[5]] * 4 and handle[2] is handle[1] and handle[4] is there
        assert handle[3][:count].tolist() == [token for _, token in expected]
        if worst:  # a CPU rank's handle has as many source tokens as rows, a GPU's as the dispatch had room for
            return
        for form in (handle, [tensor.clone() for tensor in handle]):
            again, *rest = deep_ep_gpu.cached_dispatch(runtime, engine, place(), x, form, 1)
            sums, sums_of_weights, _ = deep_ep_gpu.combine(engine, place(), got, form, got_weights, (None, x), 1)
            engine.barrier()
            assert rest[:4] == [None] * 4 and torch.equal(again, got)
            ranks = there.sum(dim=1, keepdim=True).float()
            assert torch.equal(sums, (x.float() * (ranks + 1)).to(torch.bfloat16))
            assert sums_of_weights.shape == (5, 2)
        for broken in (handle[:5], (handle[0][:2], *handle[1:]), (*handle[:5], handle[5].long())):
            with pytest.raises(anyep.ArgumentError, match="handle"):
                deep_ep_gpu.cached_dispatch(runtime, engine, place(), x, broken, 1)

    on_ranks(4, body)


def test_an_error_while_rows_are_made_is_the_calls():
    def no_memory(shape, dtype):
        raise RuntimeError("no memory")

    with anyep.Engine.create(None, rows_bytes=8 << 20) as engine:
        given = engine.layout(torch.tensor(IDS), 8)
        runtime = play(engine, 20)
        arguments = torch.ones(5, 32), (given[0], given[2], given[1]), torch.tensor(IDS), torch.ones(5, 2), 1, 0, 1
        good, engine._gpu.new = engine._gpu.new, no_memory
        with pytest.raises(RuntimeError, match="no memory"):
            deep_ep_gpu.routed_dispatch(runtime, engine, streams.Place(runtime, None, False, False), *arguments)
        engine._gpu.new = good
        got = deep_ep_gpu.routed_dispatch(runtime, engine, streams.Place(runtime, None, False, False), *arguments)[0]
        assert got.shape == (int(given[2].sum()), 32) and bool((got == 1).all())


@pytest.mark.parametrize("guess, moved", [(20, True), (1, False), (None, False)], ids=["room", "too little", "none"])
def test_rows_made_ahead(guess, moved):
    def body(engine):
        handle = engine.route(torch.tensor(IDS), 8, wait=False)
        runtime = play(engine, guess)
        engine._gpu.torch = torch
        x = tokens_of(engine.rank, torch.bfloat16)
        given = Rows(x, None, torch.tensor(IDS), torch.ones(5, 2), (torch.arange(5, dtype=torch.int32)[:, None],))
        views = tuple(None if tensor is None else view("dispatch", "x", tensor) for tensor in given[:4])
        done = dispatch_ahead(engine, handle, given, (*views, [view("dispatch", "extra", given.extra[0])]), (0.0, 1, [], True))
        assert (done is not None) == moved and runtime.gpu is engine._gpu
        if done is None:
            engine._gpu = None
            done = engine.dispatch(x, handle, experts=given.experts, weights=given.weights, extra=given.extra)
        expected = rows_expected(engine.rank)
        assert done.rows.x.shape == (len(expected), 32) and done.rows.experts.shape == done.rows.weights.shape
        for row, (source, token) in enumerate(expected):
            assert torch.equal(done.rows.x[row], tokens_of(source, torch.bfloat16)[token])
            assert done.rows.extra[0][row].item() == token

    on_ranks(4, body)


def test_exact_sizes_are_refused_in_a_capture():
    with anyep.Engine.create(None, rows_bytes=8 << 20) as engine:
        counts, pairs, there = engine.layout(torch.tensor(IDS), 8)
        runtime = play(engine)
        engine._gpu.is_capturing = lambda: True
        with pytest.raises(anyep.UnsupportedError, match="num_worst_tokens"):
            deep_ep_gpu.routed_dispatch(runtime, engine, streams.Place(runtime, None, False, False), torch.zeros(5, 32),
                                        (counts, there, pairs), None, None, 1, 0, 1)


# ---- who waits for whom


class FakeStream(Stream):
    def __init__(self, name, log):
        super().__init__(name)
        self._log = log

    def wait_stream(self, other):
        self._log.append((self.cuda_stream, "waits for", other.cuda_stream))

    def wait_event(self, event):
        self._log.append((self.cuda_stream, "waits for", event))


class FakeEvent:
    def __init__(self, log):
        self._log = log

    def wait(self, stream):
        self._log.append((stream, "waits for", "the operation"))


class FakeTensor:
    def __init__(self, name, log):
        self._name, self._log = name, log

    def record_stream(self, stream):
        self._log.append((stream.cuda_stream, "uses", self._name))


@pytest.fixture
def fakes(monkeypatch):
    log = []
    caller, queue = FakeStream("S", log), FakeStream("Q", log)
    fake = types.SimpleNamespace(current_stream=lambda *_: caller, Event=type("Event", (), {}), capturing=False,
                                 stream=lambda stream: contextlib.nullcontext(log.append(("now", "is", stream.cuda_stream))))
    fake.is_current_stream_capturing = lambda: fake.capturing
    monkeypatch.setattr(streams, "torch", types.SimpleNamespace(cuda=fake))
    runtime = types.SimpleNamespace(gpu=types.SimpleNamespace(device=0, stream=lambda: "S"), get_comm_stream=lambda: queue)
    return types.SimpleNamespace(log=log, runtime=runtime, caller=caller, queue=queue, cuda=fake)


def one_operation(fakes, before=None, async_finish=False, on_comm_stream=False):
    place = streams.Place(fakes.runtime, before, async_finish, on_comm_stream)
    with place:
        fakes.log.append((place.number, "runs", "the operation"))
    return place.finish(high_throughput.DISPATCH, FakeEvent(fakes.log), (FakeTensor("input", fakes.log), None),
                        (FakeTensor("output", fakes.log), None))


RUN, USES = ("Q", "runs", "the operation"), ("S", "uses", "output")


def test_synchronous_calls_run_on_the_callers_stream(fakes):
    assert one_operation(fakes).event is None
    assert fakes.log == [("S", "runs", "the operation")]


def test_asynchronous_calls_run_on_the_comm_stream(fakes):
    assert one_operation(fakes, async_finish=True).event is not None
    assert fakes.log == [("Q", "waits for", "S"), ("now", "is", "Q"), RUN, USES, ("Q", "uses", "input")]


def test_a_previous_event_replaces_the_wait_for_the_caller(fakes):
    before = EventHandle()
    before._recorded = "an event"
    assert one_operation(fakes, before).event is None
    assert fakes.log == [("Q", "waits for", "an event"), ("now", "is", "Q"), RUN, USES, ("S", "waits for", "the operation")]
    fakes.log.clear()
    assert one_operation(fakes, before, True, True).event is not None
    assert fakes.log == [("Q", "waits for", "an event"), ("now", "is", "Q"), RUN, ("Q", "uses", "input")]


def test_in_a_capture_the_event_holds_what_the_operation_uses(fakes):
    fakes.cuda.capturing = True
    event = one_operation(fakes, async_finish=True)
    assert ("Q", "uses", "input") not in fakes.log
    assert [tensor._name for tensor in event.event._keep if tensor is not None] == ["input", "output"]


def test_the_comm_stream_may_be_the_current_one(fakes):
    fakes.cuda.current_stream = lambda *_: fakes.queue
    one_operation(fakes, async_finish=True)
    assert fakes.log == [("now", "is", "Q"), RUN]


def test_outputs_on_the_comm_stream_need_an_event_before_and_after():
    for event, async_finish in ((None, True), (EventOverlap(None), True), (EventOverlap(EventHandle()), False)):
        with pytest.raises(anyep.ArgumentError, match="allocate_on_comm_stream"):
            deep_ep_gpu.place_of(high_throughput.COMBINE, None, event, async_finish, True)
