"""Views of torch tensors: what torch's C function tells the extension is what the tensor's own methods say, and torch without that
function serves as well."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import anyep
from anyep import _native
from anyep.arrays import torch_library, view

CUBE = torch.arange(2 * 6 * 8, dtype=torch.float32).view(2, 6, 8)
TENSORS = {
    "dense": CUBE, "one dimension": CUBE.flatten(), "four dimensions": CUBE.view(2, 2, 3, 8), "slice": CUBE[1:, 2:5, ::2],
    "transposed": CUBE.transpose(1, 2), "expanded": CUBE[:, :1].expand(2, 6, 8), "empty": CUBE[:0], "no columns": CUBE[..., :0],
    "needs a gradient": CUBE.clone().requires_grad_(), "of a graph": CUBE.clone().requires_grad_() * 2,
    "parameter": torch.nn.Parameter(CUBE.clone()), "of inference": torch.inference_mode()(lambda: CUBE.clone())(),
    **{name: torch.zeros(3, 4).to(dtype) for name, dtype in torch_library().dtype_of.items()},
}


@pytest.mark.parametrize("name", TENSORS)
def test_both_ways_of_reading_agree(name):
    tensor = TENSORS[name]
    seen, expected = view("op", "x", tensor), torch_library().view(tensor)
    for field in ("address", "dtype", "shape", "strides"):
        assert getattr(seen, field) == getattr(expected, field), field
    assert seen.shape == tuple(tensor.shape) and seen.strides == tensor.stride()


@pytest.mark.parametrize("tensor, got", [
    (torch.zeros(()), r"shape \[\]"), (torch.zeros(1, 1, 1, 1, 1), r"shape \[1, 1, 1, 1, 1\]"),
    (torch.zeros(2, dtype=torch.complex64), "complex64"), (torch.zeros(2, dtype=torch.uint16), "uint16"),
    (torch.zeros(2, 2).to_sparse(), r"shape \[2, 2\]"), (torch.zeros(2, device="meta"), r"shape \[2\]")])
def test_what_cannot_be_read_is_named(tensor, got):
    with pytest.raises(anyep.ArgumentError, match=f"op: x = .*{got}.*, allowed: ") as caught:
        view("op", "x", tensor)
    assert caught.value.argument == "x" and caught.value.op == "op"


def test_views_are_taken_as_they_are():
    seen = view("op", "x", CUBE)
    assert view("op", "x", seen) is seen
    assert _native.optional_view("op", "x", None) is None
    with pytest.raises(TypeError, match="op: x must be a tensor .*NoneType"):
        view("op", "x", None)


def test_torch_without_the_c_function():
    """As before 2.10."""
    program = """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = None
import anyep
x, ids = torch.ones(3, 16), torch.zeros(3, 1, dtype=torch.int64)
with anyep.Engine.create(None, rows_bytes=8 << 20) as engine:
    handle = engine.route(ids, 2)
    rows = engine.dispatch(x, handle, experts=ids, weights=torch.ones(3, 1)).rows
    assert torch.equal(rows.x, x) and torch.equal(engine.combine(rows.x, handle).x, x)
    try:
        engine.dispatch(x.to_sparse(), handle)
    except anyep.ArgumentError as error:
        assert "strided" in str(error), error
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
