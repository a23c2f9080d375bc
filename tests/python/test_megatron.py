"""A real client, unmodified: Megatron-core's fused dispatch and combine on our deep_ep, against the dense computation."""

from __future__ import annotations

import pytest
from ranks import run_gloo

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

HIDDEN, NUM_EXPERTS, TOP_K = 64, 8, 3


def inputs_of(rank, dtype):
    """Small integers and powers of two, so that every sum is exact in bfloat16 too and results must be equal to the bit."""
    dice = torch.Generator().manual_seed(100 + rank)
    num_tokens = (7, 0, 12, 5)[rank]
    x = torch.randint(-2, 3, (num_tokens, HIDDEN), generator=dice).to(dtype)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=dice)[:TOP_K] for _ in range(num_tokens)]) if num_tokens else (
        torch.empty(0, TOP_K, dtype=torch.int64))
    ids[torch.rand(ids.shape, generator=dice) < 0.2] = -1  # dropped choices
    probs = torch.randint(0, 3, (num_tokens, TOP_K), generator=dice).float() / 2
    grad = torch.randint(-1, 2, (num_tokens, HIDDEN), generator=dice).to(dtype)
    return x, ids, probs.masked_fill(ids < 0, 0), grad


def expert_weights(dtype):
    dice = torch.Generator().manual_seed(7)
    return torch.randint(-1, 2, (NUM_EXPERTS, HIDDEN), generator=dice).to(dtype)


def experts_on(rows, ids, probs, weights):
    """Expert e scales a row by its weights, element by element; the sum over the chosen experts, in float32."""
    total = torch.zeros(rows.shape, dtype=torch.float32)
    for slot in range(ids.shape[1]):
        chosen = ids[:, slot] >= 0
        scale = torch.where(chosen.unsqueeze(1), weights[ids[:, slot].clamp(min=0)].float(), torch.tensor(0.0))
        total = total + probs[:, slot:slot + 1] * rows.float() * scale
    return total.to(rows.dtype)


def client(group):
    """One rank: forward and backward through Megatron's functions, and the same without any communication."""
    for dtype in (torch.bfloat16, torch.float32):
        compare(group, dtype)


def compare(group, dtype):
    from megatron.core.transformer.moe import fused_a2a

    assert fused_a2a.HAVE_DEEP_EP and not fused_a2a.HAVE_HYBRIDEP
    fused_a2a.set_deepep_num_sms(20)
    rank, num_ranks = group.rank(), group.size()
    x, ids, probs, grad = inputs_of(rank, dtype)
    per_rank = NUM_EXPERTS // num_ranks

    dense = [tensor.clone().requires_grad_() for tensor in (x, probs)] + [expert_weights(dtype).requires_grad_()]
    wanted = experts_on(dense[0], ids, dense[1], dense[2])
    wanted.backward(grad)
    # Experts are shared by all ranks' tokens: their gradients add up.
    everybody = expert_weights(dtype).requires_grad_()
    for other in range(num_ranks):
        other_x, other_ids, other_probs, other_grad = inputs_of(other, dtype)
        experts_on(other_x, other_ids, other_probs, everybody).backward(other_grad)
    mine = slice(rank * per_rank, (rank + 1) * per_rank)

    for async_finish in (False, True):
        for _ in range(2):  # the second time with a buffer that has been used
            inputs = [tensor.clone().requires_grad_() for tensor in (x, probs)]
            weights = expert_weights(dtype)[mine].clone().requires_grad_()
            rows, row_ids, row_probs, per_expert, handle = fused_a2a.fused_dispatch(
                inputs[0], ids, inputs[1], NUM_EXPERTS, group, async_finish, async_finish)
            answer = experts_on(rows, row_ids, row_probs, weights)
            got, _ = fused_a2a.fused_combine(answer, group, handle, async_finish, async_finish)
            got.backward(grad)
            assert torch.equal(got, wanted)
            assert per_expert.tolist() == [sum(int((inputs_of(other, dtype)[1] == expert).sum()) for other in range(num_ranks))
                                           for expert in range(mine.start, mine.stop)]
            assert torch.equal(inputs[0].grad, dense[0].grad)
            assert torch.equal(inputs[1].grad, dense[1].grad)
            assert torch.equal(weights.grad, everybody.grad[mine])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fused_dispatch_and_combine_equal_the_dense_computation(num_ranks):
    run_gloo(num_ranks, client)
