"""Engines on ranks that are threads, and the routing that tests of anyep share."""

from __future__ import annotations

import torch

import anyep

ROWS_BYTES = 8 << 20
IDS = [[0, 7], [2, 5], [1, 1], [-1, 3], [-1, -1]]
RANKS_OF = [{0, 3}, {1, 2}, {0}, {1}, set()]  # 8 experts on 4 ranks, two each


def on_ranks(num_ranks, body, **budget):
    """body(engine) on every rank, as threads; the engines are closed afterwards."""
    budget = budget or {"rows_bytes": ROWS_BYTES}

    def rank(bootstrap):
        with anyep.Engine.create(bootstrap, **budget) as engine:
            return body(engine)

    return anyep.run_threads(num_ranks, rank)


def low_latency_budget(num_ranks, hidden=128):
    return {"low_latency_bytes": anyep.low_latency_bytes(num_experts=8, top_k=2, hidden=hidden, max_tokens=8,
                                                         num_ranks=num_ranks)}


def rows_expected(rank, num_ranks=4):
    """(source rank, token) of every row that `rank` receives when all ranks have IDS, in order."""
    return [(source, token) for source in range(num_ranks) for token, ranks in enumerate(RANKS_OF) if rank in ranks]


def tokens_of(rank, dtype):
    """[5, 32] whose rows tell rank and token; exact in every type here."""
    values = torch.arange(5, dtype=torch.float32).reshape(5, 1) + 8 * (rank + 1)
    return values.expand(5, 32).to(dtype).contiguous()
