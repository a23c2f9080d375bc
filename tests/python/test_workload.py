"""anyep.workload: the C++ generators give Python the same numbers, and what is refused is named."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anyep
from anyep import workload


def tool(*arguments):
    """The command line tool of the same installation."""
    return subprocess.run([sys.executable, "-m", "anyep", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("profile", ["uniform", "lognormal:1.1", "drop:0.3", "grouped:8:4"])
def test_the_numbers_are_those_of_the_tool(tmp_path, profile):
    trace = tmp_path / "trace.txt"
    tool("bench", "--op", "dispatch", "--ranks", "2", "-b", "33", "-e", "33", "-n", "1", "-w", "0", "--hidden", "64", "--experts",
         "64", "--topk", "4", "--profile", profile, "--seed", "7", "--write-trace", str(trace))
    written = workload.read_trace(str(trace))
    here = workload.generate(profile, seed=7, num_experts=64, top_k=4, num_ranks=2, tokens_per_rank=33)
    assert numpy.array_equal(written.experts, here.experts)
    assert numpy.array_equal(written.weights, here.weights)
    assert written.tokens_per_rank == here.tokens_per_rank == [33, 33]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 6), st.integers(0, 2 ** 32), st.integers(1, 5))
def test_a_trace_and_a_cut_keep_every_number(num_ranks, tokens, top_k, seed, cut):
    import tempfile

    batch = workload.generate("drop:0.2", seed=seed, num_experts=16, top_k=top_k, num_ranks=num_ranks, tokens_per_rank=tokens)
    assert batch.experts.shape == batch.weights.shape == (num_ranks * tokens, top_k)
    with tempfile.NamedTemporaryFile() as file:
        workload.write_trace(file.name, batch)
        again = workload.read_trace(file.name)
    for other in (again, batch.split(cut).split(num_ranks)):
        assert numpy.array_equal(other.experts, batch.experts) and numpy.array_equal(other.weights, batch.weights)
    parts = [batch.split(cut).of_rank(rank)[0] for rank in range(cut)]
    assert numpy.array_equal(numpy.concatenate(parts), batch.experts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_statistics_are_those_of_the_ids():
    batch = workload.generate("duplicates", seed=3, num_experts=8, top_k=3, num_ranks=4, tokens_per_rank=50)
    measured = batch.measure()
    assert measured.pairs_per_expert == numpy.bincount(batch.experts.ravel(), minlength=8).tolist()
    assert measured.rows_per_rank == [int((batch.experts // 2 == rank).any(1).sum()) for rank in range(4)]
    assert measured.duplicate_pairs > 0 and "max/mean" in str(measured)


def test_a_batch_of_ones_own():
    ids = torch.tensor([[0, 3], [-1, 2], [1, 1]])
    batch = workload.Batch([2, 1], ids, torch.ones(3, 2), 4)
    assert batch.measure().pairs_per_rank == [3, 2] and batch.of_rank(1)[0].tolist() == [[1, 1]]
    ids[0, 0] = 3
    assert batch.experts[0, 0] == 0  # the batch owns its numbers
    with pytest.raises(anyep.ArgumentError, match="rank = 2"):
        batch.of_rank(2)
    with pytest.raises((ValueError, TypeError), match="int64"):
        workload.Batch([3], ids.int(), torch.ones(3, 2), 4)


def test_what_is_refused_is_named(tmp_path):
    with pytest.raises(anyep.ArgumentError, match="uniform"):
        workload.generate("no-such-profile")
    with pytest.raises(anyep.ArgumentError, match="top_k"):
        workload.generate(top_k=300)
    with pytest.raises(anyep.ArgumentError, match="deepseek-v3"):
        workload.find_model("gpt-9")
    with pytest.raises(anyep.ArgumentError, match="missing.txt"):
        workload.read_trace(str(tmp_path / "missing.txt"))
    assert "lognormal" in workload.profiles()


def test_models_are_the_published_shapes():
    model = workload.find_model("deepseek-v3")
    assert (model.hidden, model.num_experts, model.top_k, model.groups, model.groups_kept) == (7168, 256, 8, 8, 4)
    assert len({preset.name for preset in workload.models()}) == len(workload.models()) > 10


def test_words_are_embedded_and_routed():
    text = workload.TextWorkload("one two three four five two", hidden=256, num_experts=16, top_k=4, groups=4, groups_kept=2)
    assert (text.num_words, text.word(1), text.word(5)) == (6, "two", "two")
    x = text.embed(0, torch.empty(6, 256, dtype=torch.bfloat16))
    raw = text.embed(0, anyep.Typed(numpy.empty((6, 256), dtype=numpy.uint16), "bfloat16")).array
    assert numpy.array_equal(x.view(torch.uint16).numpy(), raw)
    assert x.float().abs().mean() > 0.3 and not torch.equal(x[1], x[5])  # the same word, other neighbours
    batch = text.route(0, [4, 2])
    assert batch.tokens_per_rank == [4, 2] and batch.weights.sum(1) == pytest.approx([2.5] * 6, rel=1e-5)
    groups = batch.experts // 4
    assert all(len(set(row)) <= 2 for row in groups.tolist())
    with pytest.raises(ValueError, match="bfloat16"):
        text.embed(0, torch.empty(6, 256))
