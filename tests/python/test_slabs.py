"""Outputs of low-latency dispatches on GPUs, on a CPU that plays one: what is cut from a block for several calls."""

from __future__ import annotations

import pytest
import torch

from anyep._slabs import WIRES, GpuSlabs
from anyep.arrays import TorchLibrary

SHAPE = (8, 2, 384, 16)  # experts, top-k, hidden, most tokens


class Gpu(TorchLibrary):
    def __init__(self):
        super().__init__(torch, torch.device("cpu"))
        self.current, self.captures = 1, False

    def stream(self):
        return self.current

    def is_capturing(self):
        return self.captures


@pytest.fixture
def slabs_of():
    return GpuSlabs(Gpu(), num_ranks=2, rank=1)


def make(slabs_of, wire="fp8", shape=SHAPE):
    return slabs_of.make(*shape, WIRES[wire])


def small(slabs):
    return slabs[2:]


def block(tensor):
    return tensor.untyped_storage().data_ptr()


def places(slabs):
    """[begin, end) of every tensor."""
    return [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in slabs if tensor is not None]


@pytest.mark.parametrize("wire, dtype, scales", [
    ("bf16", torch.bfloat16, None), ("fp8", torch.float8_e4m3fn, (torch.float32, 3)), ("ue8m0", torch.float8_e4m3fn, (torch.int32, 1))])
def test_shapes_and_types(slabs_of, wire, dtype, scales):
    for _ in range(3):
        made = make(slabs_of, wire)
        assert made.x.dtype == dtype and made.x.shape == (4, 32, 384)
        assert (made.scales is None) == (scales is None)
        if scales is not None:
            assert (made.scales.dtype, made.scales.shape) == (scales[0], (4, 32, scales[1])) and made.scales.stride(1) == 1
        assert [(tensor.dtype, tuple(tensor.shape)) for tensor in small(made)] == [
            (torch.int32, (4,)), (torch.int32, (4, 32)), (torch.int64, (4, 2)), (torch.int32, (2, 16, 2))]
        assert all(tensor.is_contiguous() for tensor in small(made))


def test_nothing_is_used_twice(slabs_of):
    kept = [make(slabs_of, wire) for _ in range(40) for wire in ("bf16", "fp8")]
    taken = sorted(place for slabs in kept for place in places(slabs))
    assert all(end <= begin for (_, end), (begin, _) in zip(taken, taken[1:]))
    for number, slabs in enumerate(kept):
        for tensor in small(slabs):
            tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, slabs in enumerate(kept) for tensor in small(slabs))


def test_a_block_serves_several_calls_and_lies_as_torch_would_lay_it(slabs_of):
    first, second = make(slabs_of), make(slabs_of)
    for one, other in zip(small(first), small(second)):
        assert block(one) == block(other)
        assert (one.data_ptr() - block(one)) % 512 == (other.data_ptr() - block(one)) % 512 == 0
    assert block(first.x) != block(second.x) and block(first.scales) != block(second.scales)


def test_blocks_grow_with_use(slabs_of):
    kept = [make(slabs_of) for _ in range(64)]
    calls = [tensor.untyped_storage().nbytes() // 512 for tensor in (slabs.counts for slabs in kept)]
    assert calls == [2] * 2 + [4] * 4 + [8] * 8 + [16] * 50


def test_large_ones_are_not_kept_in_advance(slabs_of):
    large = (8, 2, 16, 200_000)  # 6 MB of `source`
    made = make(slabs_of, shape=large)
    assert [tensor.untyped_storage().nbytes() for tensor in small(made)] == [-(-tensor.nbytes // 512) * 512 for tensor in small(made)]
    middle = make(slabs_of, shape=(8, 2, 16, 20_000))  # 1.3 MB of a call
    assert sum(tensor.untyped_storage().nbytes() for tensor in small(middle)) <= 4 << 20


def test_streams_captures_and_inference_have_blocks_of_their_own(slabs_of):
    gpu, here = slabs_of._gpu, make(slabs_of)
    gpu.current = 2
    there = make(slabs_of)
    gpu.current = 1
    with torch.inference_mode():
        inside = make(slabs_of)
    gpu.captures = True
    captured = [make(slabs_of), make(slabs_of)]
    gpu.captures = False
    blocks = {block(slabs.counts) for slabs in (here, there, inside, *captured)}
    assert len(blocks) == 5
    assert [tensor.is_inference() for tensor in small(inside) + small(here)] == [True] * 4 + [False] * 4
    assert block(make(slabs_of).counts) == block(here.counts)  # what was cut before goes on
    captured[0].counts.fill_(1)  # and nothing else of that block is left over for calls outside
    assert captured[0].counts.untyped_storage().nbytes() == 512


def test_few_shapes_and_streams_are_kept(slabs_of):
    for tokens in range(1, 30):
        make(slabs_of, shape=(8, 2, 384, tokens))
    assert len(slabs_of._of_shape) <= 8
    for slabs_of._gpu.current in range(30):
        make(slabs_of)
    assert len(slabs_of._of_shape[(*SHAPE, WIRES["fp8"])].ready) <= 8


@pytest.mark.parametrize("shape", [(0, 2, 384, 16), (8, 0, 384, 16), (8, 2, 384, 0), (-3, 2, 384, -5), (1, 2, 384, 16)])
def test_empty_ones(slabs_of, shape):
    made = make(slabs_of, shape=shape)
    assert [tensor.dim() for tensor in small(made)] == [1, 2, 2, 3]


def test_what_a_mode_makes_is_not_kept(slabs_of):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert type(make(slabs_of).counts) is not torch.Tensor
    assert all(type(tensor) is torch.Tensor for tensor in (*make(slabs_of), *make(slabs_of)))
