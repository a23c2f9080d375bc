"""A MoE layer in two ways, for the tests of anyep.torch: spread over ranks, and dense in one process."""

from __future__ import annotations

import torch

from anyep.torch import ExpertParallel, local_experts

HIDDEN = 16


def whole_numbers(shape, least, most, seed, dtype=torch.float32):
    """Sums and products of a few such numbers are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, most + 1, shape, generator=generator, dtype=torch.int64).to(dtype)


class Mlp(torch.nn.Module):
    """Global expert ``expert``: |y| < 2^12 and all gradients below 2^20, multiples of 1/8."""

    def __init__(self, expert, dtype=torch.float32):
        super().__init__()
        self.up = torch.nn.Parameter(whole_numbers((HIDDEN, HIDDEN), -1, 1, 2 * expert + 1000, dtype))
        self.down = torch.nn.Parameter(whole_numbers((HIDDEN, HIDDEN), -1, 1, 2 * expert + 1001, dtype))

    def forward(self, x):
        return torch.relu(x @ self.up) @ self.down


class Scaling(torch.nn.Module):
    """x * s: one rounding per element, so that bounds can be derived."""

    def __init__(self, expert, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(expert)
        self.scale = torch.nn.Parameter(torch.randn(HIDDEN, generator=generator, dtype=torch.float32).to(dtype))

    def forward(self, x):
        return x * self.scale


class Grouped(torch.nn.Module):
    """The same experts behind the other interface: all rows at once."""

    def __init__(self, experts):
        super().__init__()
        self.experts = torch.nn.ModuleList(experts)

    def forward(self, rows, rows_per_expert):
        assert sum(rows_per_expert) == rows.shape[0] and len(rows_per_expert) == len(self.experts)
        return torch.cat([e(part) for e, part in zip(self.experts, rows.split(rows_per_expert))] or [rows])


class Tokens:
    """One rank's leaves: x, ids, weights, and the gradient that comes from above."""

    def __init__(self, seed, num_tokens, num_experts, top_k, dtype=torch.float32, ids_dtype=torch.int64, exact=True):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator, dtype=ids_dtype)
        shape = (num_tokens, HIDDEN)
        if exact:
            self.x = whole_numbers(shape, -4, 4, seed + 1, dtype)
            self.weights = whole_numbers((num_tokens, top_k), 0, 16, seed + 2) / 8
            self.above = whole_numbers(shape, -4, 4, seed + 3, dtype)
        else:
            self.x = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
            self.weights = torch.rand((num_tokens, top_k), generator=generator, dtype=torch.float32)
            self.above = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        self.x.requires_grad_()
        self.weights.requires_grad_()


def dense(x, ids, weights, experts):
    """The definition: every choice of every token, on its own."""
    y = torch.zeros_like(x)
    for choice in range(ids.shape[1]):
        for expert, module in enumerate(experts):
            chosen = (ids[:, choice] == expert).unsqueeze(1)
            y = y + torch.where(chosen, weights[:, choice : choice + 1] * module(x), torch.zeros_like(x))
    return y


def dense_gradients(tokens, experts):
    """y of every rank, gradients of every rank's x and weights, and gradients of every expert's parameters."""
    ys = []
    for mine in tokens:
        y = dense(mine.x, mine.ids, mine.weights, experts)
        y.backward(mine.above)
        ys.append(y.detach())
    return (ys, [t.x.grad for t in tokens], [t.weights.grad for t in tokens],
            [[p.grad for p in expert.parameters()] for expert in experts])


def layer(engine, num_experts, kind=Mlp, dtype=torch.float32, grouped=False):
    mine = [kind(expert, dtype) for expert in local_experts(num_experts, engine.num_ranks, engine.rank)]
    return ExpertParallel(Grouped(mine) if grouped else mine, num_experts, engine)


def parameter_gradients(moe):
    """Per local expert."""
    experts = moe.experts.experts if isinstance(moe.experts, Grouped) else moe.experts
    return [[p.grad for p in expert.parameters()] for expert in experts]


def step(moe, mine):
    """Forward and backward of one rank: what ``dense_gradients`` gives, this rank's part."""
    y = moe(mine.x, mine.ids, mine.weights)
    y.backward(mine.above)
    return y.detach(), mine.x.grad, mine.weights.grad, parameter_gradients(moe)


def joined(per_rank):
    """Results of ``step`` of all ranks in the form of ``dense_gradients``."""
    ys, xs, weights, experts = zip(*per_rank)
    return list(ys), list(xs), list(weights), [gradients for mine in experts for gradients in mine]


def flat(results):
    ys, xs, weights, experts = results
    return [*ys, *xs, *weights, *(gradient for expert in experts for gradient in expert)]


def assert_same_bits(got, expected):
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected)):
        assert a is not None, f"tensor {index} has no gradient"
        b = torch.zeros_like(a) if b is None else b  # no token chose a dense expert: autograd did not meet it
        assert a.dtype == b.dtype and torch.equal(a, b), f"tensor {index} differs by {(a - b).abs().max()}"
