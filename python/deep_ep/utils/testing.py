"""Timing of calls and kernels: `from deep_ep.utils.testing import bench, bench_kineto`.

Where there is a GPU, device time is taken; on the CPU the same functions take wall time. Importing starts nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist

__all__ = ["bench", "bench_kineto", "empty_suppress", "flush_l2_cache", "suppress_stdout_stderr"]

# Above every last-level cache of today: GPUs to 126 MB. Servers have more than 128 MiB in all, but at most that for a
# core; the project's CPU benchmarks overwrite as much.
_GPU_FLUSH_BYTES = 256 << 20
_CPU_FLUSH_BYTES = 128 << 20

Seconds = Union[float, List[float]]


def bench(
    fn: Callable[[], Any],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Optional[Callable[[], Any]] = None,
    flush_l2: bool = True,
) -> Tuple[float, float, float]:
    """Times a call. With a GPU: from event to event on the current stream around each call, gaps in which the stream
    waits for the host included. Without: wall time of each call.

    Args:
        fn: what is timed; its result is dropped.
        num_warmups: calls before, not timed.
        num_tests: timed calls, 1 or more.
        post_fn: called after each timed call, outside the span.
        flush_l2: overwrites the caches before each timed call, outside the span.

    Returns:
        (mean, least, largest) seconds per call.

    Raises:
        ValueError: num_tests < 1 or num_warmups < 0. What fn raises passes.
    """
    if num_tests < 1 or num_warmups < 0:
        raise ValueError(
            f"bench: num_tests = {num_tests}, num_warmups = {num_warmups}, allowed: from 1 and from 0. "
            "Time at least one call."
        )
    for _ in range(num_warmups):
        fn()
    timed = _time_on_gpu if torch.cuda.is_available() else _time_on_cpu
    flush = _Flush(flush_l2)
    times = timed(fn, num_tests, post_fn, flush)
    return sum(times) / len(times), min(times), max(times)


def _time_on_gpu(fn, num_tests: int, post_fn, flush: "_Flush") -> List[float]:
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_tests)]
    torch.cuda.synchronize()
    for start, end in spans:
        flush()
        start.record()
        fn()
        end.record()
        if post_fn is not None:
            post_fn()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in spans]


def _time_on_cpu(fn, num_tests: int, post_fn, flush: "_Flush") -> List[float]:
    times = []
    for _ in range(num_tests):
        flush()
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
        if post_fn is not None:
            post_fn()
    return times


class _Flush:
    """Overwrites a buffer larger than the caches at each call; the buffer is made once."""

    def __init__(self, enabled: bool):
        self._buffer = None
        if enabled:
            on_gpu = torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
            size = _GPU_FLUSH_BYTES if on_gpu else _CPU_FLUSH_BYTES
            self._buffer = torch.empty(size // 4, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        if self._buffer is not None:
            self._buffer.zero_()


def flush_l2_cache(enabled: bool = True) -> None:
    """Overwrites 256 MiB on the current GPU (in stream order), or 128 MiB of memory without one, so that what is read
    next comes from memory. Does nothing if not enabled."""
    _Flush(enabled)()


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: Union[str, Tuple[str, ...], List[str]],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: Optional[str] = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Optional[Callable[[], Any]] = None,
) -> Union[Seconds, List[Seconds]]:
    """Times kernels inside a call by torch.profiler.

    With a GPU the spans are kernels as the device ran them, without launch and gaps. Without one they are what the
    profiler sees on the CPU: torch operators ("aten::add") and ranges of `torch.profiler.record_function`, wall time
    from begin to end, inner ones included; where both a span and one inside it match, both count.

    Args:
        fn: the call; it runs once before and num_tests times under the profiler.
        kernel_names: a case-sensitive part of the names, or several. The flush kernels are called "fill" or "memset".
        num_tests: calls under the profiler, 1 or more.
        suppress_kineto_output: sends what is written to stdout and stderr meanwhile to nowhere.
        trace_path: where a Chrome trace goes, if anywhere.
        flush_l2: overwrites the caches before each call.
        barrier_comm_profiling: aligns the ranks of the default group before each call, so that no kernel waits for a
            late peer within its span.
        num_kernels_per_period: how many matching kernels make one period, such as 2 for a send and a receive that are
            two launches of one symbol.
        barrier: called before each call, in place of that of barrier_comm_profiling.

    Returns:
        For a string: mean seconds of the kernels that match; with num_kernels_per_period > 1 a list of that length, the
        mean seconds of the first, second, ... kernel of the periods. For a tuple or list: a list of those.

    Raises:
        ValueError: num_tests or num_kernels_per_period below 1.
        RuntimeError: no kernel matches a name, or their number is no multiple of num_kernels_per_period.
    """
    if num_tests < 1 or num_kernels_per_period < 1:
        raise ValueError(
            f"bench_kineto: num_tests = {num_tests}, num_kernels_per_period = {num_kernels_per_period}, allowed: from "
            "1. Time at least one kernel."
        )
    if barrier is None and barrier_comm_profiling:
        barrier = _align_ranks
    with suppress_stdout_stderr() if suppress_kineto_output else empty_suppress():
        events = _profile(fn, num_tests, _Flush(flush_l2), barrier, trace_path)
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    means = [_mean_by_phase(events, name, num_kernels_per_period) for name in names]
    return means[0] if isinstance(kernel_names, str) else means


def _profile(fn, num_tests: int, flush: _Flush, barrier, trace_path: Optional[str]) -> List[Dict[str, Any]]:
    """The spans of num_tests calls, each with name, begin `ts` and `dur` in us, by begin."""
    on_gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    fn()
    _synchronize()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(num_tests):
            flush()
            if barrier is not None:
                barrier()
            fn()
        _synchronize()
    # The exported trace is the one form that all supported versions of torch give alike.
    with tempfile.TemporaryDirectory() as folder:
        path = trace_path or os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path, encoding="utf-8", errors="replace") as file:
            events = json.load(file)["traceEvents"]
    kinds = ("kernel",) if on_gpu else ("cpu_op", "user_annotation")
    return sorted((event for event in events if event.get("cat") in kinds and "dur" in event), key=lambda e: e["ts"])


def _mean_by_phase(events: Sequence[Dict[str, Any]], name: str, num_phases: int) -> Seconds:
    spans = [event["dur"] * 1e-6 for event in events if name in event["name"]]
    if not spans or len(spans) % num_phases:
        seen = sorted({event["name"][:60] for event in events})
        raise RuntimeError(
            f"bench_kineto: {len(spans)} kernels whose names contain {name!r}, allowed: a positive multiple of "
            f"{num_phases} (num_kernels_per_period). Seen: {', '.join(seen[:12]) or 'none'}. Give a part of a name that "
            "only these kernels have."
        )
    means = [sum(spans[phase::num_phases]) / (len(spans) // num_phases) for phase in range(num_phases)]
    return means if num_phases > 1 else means[0]


def _align_ranks() -> None:
    """All ranks of the default group leave this together; on a GPU the stream waits, not the host."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    if not torch.cuda.is_available():
        dist.barrier()
        return
    device = torch.device("cuda", torch.cuda.current_device())
    # Work of about a millisecond, behind which the host submits what follows: no launch lies inside the spans.
    matrix = torch.zeros((4096, 4096), dtype=torch.bfloat16, device=device)
    torch.mm(matrix, matrix)
    dist.all_reduce(torch.zeros(1, dtype=torch.float32, device=device))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class suppress_stdout_stderr:  # the name that scripts import
    """Context manager: what Python and native code write to stdout and stderr inside goes to nowhere."""

    def __enter__(self) -> "suppress_stdout_stderr":
        self._streams = sys.stdout, sys.stderr
        for stream in self._streams:
            _flush_stream(stream)
        self._null = open(os.devnull, "w", encoding="utf-8")
        self._saved = []
        for descriptor in (1, 2):
            try:
                self._saved.append((descriptor, os.dup(descriptor)))
            except OSError:  # closed: nobody can write to it
                continue
            os.dup2(self._null.fileno(), descriptor)
        # Python's streams need not lie on descriptors 1 and 2: notebooks and pytest put others in their place.
        sys.stdout = sys.stderr = self._null
        return self

    def __exit__(self, *_: Any) -> None:
        self._null.flush()
        sys.stdout, sys.stderr = self._streams
        for descriptor, saved in self._saved:
            os.dup2(saved, descriptor)
            os.close(saved)
        self._null.close()


def _flush_stream(stream: Any) -> None:
    try:
        stream.flush()
    except (AttributeError, OSError, ValueError):  # no stream, or a closed one
        pass


class empty_suppress:  # the name that scripts import
    """Context manager that changes nothing: stands where `suppress_stdout_stderr` may stand."""

    def __enter__(self) -> "empty_suppress":
        return self

    def __exit__(self, *_: Any) -> None:
        return None
