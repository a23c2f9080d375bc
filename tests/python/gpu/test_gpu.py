"""The packages on GPUs, one process per rank. Every test is a check of checks_*.py on all ranks.

    python tests/python/run.py tests/python/gpu        ANYEP_TEST_RANKS=2,4: more ranks than GPUs share them
"""

from __future__ import annotations

import pytest

TOKENS = [(96, 61), (0, 40), (0,), (1, 700)]


def test_layout(team):
    team("checks_high_throughput.layout")


@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_exact_sizes(team, tokens):
    team("checks_high_throughput.exact", "bfloat16", tokens)


@pytest.mark.parametrize("dtype, ids", [("float32", "int64"), ("float16", "int32"), ("int8", "int64"), ("bfloat16", "int32")])
def test_types(team, dtype, ids):
    team("checks_high_throughput.exact", dtype, (33, 50), ids)


@pytest.mark.parametrize("check", ["ahead", "with_scales", "cached", "worst_tokens", "streams", "graphs", "exact_size_in_a_capture",
                                   "wrong_devices", "destroyed"])
def test_high_throughput(team, check):
    team(f"checks_high_throughput.{check}")


def test_combine_does_not_wait_on_the_host(team):
    assert not any(team("checks_high_throughput.combine_does_not_wait"))


@pytest.mark.parametrize("check", ["lie_in_the_window", "record_stream_is_honoured", "unfinished_work_keeps_memory",
                                   "freed_memory_is_used_again", "rows_are_cut_to_size", "rows_of_a_capture_go_to_nobody", "without_a_pool",
                                   "views_of_the_payload"])
def test_memory(team, check):
    team(f"checks_memory.{check}")


@pytest.mark.parametrize("wire", ["bf16", "fp8", "ue8m0"])
def test_low_latency_pairs(team, wire):
    team("checks_low_latency.pairs", wire)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("hook", [False, True])
def test_low_latency_graphs(team, wire, hook):
    team("checks_low_latency.graphs", wire, hook)


@pytest.mark.parametrize("check", ["hooks", "kept", "zero_copy", "log_format", "switches_of_mode", "masks", "wrong_devices"])
def test_low_latency(team, check):
    team(f"checks_low_latency.{check}")


@pytest.mark.parametrize("check", ["high_throughput", "low_latency", "wrong_devices", "autograd"])
def test_engine(team, check):
    team(f"checks_engine.{check}")


def test_host_time(team):
    for rank, medians in enumerate(team("checks_low_latency.host_time")):
        print(f"rank {rank}: host us per call: {medians}")
        assert max(medians.values()) < 1000, medians
