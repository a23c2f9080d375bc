"""anyep.torch against the dense layer in one process: values and gradients. Ranks are threads."""

from __future__ import annotations

import anyep
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyep.torch import combine, create_engine, dispatch
from torch_moe import (HIDDEN, Mlp, Scaling, Tokens, assert_same_bits, dense, dense_gradients, joined, layer, step,
                       whole_numbers)

torch.set_num_threads(1)


def on_ranks(num_ranks, body):
    """body(engine) in one thread per rank. A rank that fails tells the others, so that nobody waits."""
    tuning = anyep.Tuning()
    tuning.timeout_s = tuning.startup_timeout_s = 20.0

    def run(bootstrap):
        with create_engine(bootstrap, hidden=HIDDEN, num_tokens=64, tuning=tuning) as engine:
            return body(engine)

    return anyep.run_threads(num_ranks, run)


SHAPES = st.tuples(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),  # tokens per rank
    st.integers(1, 9),  # experts: fewer than ranks, and no multiple of them
    st.integers(1, 4),  # choices: among few experts they repeat
    st.integers(0, 1000), st.booleans(), st.sampled_from([torch.int32, torch.int64]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SHAPES)
def test_float32_gradients_are_those_of_the_dense_layer_to_the_bit(shape):
    tokens_per_rank, num_experts, top_k, seed, grouped, ids_dtype = shape
    top_k = min(top_k, num_experts)

    def tokens():
        return [Tokens(seed + 10 * rank, n, num_experts, top_k, ids_dtype=ids_dtype)
                for rank, n in enumerate(tokens_per_rank)]

    got = on_ranks(len(tokens_per_rank),
                   lambda engine: step(layer(engine, num_experts, grouped=grouped), tokens()[engine.rank]))
    assert_same_bits(joined(got), dense_gradients(tokens(), [Mlp(e) for e in range(num_experts)]))


def test_any_strides_serve_also_without_tokens():
    """Gradients of sums have strides of 0; the arguments' dimensions were exchanged."""

    def body(engine):
        moe, mine = layer(engine, 4), Tokens(engine.rank, 2 * engine.rank, 4, 2)
        moe(*(t.t().contiguous().t() for t in (mine.x, mine.ids, mine.weights))).sum().backward()
        return mine

    for rank, mine in enumerate(on_ranks(2, body)):
        alone = Tokens(rank, 2 * rank, 4, 2)
        dense(alone.x, alone.ids, alone.weights, [Mlp(e) for e in range(4)]).sum().backward()
        assert torch.equal(mine.x.grad, alone.x.grad) and torch.equal(mine.weights.grad, alone.weights.grad)


# u = unit roundoff of the type: half a unit in the last place of 1. v = that of float32, in which all sums are made. Every
# bound is (roundings to the type on the way * u + roundings in float32 * v) * the sum of the absolute values of the terms:
#   y          x * s to the type; w * that, and a sum over k choices, in float32, to the type; a sum over R ranks, to the type
#   dx         g * w in float32, to the type; * s to the type; sum over k, to the type; sum over R, to the type
#   dw         x * s to the type; g * that, and a sum over HIDDEN, in float32
#   ds         g * w in float32, to the type; * x to the type; a sum over the expert's pairs in float32, to the type
# (1 + u)^4 - 1 <= 1.02 * 4u for u <= 2^-8, hence the factor.
@pytest.mark.parametrize("dtype,u", [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_gradients_of_random_numbers_are_within_the_derived_bound(dtype, u):
    num_ranks, num_experts, top_k, n, v = 4, 6, 3, 40, 2.0**-24

    def tokens():
        return [Tokens(7 + rank, n, num_experts, top_k, dtype, exact=False) for rank in range(num_ranks)]

    got = joined(on_ranks(num_ranks,
                          lambda engine: step(layer(engine, num_experts, Scaling, dtype), tokens()[engine.rank])))

    def exact(absolute):
        """The same in float64; of absolute values it is the sum that bounds are a share of."""
        made, experts = tokens(), [Scaling(e, dtype) for e in range(num_experts)]
        change = (lambda t: t.detach().double().abs()) if absolute else (lambda t: t.detach().double())
        for mine in made:
            mine.x, mine.weights = change(mine.x).requires_grad_(), change(mine.weights).requires_grad_()
            mine.above = change(mine.above)
        for expert in experts:
            expert.scale = torch.nn.Parameter(change(expert.scale))
        return dense_gradients(made, experts)

    terms = num_ranks * n * top_k
    bounds = (3 * u + (1 + top_k + num_ranks) * v, 4 * u + (1 + top_k + num_ranks) * v, u + (1 + HIDDEN) * v,
              3 * u + (1 + terms) * v)
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # float16 rounds small terms to multiples of 2^-24
    worst = []
    for part, bound, values, sums in zip(got, bounds, exact(False), exact(True)):
        for a, b, total in zip(flatten(part), flatten(values), flatten(sums)):
            allowed = 1.02 * bound * total + tiny * (4 + terms)
            assert bool(((a.double() - b).abs() <= allowed).all())
            worst.append(((a.double() - b).abs() / allowed.clamp(min=1e-300)).max().item())
    assert max(worst) > 0.05  # a bound that nothing comes near would find no mistake


def flatten(part):
    return [tensor for item in part for tensor in (item if isinstance(item, list) else [item])]


def test_weights_and_bias_of_the_functions_have_gradients():
    """Rank 0's token goes to both ranks (experts 0 and 3), its third choice is unused."""

    def body(engine):
        mine = Tokens(5, 1, 4, 3)
        ids = torch.tensor([[0, 3, -1]] if engine.rank == 0 else [[1, -1, 1]], dtype=torch.int64)
        handle = engine.route(ids, 4)
        rows = dispatch(mine.x, handle, engine, experts=ids, weights=mine.weights)
        assert torch.equal(rows.weights, torch.where(rows.experts >= 0, rows.weights, torch.zeros_like(rows.weights)))
        bias = whole_numbers((1, HIDDEN), -3, 3, 9).requires_grad_()
        factor = whole_numbers(rows.x.shape, 1, 3, engine.rank)
        y, sums = combine(rows.x * factor, handle, engine, weights=rows.weights, bias=bias)
        assert torch.equal(sums, mine.weights * (ids >= 0))
        # The gradient of a weight that was not sent is dropped, though the zeros there get one.
        (y * mine.above).sum().backward(retain_graph=True)
        once = [t.grad.clone() for t in (mine.x, bias)]
        assert mine.weights.grad is None or not mine.weights.grad.any()
        (sums * torch.tensor([[1.0, 2.0, 4.0]]) + rows.weights.sum()).sum().backward()
        return once, mine, ids, rows.experts, bias

    (once, mine, ids, _, _), (other, _, other_ids, _, _) = on_ranks(2, body)
    assert torch.equal(once[1], mine.above) and torch.equal(other[1], mine.above)
    # Rank 0's token is row 0 of both ranks; rank 1's is row 1 of rank 0.
    factors = [whole_numbers((2, HIDDEN), 1, 3, 0), whole_numbers((1, HIDDEN), 1, 3, 1)]
    assert torch.equal(once[0], mine.above * (factors[0][:1] + factors[1]))
    assert torch.equal(other[0], mine.above * factors[0][1:])
    # From `sums` 1, 2, 4 of the used choices; from `rows.weights.sum()` 3 times (broadcast) every place where it was sent.
    assert torch.equal(mine.weights.grad, torch.tensor([[4.0, 5.0, 0.0]]))


def test_second_derivatives_are_those_of_the_dense_layer():
    """The penalty on the input's gradient that some losses have."""

    def penalty(x, y):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return gradient.sum()

    def body(engine):
        mine = Tokens(engine.rank, 3, 4, 2)
        penalty(mine.x, layer(engine, 4, Scaled)(mine.x, mine.ids, mine.weights)).backward()
        return mine

    for rank, mine in enumerate(on_ranks(2, body)):
        alone = Tokens(rank, 3, 4, 2)
        penalty(alone.x, dense(alone.x, alone.ids, alone.weights, [Scaled(e) for e in range(4)])).backward()
        assert torch.equal(mine.x.grad, alone.x.grad) and torch.equal(mine.weights.grad, alone.weights.grad)


class Scaled(torch.nn.Module):
    def __init__(self, expert, dtype=torch.float32):
        super().__init__()
        self.scale = torch.nn.Parameter(whole_numbers((HIDDEN,), -2, 2, expert, dtype))

    def forward(self, x):
        return x * self.scale


BAD = {
    "x of float64": (lambda t: (t.x.double(), t.ids, t.weights), "x = torch.float64"),
    "x of one dimension": (lambda t: (t.x[0], t.ids, t.weights), "x = torch.float32 of shape [16]"),
    "ids of float32": (lambda t: (t.x, t.ids.float(), t.weights), "topk_ids = torch.float32"),
    "ids of other tokens": (lambda t: (t.x, t.ids[1:], t.weights), "topk_ids = 2 tokens, allowed: 3"),
    "weights of another shape": (lambda t: (t.x, t.ids, t.weights[:, 1:]), "topk_weights = torch.float32 of shape [3, 1]"),
    "weights of int64": (lambda t: (t.x, t.ids, t.ids), "topk_weights = torch.int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_before_anything_is_sent(name):
    change, text = BAD[name]

    def body(engine):
        moe, mine = layer(engine, 4), Tokens(0, 3, 4, 2)
        with pytest.raises(anyep.ArgumentError) as caught:
            moe(*change(mine))
        assert text in str(caught.value)
        step(moe, mine)  # nothing has happened to the engine

    on_ranks(2, body)


def test_other_mistakes_are_named():
    with create_engine(hidden=HIDDEN, num_tokens=4) as engine:
        with pytest.raises(anyep.ArgumentError, match="experts = 3 modules, allowed: 4, one per local expert of rank 0"):
            anyep.torch.ExpertParallel([Mlp(0)] * 3, 4, engine)
        moe = anyep.torch.ExpertParallel(lambda rows, rows_per_expert: rows[:, :8], 4, engine)
        with pytest.raises(anyep.ArgumentError, match="result of experts"):
            step(moe, Tokens(0, 3, 4, 2))
    for arguments in ({"hidden": 0, "num_tokens": 1}, {"hidden": 8, "num_tokens": 1, "dtype": torch.float64}):
        with pytest.raises(anyep.ArgumentError, match="create_engine"):
            create_engine(**arguments)


def test_a_module_closes_the_engine_that_it_made_and_no_other():
    own = anyep.torch.ExpertParallel([Mlp(e) for e in range(4)], 4, None, hidden=HIDDEN, num_tokens=8)
    step(own, Tokens(0, 3, 4, 2))
    own.close()
    own.close()
    with pytest.raises(anyep.StateError):
        own(*vars_of(Tokens(0, 3, 4, 2)))
    with create_engine(hidden=HIDDEN, num_tokens=8) as engine:
        shared = layer(engine, 4)
        shared.close()
        step(shared, Tokens(0, 3, 4, 2))
    assert "engine" not in "".join(own.state_dict())


def vars_of(tokens):
    return tokens.x, tokens.ids, tokens.weights


def test_bfloat16_answers_of_one_rank_are_weighted_and_added_in_float32():
    """Each weighted answer rounded to bfloat16 would be 1 and -1."""
    with create_engine(hidden=HIDDEN, num_tokens=1) as engine:
        x = torch.ones((1, HIDDEN), dtype=torch.bfloat16)
        moe = anyep.torch.ExpertParallel([torch.nn.Identity(), torch.nn.Identity()], 2, engine)
        weights = torch.tensor([[1 + 2.0**-9, -1.0]], dtype=torch.float32)
        y = moe(x, torch.tensor([[0, 1]], dtype=torch.int64), weights)
    assert torch.equal(y, torch.full((1, HIDDEN), 2.0**-9, dtype=torch.bfloat16))
