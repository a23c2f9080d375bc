"""anyep.torch between processes that torch.multiprocessing starts, with gloo groups."""

from __future__ import annotations

import datetime
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

from anyep.torch import ExpertParallel, create_engine
from torch_moe import HIDDEN, Mlp, Tokens, assert_same_bits, dense_gradients, joined, layer, parameter_gradients

NUM_EXPERTS, TOP_K = 6, 2
TOKENS = (5, 0, 9, 2)
WAYS = {2: ("plain", "checkpoint", "compile"), 4: ("plain", "checkpoint")}  # the compiler takes seconds in every process


def tokens_of(rank):
    return Tokens(10 * rank, TOKENS[rank], NUM_EXPERTS, TOP_K)


def one_way(way, engine, rank):
    moe, mine = layer(engine, NUM_EXPERTS), tokens_of(rank)
    call = moe
    if way == "checkpoint":
        def call(x, ids, weights):
            return checkpoint(moe, x, ids, weights, use_reentrant=False)
    elif way == "compile":  # the C++ compiler that the default backend needs may be missing
        call = torch.compile(lambda *arguments: moe(*arguments) * 1.0, backend="aot_eager")
    y = call(mine.x, mine.ids, mine.weights)
    y.backward(mine.above)
    return y.detach(), mine.x.grad, mine.weights.grad, parameter_gradients(moe)


def rank_main(rank, num_ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks,
                            timeout=datetime.timedelta(seconds=60))
    engine = create_engine(dist.group.WORLD, hidden=HIDDEN, num_tokens=16)
    results = {way: one_way(way, engine, rank) for way in WAYS[num_ranks]}
    own = ExpertParallel(layer(engine, NUM_EXPERTS).experts, NUM_EXPERTS, dist.group.WORLD, hidden=HIDDEN, num_tokens=16)
    with torch.inference_mode():
        mine = tokens_of(rank)
        results["inference"] = own(mine.x, mine.ids, mine.weights).clone()
    own.close()
    engine.close()
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gloo_processes_give_the_bits_of_the_dense_layer(num_ranks):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (num_ranks, folder), nprocs=num_ranks)
        got = [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(num_ranks)]
    expected = dense_gradients([tokens_of(rank) for rank in range(num_ranks)], [Mlp(e) for e in range(NUM_EXPERTS)])
    for way in WAYS[num_ranks]:
        assert_same_bits(joined([results[way] for results in got]), expected)
    for rank, results in enumerate(got):
        assert torch.equal(results["inference"], expected[0][rank])
