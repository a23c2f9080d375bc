"""anyep.torch between processes with a gloo group."""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import anyep.torch
from anyep.torch import ExpertParallel, create_engine
from ranks import run_gloo
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


def rank_main(group, folder):
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = create_engine(group, hidden=HIDDEN, num_tokens=16)
    results = {way: one_way(way, engine, rank) for way in WAYS[num_ranks]}
    own = ExpertParallel(layer(engine, NUM_EXPERTS).experts, NUM_EXPERTS, group, hidden=HIDDEN, num_tokens=16)
    with torch.inference_mode():
        mine = tokens_of(rank)
        results["inference"] = own(mine.x, mine.ids, mine.weights).clone()
    own.close()
    engine.close()
    torch.save(results, os.path.join(folder, f"{rank}.pt"))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gloo_processes_give_the_bits_of_the_dense_layer(num_ranks):
    with tempfile.TemporaryDirectory() as folder:
        run_gloo(num_ranks, rank_main, folder)
        got = [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(num_ranks)]
    expected = dense_gradients([tokens_of(rank) for rank in range(num_ranks)], [Mlp(e) for e in range(NUM_EXPERTS)])
    for way in WAYS[num_ranks]:
        assert_same_bits(joined([results[way] for results in got]), expected)
    for rank, results in enumerate(got):
        assert torch.equal(results["inference"], expected[0][rank])


def run_the_ten_lines(group, code):
    class Expert(torch.nn.Linear):
        def __init__(self, hidden):
            super().__init__(hidden, hidden, dtype=torch.float32)

    x = torch.randn((3 * dist.get_rank(group), 512), dtype=torch.float32).requires_grad_()
    names = {"torch": torch, "Expert": Expert, "router": torch.nn.Linear(512, 64, dtype=torch.float32), "x": x,
             "loss": torch.sum}
    exec(code, names)
    assert names["y"].shape == x.shape and x.grad.shape == x.shape and len(names["moe"].experts) == 32


def test_the_ten_lines_of_the_documents_run():
    page = Path(__file__).resolve().parents[2] / "docs" / "python" / "torch.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL).group(1)
    assert textwrap.indent(code, "    ") in anyep.torch.__doc__
    run_gloo(2, run_the_ten_lines, code)
