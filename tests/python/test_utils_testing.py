"""deep_ep.utils.testing: what is timed, how often, and what is returned."""

import json
import os
import sys
import time

import pytest
import torch
from torch.profiler import record_function

from deep_ep.utils import testing

SLEEP_S = 0.004


def test_bench_times_the_call_alone():
    def slow():
        time.sleep(SLEEP_S)

    calls = []
    mean, least, largest = testing.bench(slow, num_warmups=0, num_tests=5, flush_l2=False,
                                         post_fn=lambda: (calls.append(1), time.sleep(5 * SLEEP_S)))
    assert len(calls) == 5
    assert SLEEP_S * 0.9 <= least <= mean <= largest
    # post_fn sleeps five times as long, and no other work is inside the span; a loaded machine may hold up some calls.
    assert least < 4 * SLEEP_S


def test_bench_counts_calls():
    calls = []
    testing.bench(lambda: calls.append(1), num_warmups=3, num_tests=4, flush_l2=False)
    assert len(calls) == 7


def test_bench_flushes_outside_the_span():
    mean, least, _ = testing.bench(lambda: None, num_warmups=0, num_tests=5)
    assert least < 1e-3  # writing 128 MiB takes more


@pytest.mark.parametrize("arguments", [dict(num_tests=0), dict(num_warmups=-1)])
def test_bench_refuses_no_tests(arguments):
    with pytest.raises(ValueError, match="bench: num_tests"):
        testing.bench(lambda: None, **arguments)


def test_bench_passes_exceptions():
    with pytest.raises(KeyError):
        testing.bench(lambda: {}["x"], num_warmups=0, num_tests=1, flush_l2=False)


def test_flush_ignores_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert testing.flush_l2_cache() is None
        assert testing.flush_l2_cache(enabled=False) is None
    finally:
        torch.set_default_dtype(torch.float32)


def send_and_receive():
    with record_function("demo::dispatch_kernel"):
        time.sleep(SLEEP_S)
    with record_function("demo::dispatch_kernel"):
        time.sleep(3 * SLEEP_S)
    with record_function("demo::combine_kernel"):
        time.sleep(SLEEP_S)


cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="counts CPU spans")


def kineto(names, **more):
    return testing.bench_kineto(send_and_receive, names, num_tests=3, flush_l2=False, **more)


@cpu_only
def test_bench_kineto_means_and_phases():
    # Only lower bounds and order: a loaded machine may hold up any span.
    assert kineto("dispatch_kernel") >= 2 * SLEEP_S * 0.9
    both = kineto(("dispatch", "combine"))
    assert isinstance(both, list) and len(both) == 2
    assert both[0] >= 2 * SLEEP_S * 0.9 and both[1] >= SLEEP_S * 0.9
    first, second = kineto("dispatch", num_kernels_per_period=2)
    assert first >= SLEEP_S * 0.9 and second >= 3 * SLEEP_S * 0.9
    # Nine spans: the phases of "::" are those of one call, and the names of a list keep their order.
    by_call, alone = kineto(["::", "dispatch"], num_kernels_per_period=3)
    assert len(by_call) == len(alone) == 3 and by_call[1] >= 3 * SLEEP_S * 0.9


@cpu_only
def test_bench_kineto_sees_operators():
    a = torch.ones((64, 64), dtype=torch.float32)
    assert 0 < testing.bench_kineto(lambda: torch.mm(a, a), "aten::mm", num_tests=2) < 1


@cpu_only
def test_bench_kineto_barrier_and_trace(tmp_path):
    waits = []
    path = tmp_path / "trace.json"
    kineto("combine", barrier=lambda: waits.append(1), barrier_comm_profiling=True, trace_path=str(path))
    assert len(waits) == 3
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("demo::combine_kernel") >= 3
    kineto("combine", barrier_comm_profiling=True)  # without a process group there is nobody to wait for


@cpu_only
def test_bench_kineto_errors():
    with pytest.raises(RuntimeError, match="0 kernels whose names contain 'nothing'.*Seen: demo::combine_kernel"):
        kineto("nothing")
    with pytest.raises(RuntimeError, match="6 kernels .*'dispatch', allowed: a positive multiple of 4"):
        kineto("dispatch", num_kernels_per_period=4)
    with pytest.raises(ValueError, match="num_tests = 0"):
        testing.bench_kineto(send_and_receive, "x", num_tests=0)


@cpu_only
def test_bench_kineto_suppresses_output(capfd):
    def talk():
        with record_function("demo::talk"):
            print("from Python")
            os.write(2, b"from native code\n")

    testing.bench_kineto(talk, "talk", num_tests=2, flush_l2=False, suppress_kineto_output=True)
    assert capfd.readouterr() == ("", "")


def test_suppress_restores_streams_also_after_an_exception(capfd):
    streams = sys.stdout, sys.stderr
    with pytest.raises(KeyError):
        with testing.suppress_stdout_stderr():
            print("hidden")
            os.write(1, b"hidden\n")
            with testing.suppress_stdout_stderr():
                print("hidden", file=sys.stderr)
            raise KeyError
    assert (sys.stdout, sys.stderr) == streams
    print("seen")
    os.write(2, b"seen too\n")
    out, errors = capfd.readouterr()
    assert out == "seen\n" and errors == "seen too\n"


def test_suppress_leaves_no_descriptors():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with testing.suppress_stdout_stderr():
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_empty_suppress_changes_nothing(capsys):
    with testing.empty_suppress():
        print("seen")
    assert capsys.readouterr().out == "seen\n"


class Device:
    """Stands for torch.cuda where there is none: notes the order of what is asked of it. Its clock ticks at each event."""

    def __init__(self):
        self.seen = []
        device = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                device.seen.append("event")
                self.time_ms = float(len(device.seen))

            def elapsed_time(self, end):
                return end.time_ms - self.time_ms

        self.Event = Event

    def is_available(self):
        return True

    def synchronize(self):
        self.seen.append("wait")


def test_bench_on_a_gpu_takes_events_around_the_call_alone(monkeypatch):
    device = Device()
    monkeypatch.setattr(testing.torch, "cuda", device)
    times = testing.bench(lambda: device.seen.append("call"), num_warmups=1, num_tests=2,
                          post_fn=lambda: device.seen.append("after"), flush_l2=False)
    once = ["event", "call", "event", "after"]
    assert device.seen == ["call", "wait", *once, *once, "wait"]
    assert times == pytest.approx((2e-3, 2e-3, 2e-3))  # two ticks of a millisecond, in seconds
