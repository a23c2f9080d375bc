"""What V1's contract says, in slow plain torch, from every rank's inputs. Nothing here knows the library."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Tuple

import pytest

torch = pytest.importorskip("torch")
Tensor = torch.Tensor


class Inputs(NamedTuple):
    x: Tensor  #: [T, H]
    ids: Tensor  #: [T, K]
    weights: Tensor  #: [T, K]


def make_inputs(num_ranks: int, tokens: Sequence[int], hidden: int, top_k: int, num_experts: int, seed: int = 0, *,
                duplicates: bool = False, ids_dtype: torch.dtype = torch.int64) -> List[Inputs]:
    """Every rank's; some ids are -1."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for rank in range(num_ranks):
        shape = (tokens[rank], top_k)
        if duplicates:
            ids = torch.randint(0, num_experts, shape, generator=generator)
        else:
            ids = torch.rand((tokens[rank], num_experts), generator=generator).argsort(dim=1)[:, :top_k]
        ids = torch.where(torch.rand(shape, generator=generator) < 0.15, torch.full_like(ids, -1), ids)
        # Multiples of 1/16: products and sums with bfloat16 rows are exact in float64.
        weights = torch.randint(1, 17, shape, generator=generator).float() / 16
        x = torch.randn((tokens[rank], hidden), generator=generator).bfloat16()
        inputs.append(Inputs(x, ids.to(ids_dtype), weights))
    return inputs


def block(rank: int, num_ranks: int, num_experts: int) -> range:
    """The experts of a rank."""
    base, rest = num_experts // num_ranks, num_experts % num_ranks
    first = rank * base + min(rank, rest)
    return range(first, first + base + (1 if rank < rest else 0))


def rank_of(expert: int, num_ranks: int, num_experts: int) -> int:
    for rank in range(num_ranks):
        if expert in block(rank, num_ranks, num_experts):
            return rank
    return -1


def layout(ids: Tensor, num_ranks: int, num_experts: int) -> Tuple[Tensor, Tensor, Tensor]:
    """num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank."""
    in_rank = torch.zeros((ids.shape[0], num_ranks), dtype=torch.bool)
    per_expert = torch.zeros(num_experts, dtype=torch.int32)
    for token, row in enumerate(ids.tolist()):
        for expert in row:
            if 0 <= expert < num_experts:
                per_expert[expert] += 1
                in_rank[token, rank_of(expert, num_ranks, num_experts)] = True
    return in_rank.sum(0).int(), per_expert, in_rank


class Received(NamedTuple):
    places: List[Tuple[int, int]]  #: (source rank, token) of each row
    x: Tensor
    ids: Tensor  #: local
    weights: Tensor
    counts: List[int]
    until: List[int]  #: rows from ranks 0..s


def received(inputs: Sequence[Inputs], me: int, num_experts: int) -> Received:
    num_ranks = len(inputs)
    mine = block(me, num_ranks, num_experts)
    places, ids, weights, until = [], [], [], []
    counts = [0] * len(mine)
    for source, given in enumerate(inputs):
        for token, row in enumerate(given.ids.tolist()):
            local = [expert - mine.start if expert in mine else -1 for expert in row]
            if max(local, default=-1) < 0:
                continue
            places.append((source, token))
            ids.append(local)
            weights.append([given.weights[token, slot].item() if expert >= 0 else 0.0 for slot, expert in enumerate(local)])
            for expert in local:
                if expert >= 0:
                    counts[expert] += 1
        until.append(len(places))
    top_k = inputs[0].ids.shape[1]
    x = (torch.stack([inputs[source].x[token] for source, token in places]) if places else
         inputs[0].x.new_empty((0, inputs[0].x.shape[1])))
    return Received(places, x, torch.tensor(ids, dtype=inputs[0].ids.dtype).view(-1, top_k),
                    torch.tensor(weights, dtype=torch.float32).view(-1, top_k), counts, until)


def combined(inputs: Sequence[Inputs], me: int, num_experts: int, rows: Sequence[Tensor],
             bias: Sequence[Optional[Tensor]] = ()) -> Tensor:
    """``rows``: every rank's answers, in the order of what it received. float32, ranks ascending, rounded once."""
    num_ranks = len(inputs)
    sums = torch.zeros((inputs[me].x.shape[0], rows[0].shape[1]), dtype=torch.float32)
    for term in bias:
        if term is not None:
            sums += term.float()
    for rank in range(num_ranks):
        for row, (source, token) in enumerate(received(inputs, rank, num_experts).places):
            if source == me:
                sums[token] += rows[rank][row].float()
    return sums.to(rows[0].dtype)


class Slab(NamedTuple):
    places: List[Tuple[int, int]]  #: (source rank, token) of each row of one expert
    begin: List[int]
    count: List[int]


def slab(inputs: Sequence[Inputs], expert: int) -> Slab:
    places, begin, count = [], [], []
    for source, given in enumerate(inputs):
        begin.append(len(places))
        places += [(source, token) for token, row in enumerate(given.ids.tolist()) if expert in row]
        count.append(len(places) - begin[-1])
    return Slab(places, begin, count)


def expert_rows(inputs: Sequence[Inputs], expert: int) -> Tensor:
    places = slab(inputs, expert).places
    return torch.stack([inputs[source].x[token] for source, token in places]) if places else inputs[0].x[:0]


def cast_fp8(x: Tensor, round_scale: bool) -> Tuple[Tensor, Tensor]:
    """Specification 10.1: E4M3 values and float32 scales of rows [n, H]."""
    num_rows, hidden = x.shape
    columns = -(-hidden // 128)
    padded = torch.zeros((num_rows, columns * 128), dtype=torch.float32)
    padded[:, :hidden] = x.float()
    groups = padded.view(num_rows, columns, 128)
    amax = groups.abs().amax(dim=2).clamp(min=1e-4)
    stored = amax * torch.tensor(1 / 448, dtype=torch.float32)
    if round_scale:
        mantissa, exponent = torch.frexp(stored)  # stored = mantissa * 2^exponent, mantissa in [0.5, 1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        stored = torch.ldexp(torch.ones_like(stored), exponent)
        multiplier = torch.ldexp(torch.ones_like(stored), -exponent)
    else:
        multiplier = torch.tensor(448.0, dtype=torch.float32) / amax
    values = (groups * multiplier.unsqueeze(2)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.view(num_rows, columns * 128)[:, :hidden].contiguous(), stored


def pack_ue8m0(stored: Tensor) -> Tensor:
    """int32 [n, ceil(columns / 4)] of powers of two."""
    num_rows, columns = stored.shape
    exponents = torch.zeros((num_rows, -(-columns // 4) * 4), dtype=torch.uint8)
    exponents[:, :columns] = (stored.view(torch.int32) >> 23).to(torch.uint8)
    return exponents.view(torch.int32)


def weighted(inputs: Sequence[Inputs], me: int, num_experts: int, answers: Sequence[Tensor], exact: bool = False) -> Tensor:
    """Specification 10.3. ``answers[expert]``: its rows in the order of its slab. ``exact``: one rounding."""
    num_ranks = len(inputs)
    given = inputs[me]
    out = torch.zeros((given.ids.shape[0], answers[0].shape[1]), dtype=torch.bfloat16)
    rows_of = [{place: row for row, place in enumerate(slab(inputs, expert).places)} for expert in range(num_experts)]
    for token, row in enumerate(given.ids.tolist()):
        total = torch.zeros(answers[0].shape[1], dtype=torch.float32)
        everything = range(num_experts)
        for mine in [everything] if exact else [block(rank, num_ranks, num_experts) for rank in range(num_ranks)]:
            sums = torch.zeros_like(total)
            for slot, expert in enumerate(row):
                if expert not in mine:
                    continue
                term = given.weights[token, slot].double() * answers[expert][rows_of[expert][me, token]].double()
                sums = (term + sums.double()).float()  # exact before it is rounded: a fused multiply-add
            total += sums if exact else sums.bfloat16().float()
        out[token] = total.bfloat16()
    return out
