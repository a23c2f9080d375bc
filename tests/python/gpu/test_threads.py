"""Ranks that are threads of one process, each with a GPU of its own if there are as many."""

from __future__ import annotations

import torch

import anyep


def test_ranks_as_threads():
    from dense import assert_bits, inputs, received

    num_ranks, num_experts = 2, 16
    if torch.cuda.device_count() < num_ranks:
        import pytest

        pytest.skip("one GPU: threads of one process on one GPU need streams that do not block each other")
    everything = inputs(90, num_ranks, (40, 25), 512, num_experts, 4, device="cpu")

    def rank(bootstrap):
        device = torch.device("cuda", bootstrap.rank)
        with torch.cuda.device(device):
            here = [type(each)(*(tensor.to(device) for tensor in each)) for each in everything]
            mine = here[bootstrap.rank]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with anyep.Engine.create(bootstrap, device=device, rows_bytes=32 << 20) as engine:
                for _ in range(5):
                    handle = engine.route(mine.ids, num_experts, stream=stream)
                    rows = engine.dispatch(mine.x, handle, experts=mine.ids, weights=mine.weights, stream=stream).rows
                    back = engine.combine(rows.x, handle, stream=stream)
                stream.synchronize()
                expected = received(here, num_experts, bootstrap.rank)
                assert_bits(rows.x, expected.x, "rows")
                assert_bits(rows.experts, expected.ids, "experts")
                assert back.x.device == device

    anyep.run_threads(num_ranks, rank)
