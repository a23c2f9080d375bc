"""Inputs that every rank can make for all ranks, and what dispatch and combine must give, by torch alone."""

from __future__ import annotations

from typing import List, NamedTuple

import torch


class Inputs(NamedTuple):
    """Of one rank."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Received(NamedTuple):
    source_rank: torch.Tensor
    source: torch.Tensor
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    pairs: List[int]


def inputs(seed, num_ranks, tokens, hidden, num_experts, top_k, dtype=torch.bfloat16, ids_dtype=torch.int64, device="cuda"):
    """For every rank; ``tokens``: a number per rank."""
    made = []
    for rank in range(num_ranks):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        count = tokens[rank % len(tokens)]
        x = torch.randn(count, hidden, generator=generator, dtype=torch.float32)
        x = (x * 64).to(torch.int8) if dtype == torch.int8 else x.to(dtype)
        scores = torch.rand(count, num_experts, generator=generator)
        ids = scores.topk(top_k, dim=1).indices
        ids[torch.rand(count, top_k, generator=generator) < 0.2] = -1
        weights = torch.rand(count, top_k, generator=generator)
        made.append(Inputs(x.to(device), ids.to(ids_dtype).to(device), weights.to(device)))
    return made


def block(num_experts, num_ranks, rank):
    base, rest = divmod(num_experts, num_ranks)
    first = rank * base + min(rank, rest)
    return first, first + base + (rank < rest)


def in_rank(ids, num_experts, num_ranks):
    """bool [T, R]."""
    columns = []
    for rank in range(num_ranks):
        first, last = block(num_experts, num_ranks, rank)
        columns.append(((ids >= first) & (ids < last)).any(dim=1))
    return torch.stack(columns, dim=1)


def received(everything, num_experts, rank):
    """What ``rank`` receives, ordered by (source rank, source token)."""
    num_ranks = len(everything)
    first, last = block(num_experts, num_ranks, rank)
    parts = []
    for source, mine in enumerate(everything):
        tokens = in_rank(mine.ids, num_experts, num_ranks)[:, rank].nonzero().flatten()
        ids = mine.ids[tokens]
        here = (ids >= first) & (ids < last)
        parts.append((torch.full_like(tokens, source), tokens, mine.x[tokens], torch.where(here, ids - first, -1),
                      torch.where(here, mine.weights[tokens], 0.0)))
    columns = [torch.cat(column) for column in zip(*parts)]
    local = columns[3][columns[3] >= 0].to(torch.int64)
    pairs = torch.bincount(local, minlength=last - first).tolist()
    return Received(*columns, pairs)


def combined(everything, num_experts, rank, answer):
    """The sum over ranks, ascending, of ``answer(x, rank)`` of the ranks that received each token; float32, rounded once."""
    num_ranks = len(everything)
    mine = everything[rank]
    sums = torch.zeros(mine.x.shape, dtype=torch.float32, device=mine.x.device)
    for peer, there in enumerate(in_rank(mine.ids, num_experts, num_ranks).unbind(dim=1)):
        sums += torch.where(there.unsqueeze(1), answer(mine.x, peer).float(), 0.0)
    return sums.to(mine.x.dtype)


def assert_bits(got, expected, what):
    assert got.dtype == expected.dtype and got.shape == expected.shape, \
        f"{what}: {got.dtype} {list(got.shape)}, not {expected.dtype} {list(expected.shape)}"
    same = got.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} bytes differ"
