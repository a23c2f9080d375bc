"""anyep.torch inside what programs do with autograd: several layers, other threads, checkpoints, modes, torch.compile. In each
case no rank may wait for a call that another rank does not make."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import anyep
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from anyep.torch import ExpertParallel, combine, create_engine, dispatch
from torch_moe import (HIDDEN, Mlp, Scaling, Tokens, assert_same_bits, dense_gradients, joined, layer,
                       parameter_gradients, step, whole_numbers)

torch.set_num_threads(1)

NUM_EXPERTS = 2  # on 3 ranks: the last one has none
TOKENS = (4, 0, 3)  # the middle one brings none


class Recorded:
    """An engine that writes down the order of its calls."""

    def __init__(self, engine):
        self.calls = []
        for name in ("route", "dispatch", "combine"):
            setattr(engine, name, self.recording(name, getattr(engine, name)))

    def recording(self, name, call):
        def recorded(*arguments, **named):
            self.calls.append(name)
            return call(*arguments, **named)

        return recorded


def on_ranks(num_ranks, body):
    tuning = anyep.Tuning()
    tuning.timeout_s = tuning.startup_timeout_s = 20.0

    def run(bootstrap):
        with create_engine(bootstrap, hidden=HIDDEN, num_tokens=64, tuning=tuning) as engine:
            return body(engine)

    return anyep.run_threads(num_ranks, run)


def tokens_of(rank, seed=0):
    return Tokens(seed + 10 * rank, TOKENS[rank], NUM_EXPERTS, 2)


def expected():
    return dense_gradients([tokens_of(rank) for rank in range(3)], [Mlp(e) for e in range(NUM_EXPERTS)])


def test_backward_calls_come_in_the_reverse_order_of_forward_on_every_rank():
    """Two branches after one layer: nothing but the age of the nodes orders them. One rank has no experts, one no tokens."""

    def body(engine):
        calls = Recorded(engine).calls
        names = iter("abc")
        layers = [Named(layer(engine, NUM_EXPERTS), next(names), calls) for _ in range(3)]
        mine = tokens_of(engine.rank)
        first = layers[0](mine)
        mine.x = first
        left, right = layers[1](mine), layers[2](mine)
        calls.append("backward")
        (left * right + right.square()).sum().backward()
        return calls

    got = on_ranks(3, body)
    assert got[0] == got[1] == got[2]
    forward = [name for layer_name in "abc" for name in (layer_name, "route", "dispatch", "combine")]
    assert got[0] == [*forward, "backward", *["dispatch", "combine"] * 3]


class Named:
    def __init__(self, moe, name, calls):
        self.moe, self.name, self.calls = moe, name, calls

    def __call__(self, mine):
        self.calls.append(self.name)
        return self.moe(mine.x, mine.ids, mine.weights)


def test_backward_runs_on_another_thread():
    def body(engine):
        moe, mine = layer(engine, NUM_EXPERTS), tokens_of(engine.rank)
        y = moe(mine.x, mine.ids, mine.weights)
        worker = threading.Thread(target=lambda: y.backward(mine.above))
        worker.start()
        worker.join()
        return y.detach(), mine.x.grad, mine.weights.grad, parameter_gradients(moe)

    assert_same_bits(joined(on_ranks(3, body)), expected())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
def test_a_checkpointed_block_gives_the_same_bits(reentrant, early_stop):
    """Also on the rank without experts, where nothing but our own calls saves tensors."""

    def body(engine):
        calls = Recorded(engine).calls
        moe, mine = layer(engine, NUM_EXPERTS), tokens_of(engine.rank)
        y = checkpoint(lambda x, w: moe(x, mine.ids, w), mine.x, mine.weights, use_reentrant=reentrant)
        y.backward(mine.above)
        return (y.detach(), mine.x.grad, mine.weights.grad, parameter_gradients(moe)), calls

    # Torch keeps this for all threads: a rank's own thread would put back what another one has set.
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        results, calls = zip(*on_ranks(3, body))
    assert_same_bits(joined(results), expected())
    assert calls[0] == calls[1] == calls[2]
    assert calls[0].count("route") == 2  # the block did run again


def test_a_checkpointed_block_of_functions_runs_again_at_the_same_place_on_every_rank():
    """Rank 0 saves a tensor between the calls, rank 1 saves none anywhere."""

    def body(engine):
        calls = Recorded(engine).calls
        x = whole_numbers((2, HIDDEN), -4, 4, engine.rank).requires_grad_()
        handle = engine.route(torch.tensor([[0], [1]], dtype=torch.int64), 2)

        def block(x):
            rows = dispatch(x, handle, engine).x
            return combine(rows.square() if engine.rank == 0 else rows * 2.0, handle, engine)[0]

        checkpoint(block, x, use_reentrant=False).sum().backward()
        return calls, x.grad, x.detach()

    got = on_ranks(2, body)
    assert got[0][0] == got[1][0] == ["route", "dispatch", "combine", "dispatch", "dispatch", "combine"]
    for _, gradient, x in got:  # token 0 went to rank 0, token 1 to rank 1
        assert torch.equal(gradient, torch.stack((2 * x[0], torch.full((HIDDEN,), 2.0))))


def test_many_handles_are_alive_and_backward_is_in_any_order():
    def body(engine):
        moe = layer(engine, NUM_EXPERTS)
        made = [tokens_of(engine.rank, seed) for seed in range(0, 600, 30)]
        outputs = [moe(mine.x, mine.ids, mine.weights) for mine in made]
        order = list(range(len(made)))
        random.Random(3).shuffle(order)  # the same on every rank
        for index in order:
            outputs[index].backward(made[index].above, retain_graph=True)
        return [y.detach() for y in outputs], [m.x.grad for m in made], [m.weights.grad for m in made]

    got = on_ranks(3, body)
    for index, seed in enumerate(range(0, 600, 30)):
        ys, xs, weights, _ = dense_gradients([tokens_of(rank, seed) for rank in range(3)],
                                             [Mlp(e) for e in range(NUM_EXPERTS)])
        for rank in range(3):
            assert torch.equal(got[rank][0][index], ys[rank])
            assert torch.equal(got[rank][1][index], xs[rank])
            assert torch.equal(got[rank][2][index], weights[rank])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_results_are_the_same(mode):
    def body(engine):
        moe, mine = layer(engine, NUM_EXPERTS), tokens_of(engine.rank)
        with mode():
            y = moe(mine.x, mine.ids, mine.weights)
        assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
        return y

    for y, dense_y in zip(on_ranks(3, body), expected()[0]):
        assert torch.equal(y, dense_y)


class Cut(torch.nn.Module):
    """An expert that gives its input no gradient."""

    def __init__(self, expert):
        super().__init__()
        self.inner = Mlp(expert)

    def forward(self, x):
        with torch.no_grad():
            return self.inner(x)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_rank_that_needs_fewer_gradients_than_others_takes_part(odd):
    """Its x and weights need none, and its experts give none: the others get what they need from it, and it does not hang."""

    def body(engine):
        calls = Recorded(engine).calls
        mine = Tokens(10 * engine.rank, 3, 3, 2)
        if engine.rank == odd:
            mine.x.requires_grad_(False)
            mine.weights.requires_grad_(False)
        moe = ExpertParallel([Cut(engine.rank) if engine.rank == odd else Mlp(engine.rank)], 3, engine)
        moe(mine.x, mine.ids, mine.weights).backward(mine.above)
        return calls, mine.weights.grad, [p.grad for p in moe.parameters()]

    got = on_ranks(3, body)
    everything = [Tokens(10 * rank, 3, 3, 2) for rank in range(3)]
    _, _, weights, experts = dense_gradients(everything, [Mlp(e) for e in range(3)])
    for rank, (calls, gradient, parameters) in enumerate(got):
        assert calls == ["route", "dispatch", "combine", "dispatch", "combine"]
        if rank == odd:
            assert gradient is None and parameters == [None, None]
            continue
        assert torch.equal(gradient, weights[rank])
        for a, b in zip(parameters, experts[rank]):
            assert torch.equal(a, b)


class Failing(torch.nn.Module):
    def forward(self, x):
        raise ValueError("no such weights")


@pytest.mark.parametrize("what", ["expert", "argument"])
def test_what_goes_wrong_on_one_rank_is_told_to_the_others_at_once(what):
    def body(bootstrap):
        tuning = anyep.Tuning()
        tuning.startup_timeout_s = tuning.timeout_s = 30.0
        tuning.close_timeout_s = 0.1
        engine = create_engine(bootstrap, hidden=HIDDEN, num_tokens=8, tuning=tuning)
        mine = Tokens(engine.rank, 3, 3, 2)
        if engine.rank == 1:
            moe = ExpertParallel([Failing()], 3, engine)
            with pytest.raises(ValueError if what == "expert" else anyep.ArgumentError):
                moe(mine.x.detach().double() if what == "argument" else mine.x, mine.ids, mine.weights)
        else:
            begin = time.monotonic()
            with pytest.raises(anyep.PeerDeadError, match="ValueError: no such weights" if what == "expert" else "float64"):
                layer(engine, 3)(mine.x, mine.ids, mine.weights)
            assert time.monotonic() - begin < 15
        with contextlib.suppress(anyep.Error):
            engine.close()

    anyep.run_threads(3, body)


class Block(torch.nn.Module):
    """A router, experts, and arithmetic around them that a compiler may change the order of, but not the bits."""

    def __init__(self, engine):
        super().__init__()
        self.moe = layer(engine, 4)
        self.gate = torch.nn.Parameter(whole_numbers((HIDDEN, 4), -2, 2, 77))

    def forward(self, x):
        weights, ids = (x @ self.gate).topk(2)
        return x + 2 * self.moe(x * 2, ids, weights)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_block_gives_the_same_bits(backend):
    """One rank; tests of processes have more. Number of tokens changes, so that shapes become symbols."""
    with create_engine(hidden=HIDDEN, num_tokens=8) as engine:
        plain, traced = Block(engine), Block(engine)
        compiled = torch.compile(traced, backend=backend)
        for num_tokens in (5, 3, 7):
            results = []
            for block, run in ((plain, plain), (traced, compiled)):
                x = whole_numbers((num_tokens, HIDDEN), -4, 4, num_tokens).requires_grad_()
                y = run(x)
                y.sum().backward()
                results.append([y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())])
            assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.compiler.reset()


def test_under_autocast_a_layer_keeps_the_type_of_its_input():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(whole_numbers((HIDDEN, HIDDEN), -1, 1, 5))

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight)

    with create_engine(hidden=HIDDEN, num_tokens=8) as engine:
        moe, mine = ExpertParallel([Linear() for _ in range(4)], 4, engine), Tokens(0, 3, 4, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = moe(mine.x, mine.ids, mine.weights)
        y.backward(mine.above)
        assert y.dtype == torch.float32 and mine.x.grad.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_memory_of_the_window_comes_back():
    """Rows outside the window would also work, so the window itself is asked."""
    with create_engine(hidden=HIDDEN, num_tokens=64) as engine:
        moe = layer(engine, 4, Scaling)
        before = biggest_rows(engine)
        for index in range(50):
            step(moe, Tokens(index, 64, 4, 2, exact=False))
        assert biggest_rows(engine) == before


def biggest_rows(engine):
    """Rows of 64 KiB that the window has room for."""
    rows = []
    while True:
        try:
            rows.append(engine.make_rows(1, 16384, "float32"))
        except anyep.CapacityError:
            return len(rows)
