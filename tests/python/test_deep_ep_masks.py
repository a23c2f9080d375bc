"""deep_ep's rank masks: who is left out, who comes back, who is masked for its silence."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from deep_ep import Buffer  # noqa: E402
from ranks import run  # noqa: E402
from v1_formula import expert_rows, make_inputs, weighted  # noqa: E402

M = 24  # num_max_dispatch_tokens_per_rank


def make_buffer(comm: Any, hidden: int, num_experts: int, **arguments: Any) -> Buffer:
    hint = Buffer.get_low_latency_rdma_size_hint(M, hidden, comm.Get_size(), num_experts)
    return Buffer(None, 0, hint, low_latency_mode=True, comm=comm, **arguments)


def test_masked_ranks_are_left_out_and_come_back():
    inputs = make_inputs(3, (10, 6, 8), 128, 3, 6)

    def body(comm):
        buffer = make_buffer(comm, 128, 6, enable_shrink=True)
        me, given = buffer.rank, inputs[buffer.rank]
        status = torch.full((3,), 9, dtype=torch.int32)

        def masks():
            buffer.low_latency_query_mask_buffer(status)
            return status.tolist()

        def exchange():
            rows, count, handle, _, _ = buffer.low_latency_dispatch(given.x, given.ids, M, 6, use_fp8=False)
            return buffer.low_latency_combine(rows, given.ids, given.weights, handle)[0], handle

        whole = exchange()[0]
        assert masks() == [0, 0, 0]
        comm.allgather(None)
        if me == 2:
            buffer.low_latency_update_mask_buffer(0, True)
            buffer.low_latency_update_mask_buffer(1, mask=True)
            assert masks() == [1, 1, 0]
        else:
            buffer.low_latency_update_mask_buffer(2, True)
            assert masks() == [0, 0, 1]
        comm.allgather(None)
        alone = [given._replace(ids=torch.where(torch.tensor([[(rank == 2) == (me == 2)]]), given.ids, -1))
                 for rank, given in enumerate(inputs)]
        reachable = [one._replace(ids=torch.where((one.ids // 2 == 2) == (me == 2), one.ids, -1)) for one in alone]
        sums, handle = exchange()
        assert torch.equal(sums, weighted(reachable, me, 6, [expert_rows(reachable, expert) for expert in range(6)]))
        for source in range(3):  # 0 rows of masked ranks
            if (source == 2) != (me == 2):
                assert (handle[1][:, source] & 0xFFFFFFFF == 0).all()
        comm.allgather(None)
        if me == 2:
            for rank in (0, 1):
                buffer.low_latency_update_mask_buffer(rank)  # unmasks
        else:
            buffer.low_latency_clean_mask_buffer()
        for _ in range(50):  # takes effect at a turn that both agree on
            back = exchange()[0]
            everybody = comm.allgather(masks())
            if everybody == [[0, 0, 0]] * 3:
                break
        assert everybody == [[0, 0, 0]] * 3
        assert torch.equal(exchange()[0], whole)
        assert back.shape == whole.shape
        buffer.destroy()

    run(3, body)


def test_a_silent_rank_is_masked_at_the_limit(caplog, monkeypatch):
    monkeypatch.setenv("ANYEP_TIMEOUT_S", "0.3")
    inputs = make_inputs(2, (5, 5), 128, 2, 4)
    away = threading.Event()

    def body(comm):
        buffer = make_buffer(comm, 128, 4, enable_shrink=True)
        given = inputs[buffer.rank]
        buffer.low_latency_dispatch(given.x, given.ids, M, 4)
        if buffer.rank == 0:
            handle = buffer.low_latency_dispatch(given.x, given.ids, M, 4)[2]
            status = torch.zeros(2, dtype=torch.int32)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0, 1] and (handle[1][:, 1] & 0xFFFFFFFF == 0).all()
            buffer.clean_low_latency_buffer(M, 128, 4)  # waits for nobody
            away.set()
        else:
            assert away.wait(20)
        buffer.destroy()

    with caplog.at_level("WARNING", logger="anyep"):
        run(2, body)
    assert sum("masked from now on" in record.getMessage() for record in caplog.records) == 1
