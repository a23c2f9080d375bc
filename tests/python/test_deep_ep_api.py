"""deep_ep's names, signatures, attributes and import, as callers written for V1 see them."""

from __future__ import annotations

import inspect
import subprocess
import sys
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import anyep  # noqa: E402
import deep_ep  # noqa: E402
from deep_ep import Buffer, Config, EventHandle, EventOverlap  # noqa: E402
from ranks import run  # noqa: E402

EVENTS = "previous_event=None, async_finish=False, allocate_on_comm_stream=False"
DISPATCH = ("self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, "
            "num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None, "
            + EVENTS)
COMBINE = "self, x, handle, topk_weights=None, bias=None, config=None, " + EVENTS
SIGNATURES = {
    "Buffer.__init__": "self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24, "
                       "allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, use_fabric=False, "
                       "explicitly_destroy=False, enable_shrink=False, comm=None",
    "Buffer.destroy": "self",
    "Buffer.is_sm90_compiled": "", "Buffer.set_num_sms": "new_num_sms", "Buffer.capture": "",
    "Buffer.get_dispatch_config": "num_ranks", "Buffer.get_combine_config": "num_ranks",
    "Buffer.get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts",
    "Buffer.get_comm_stream": "self",
    "Buffer.get_local_buffer_tensor": "self, dtype, size=None, offset=0, use_rdma_buffer=False",
    "Buffer._unpack_bias": "bias",
    "Buffer.get_dispatch_layout": "self, topk_idx, num_experts, " + EVENTS,
    "Buffer.dispatch": DISPATCH, "Buffer.internode_dispatch": DISPATCH,
    "Buffer.combine": COMBINE, "Buffer.internode_combine": COMBINE,
    "Buffer.low_latency_dispatch":
        "self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, cumulative_local_expert_recv_stats=None, "
        "dispatch_wait_recv_cost_stats=None, use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False, "
        "return_recv_hook=False",
    "Buffer.low_latency_combine":
        "self, x, topk_idx, topk_weights, handle, use_logfmt=False, zero_copy=False, async_finish=False, "
        "return_recv_hook=False, out=None, combine_wait_recv_cost_stats=None",
    "Buffer.get_next_low_latency_combine_buffer": "self, handle",
    "Buffer.clean_low_latency_buffer": "self, num_max_dispatch_tokens_per_rank, hidden, num_experts",
    "Buffer.low_latency_update_mask_buffer": "self, rank_to_mask, mask=False",
    "Buffer.low_latency_query_mask_buffer": "self, mask_status", "Buffer.low_latency_clean_mask_buffer": "self",
    "Config.__init__": "self, num_sms=20, num_max_nvl_chunked_send_tokens=6, num_max_nvl_chunked_recv_tokens=256, "
                       "num_max_rdma_chunked_send_tokens=6, num_max_rdma_chunked_recv_tokens=256",
    "Config.get_nvl_buffer_size_hint": "self, hidden_bytes, num_ranks",
    "Config.get_rdma_buffer_size_hint": "self, hidden_bytes, num_ranks",
    "EventHandle.__init__": "self", "EventHandle.current_stream_wait": "self",
    "EventOverlap.__init__": "self, event=None, extra_tensors=None",
    "EventOverlap.current_stream_wait": "self, release_handle=False",
    "EventOverlap.register_hook_after_wait": "self, fn", "EventOverlap.__call__": "self, release_handle=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    kind, method = name.split(".")
    function = getattr(getattr(deep_ep, kind), method)
    assert inspect.isfunction(function) and not hasattr(function, "__wrapped__")
    got = ", ".join(parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}"
                    for parameter in inspect.signature(function).parameters.values())
    assert got == SIGNATURES[name]
    assert function.__doc__ or method.startswith("_")


def test_static_methods_are_static():
    for name in ("is_sm90_compiled", "set_num_sms", "capture", "get_dispatch_config", "get_combine_config",
                 "get_low_latency_rdma_size_hint", "_unpack_bias"):
        assert isinstance(inspect.getattr_static(Buffer, name), staticmethod), name


def test_names_and_where_they_are():
    import deep_ep.buffer
    import deep_ep.buffers.legacy
    import deep_ep.utils
    import deep_ep_cpp

    assert deep_ep.buffer.Buffer is deep_ep.buffers.legacy.Buffer is Buffer
    for module in (deep_ep.utils, deep_ep):
        assert module.EventHandle is EventHandle and module.EventOverlap is EventOverlap
    assert deep_ep_cpp.EventHandle is EventHandle and deep_ep_cpp.topk_idx_t is deep_ep.topk_idx_t
    assert deep_ep_cpp.is_sm90_compiled() is True and Buffer.is_sm90_compiled() is True
    assert deep_ep.utils.check_nvlink_connections(None) is None
    assert {"envs", "math", "testing"} <= set(dir(deep_ep.utils))
    assert deep_ep.__provider__ == "anyep"
    assert deep_ep.__version__ == "1.2.1+anyep." + anyep.__version__.replace("+", ".")
    assert isinstance(deep_ep.topk_idx_t, torch.dtype) and deep_ep.topk_idx_t == torch.int64


def test_names_of_other_generations_are_absent():
    for name in ("ElasticBuffer", "EPHandle", "EPBuffer", "HybridEPBuffer", "BufferAllocator"):
        assert not hasattr(deep_ep, name), name
    assert not hasattr(Buffer, "get_low_latency_rdma_size_hint_m2n")


def test_errors_are_those_of_anyep():
    bases = {"ArgumentError": ValueError, "PeerTimeoutError": TimeoutError, "CapacityError": RuntimeError,
             "StateError": RuntimeError, "MismatchError": RuntimeError, "PeerDeadError": RuntimeError,
             "UnsupportedError": RuntimeError, "DeviceError": RuntimeError, "ResourceError": RuntimeError}
    for name, base in bases.items():
        error = getattr(deep_ep, name)
        assert error is getattr(anyep, name) and issubclass(error, base) and issubclass(error, deep_ep.Error)


# ---- import


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True,
                          timeout=120)


def test_import_prints_nothing_sets_nothing_and_starts_nothing():
    code = """
import os, torch, threading
before, threads, descriptors = dict(os.environ), os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
import deep_ep, deep_ep_cpp, deep_ep.buffers.legacy
assert dict(os.environ) == before
assert len(os.listdir("/proc/self/task")) == len(threads)
assert len(os.listdir("/proc/self/fd")) == len(descriptors)
assert not torch.cuda.is_initialized()
deep_ep.Buffer.set_num_sms(24), deep_ep.Buffer.get_dispatch_config(8).get_nvl_buffer_size_hint(16, 8), deep_ep.EventHandle()
assert not torch.cuda.is_initialized()
"""
    done = in_fresh_process(code, NVSHMEM_QP_DEPTH="many", EP_BUFFER_DEBUG="1", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("missing, word", [("torch", "torch"), ("anyep._native", "native part")])
def test_what_is_missing_gives_an_import_error_that_says_so(missing, word):
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import deep_ep
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = in_fresh_process(code)
    assert done.stdout.startswith("ImportError") and word in done.stdout and "nstall" in done.stdout


@pytest.mark.parametrize("bits, dtype", [("32", "torch.int32"), ("64", "torch.int64"), ("16", "ImportError")])
def test_topk_idx_t_by_the_environment(bits, dtype):
    code = """
try:
    import deep_ep
    config = deep_ep.Buffer.get_dispatch_config(4)
    print(deep_ep.topk_idx_t, config.get_nvl_buffer_size_hint(14336, 4) - 10 * 4 * 256 * 128 * (deep_ep.topk_idx_t.itemsize - 8))
except ImportError as error:
    print("ImportError", error)
"""
    done = in_fresh_process(code, ANYEP_TOPK_IDX_BITS=bits)
    assert done.stdout.startswith(dtype), done
    assert "167854976" in done.stdout or "ANYEP_TOPK_IDX_BITS = '16', allowed: 64, 32" in done.stdout


# ---- a Buffer


def test_attributes_and_runtime(monkeypatch):
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "77")

    def body(comm):
        buffer = Buffer(None, 1000, 2000, low_latency_mode=True, explicitly_destroy=True, enable_shrink=True, comm=comm,
                        num_qps_per_rank=8.0, allow_nvlink_for_low_latency_mode=False, allow_mnnvl=True, use_fabric=True)
        assert buffer.group is comm and buffer.rank == comm.Get_rank() and buffer.group_size == 2
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1000, 2000)
        assert (buffer.low_latency_mode, buffer.explicitly_destroy, buffer.enable_shrink) == (True, True, True)
        assert buffer.nvshmem_qp_depth == 77
        assert buffer.get_dispatch_config(2).num_sms == buffer.num_sms == 20
        runtime = buffer.runtime
        assert runtime.is_available() and runtime.get_num_rdma_ranks() == 1 and runtime.get_rdma_rank() == 0
        assert runtime.get_root_rdma_rank(True) == buffer.rank and runtime.get_root_rdma_rank(False) == 0
        assert runtime.get_local_device_id() == -1
        assert runtime.get_local_buffer_tensor(torch.int32, 8, True).numel() == 498
        for asked in (buffer, runtime):
            with pytest.raises(deep_ep.UnsupportedError, match="get_comm_stream"):
                asked.get_comm_stream()
        buffer.destroy()
        assert buffer.runtime is None and not runtime.is_available()
        buffer.destroy()
        runtime.destroy()

    run(2, body)


def test_the_time_limit_is_100_s_unless_the_environment_says_otherwise(monkeypatch):
    from deep_ep.runtime import _tuning

    monkeypatch.delenv("ANYEP_TIMEOUT_S", raising=False)
    assert _tuning().timeout_s == 100
    monkeypatch.setenv("ANYEP_TIMEOUT_S", "7")
    assert _tuning().timeout_s == 7


def test_local_buffer_tensor():
    def body(comm):
        buffer = Buffer(None, 1001, 4100, low_latency_mode=True, comm=comm)
        nvl = buffer.get_local_buffer_tensor(torch.int8)
        assert nvl.shape == (1001,) and nvl.dtype == torch.int8
        nvl.fill_(3)
        assert buffer.get_local_buffer_tensor(torch.int32, offset=8).tolist() == [0x03030303] * 248
        rdma = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size([4, 5]), 100, use_rdma_buffer=True)
        assert rdma.shape == (4, 5) and rdma.is_contiguous()
        assert rdma.data_ptr() == buffer.get_local_buffer_tensor(torch.int8, None, 0, True).data_ptr() + 100
        assert buffer.get_local_buffer_tensor(torch.int8, offset=1001).numel() == 0
        for arguments, argument in ((dict(size=torch.Size([1002])), "size"), (dict(offset=-1), "offset"),
                                    (dict(offset=1002), "offset"), (dict(dtype=torch.int32, offset=2), "offset")):
            with pytest.raises(deep_ep.ArgumentError, match=r"^Buffer.get_local_buffer_tensor: ") as error:
                buffer.get_local_buffer_tensor(**{"dtype": torch.int8, **arguments})
            assert error.value.argument == argument
        buffer.destroy()
        assert nvl.sum() == 3003  # outlives the Buffer

    run(1, body)


def test_every_method_of_a_destroyed_buffer_is_refused():
    def body(comm):
        buffer = Buffer(None, 0, 0, low_latency_mode=True, enable_shrink=True, comm=comm)
        buffer.destroy()
        x = torch.zeros(1, 8)
        calls = {
            "get_dispatch_layout": (x, 1), "dispatch": (x,), "combine": (x, ()), "low_latency_dispatch": (x, x, 1, 1),
            "low_latency_combine": (x, x, x, ()), "get_next_low_latency_combine_buffer": ((),),
            "clean_low_latency_buffer": (1, 8, 1), "low_latency_update_mask_buffer": (0,),
            "low_latency_query_mask_buffer": (x,), "low_latency_clean_mask_buffer": (), "get_comm_stream": (),
            "get_local_buffer_tensor": (torch.int8,)}
        for name, arguments in calls.items():
            with pytest.raises(deep_ep.StateError, match=f"^Buffer.{name}: the Buffer is destroyed"):
                getattr(buffer, name)(*arguments)

    run(1, body)


def test_dropping_a_buffer_is_local_and_immediate(caplog):
    """No cycle keeps it, nobody waits, and who promised destroy() gets one line."""
    def body(comm):
        buffer = Buffer(None, 1 << 20, comm=comm, explicitly_destroy=comm.Get_rank() == 1)
        gone = weakref.ref(buffer)
        comm.allgather(None)
        del buffer
        assert gone() is None

    with caplog.at_level("WARNING", logger="anyep"):
        run(2, body)
    assert [record.getMessage() for record in caplog.records if "destroy()" in record.getMessage()] == [
        "Buffer: dropped without destroy(), though explicitly_destroy was given"]


def test_an_exit_without_destroy_is_clean():
    code = """
import deep_ep
class Comm:
    def Get_rank(self): return 0
    def Get_size(self): return 1
    def allgather(self, mine): return [mine]
buffer = deep_ep.Buffer(None, 1 << 20, 1 << 20, low_latency_mode=True, comm=Comm(), explicitly_destroy=False)
"""
    done = in_fresh_process(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_many_buffers_side_by_side_and_one_after_another():
    def body(comm):
        alive = [Buffer(None, 1 << 20, comm=comm) for _ in range(4)]
        for _ in range(20):
            Buffer(None, 1 << 20, comm=comm).destroy()
        ids = torch.tensor([[0], [1]])
        for buffer in alive[::-1]:
            counts, _, pairs, token_in_rank, _ = buffer.get_dispatch_layout(ids, 2)
            rows = buffer.dispatch(torch.ones(2, 8), None, counts, None, token_in_rank, pairs, ids, torch.ones(2, 1))[0]
            assert rows.shape == (2, 8)
            buffer.destroy()

    run(2, body)


# ---- defaults and threads of the caller


def test_defaults_of_torch_do_not_matter():
    """init_dist makes bfloat16 the default type; a default device may be anything."""
    before = torch.get_default_dtype()

    def body(comm):
        buffer = Buffer(None, 1 << 20, 1 << 22, low_latency_mode=True, comm=comm)
        cpu = dict(device="cpu")
        ids, weights = torch.tensor([[0, 1]], **cpu), torch.ones((1, 2), dtype=torch.float32, **cpu)
        x = torch.ones((1, 16), dtype=torch.bfloat16, **cpu)
        torch.set_default_device("meta")  # of this thread
        counts, _, pairs, token_in_rank, _ = buffer.get_dispatch_layout(ids, 2)
        rows, got, got_weights, _, handle, _ = buffer.dispatch(x, None, counts, None, token_in_rank, pairs, ids, weights)
        assert got_weights.dtype == torch.float32 and rows.device.type == "cpu"
        sums = buffer.combine(rows, handle, got_weights)
        assert sums[0].device.type == sums[1].device.type == "cpu" and sums[1].dtype == torch.float32
        (slab, scales), count, handle, _, _ = buffer.low_latency_dispatch(x, ids, 4, 2)
        assert {part.device.type for part in (slab, scales, count, handle[0], handle[1])} == {"cpu"}
        assert scales.dtype == torch.float32
        sums = buffer.low_latency_combine(torch.zeros(slab.shape, dtype=torch.bfloat16, **cpu), ids, weights, handle)[0]
        assert sums.dtype == torch.bfloat16 and sums.device.type == "cpu"
        assert buffer.get_next_low_latency_combine_buffer(handle).device.type == "cpu"
        buffer.destroy()

    torch.set_default_dtype(torch.bfloat16)
    try:
        run(1, body)
    finally:
        torch.set_default_dtype(before)


def test_backward_may_run_on_another_thread():
    import threading

    def body(comm):
        buffer = Buffer(None, 1 << 20, comm=comm)
        ids = torch.tensor([[0], [1], [1]])
        counts, _, pairs, token_in_rank, _ = buffer.get_dispatch_layout(ids, 2)
        rows, _, _, _, handle, _ = buffer.dispatch(torch.ones(3, 8), None, counts, None, token_in_rank, pairs, ids,
                                                   torch.ones(3, 1))
        results: list = []
        other = threading.Thread(target=lambda: results.append(buffer.combine(rows, handle)[0]))
        other.start()
        other.join()
        assert torch.equal(results[0], torch.ones(3, 8))
        buffer.destroy()

    run(2, body)


# ---- events


def test_event_overlap_without_an_event_does_nothing():
    event = EventOverlap(None, extra_tensors=("kept",))
    assert event.event is None and event.extra_tensors == ("kept",) and event.hook_after_wait is None
    event.current_stream_wait()
    with event:
        pass
    with event(release_handle=True) as same:
        assert same is event


def test_event_overlap_hooks_and_release():
    event = Buffer.capture()
    assert isinstance(event, EventOverlap) and isinstance(event.event, EventHandle)
    ran = []
    event.register_hook_after_wait(lambda: ran.append(1))
    with pytest.raises(deep_ep.StateError, match="register_hook_after_wait"):
        event.register_hook_after_wait(lambda: ran.append(2))
    event.current_stream_wait()
    event.current_stream_wait()
    assert ran == [1] and event.event is not None
    with event(True):
        pass
    assert event.event is None
    again = EventOverlap(EventHandle())
    with again(True):
        pass
    again.event = EventHandle()
    with again:  # the flag was for one block
        pass
    assert again.event is not None
    again.current_stream_wait(release_handle=True)
    assert again.event is None


def test_unpack_bias():
    one, two = torch.zeros(1), torch.ones(1)
    assert Buffer._unpack_bias(None) == (None, None) and Buffer._unpack_bias(one) == (one, None)
    assert Buffer._unpack_bias((one, two)) == (one, two) and Buffer._unpack_bias([None, two]) == (None, two)


def test_config_type_is_the_one_of_the_package():
    assert type(Buffer.get_dispatch_config(4)) is Config
    kept: Any = Config()
    with pytest.raises(AttributeError):
        kept.num_sms = 3
