"""Construction of a Buffer that cannot be: rows 6, 7, 10 and 12 of the bad inputs, and ranks that differ."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import deep_ep  # noqa: E402
from deep_ep import ArgumentError, Buffer  # noqa: E402
from ranks import run  # noqa: E402


@pytest.mark.parametrize("arguments, argument", [
    (dict(num_nvl_bytes=-1), "num_nvl_bytes"), (dict(num_rdma_bytes=-1), "num_rdma_bytes"),
    (dict(num_nvl_bytes=2**63), "num_nvl_bytes"), (dict(num_rdma_bytes=2**70, low_latency_mode=True), "num_rdma_bytes")])
def test_budgets_out_of_range(arguments, argument):
    def body(comm):
        with pytest.raises(ArgumentError) as caught:
            Buffer(None, comm=comm, **arguments)
        assert argument in caught.value.argument and str(caught.value).startswith("Buffer: ")

    run(2, body)


def test_more_memory_than_there_is():
    def body(comm):
        with pytest.raises(deep_ep.ResourceError, match="^Buffer: ") as caught:
            Buffer(None, 1 << 50, comm=comm)
        assert caught.value.need >= 1 << 50 > caught.value.have

    run(2, body)


@pytest.mark.parametrize("differs, name", [
    (dict(num_nvl_bytes=1 << 28), "num_nvl_bytes"), (dict(num_rdma_bytes=4096), "num_rdma_bytes"),
    (dict(enable_shrink=True), "enable_shrink")])
def test_ranks_that_differ(differs, name):
    def body(comm):
        with pytest.raises(deep_ep.MismatchError, match=name):
            Buffer(None, comm=comm, **(differs if comm.Get_rank() == 1 else {}))

    run(2, body)


@pytest.mark.parametrize("text", ["abc", "1e3", "5s", "", "-1"])
def test_garbage_in_the_environment(monkeypatch, text):
    monkeypatch.setenv("ANYEP_TIMEOUT_S", text)

    def body(comm):
        with pytest.raises(ArgumentError, match="ANYEP_TIMEOUT_S"):
            Buffer(None, comm=comm)

    run(1, body)


def test_no_group_and_wrong_groups():
    with pytest.raises(ValueError, match="group = None") as caught:
        Buffer(None)
    assert not isinstance(caught.value, deep_ep.Error)
    with pytest.raises(TypeError, match="group must be"):
        Buffer("world")
    with pytest.raises(TypeError, match="use_nccl"):
        Buffer(None, use_nccl=True)
    with pytest.raises(TypeError):
        run(1, lambda comm: Buffer(None, "1GB", comm=comm))
