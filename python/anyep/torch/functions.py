"""dispatch and combine as autograd functions, and the gather and scatter between them.

Each pair is linear and one is the other's transpose, so the backward of one calls the other. That also makes second derivatives
work. n = tokens of this rank, m = rows that this rank receives, p = (row, local expert) pairs.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Optional, Tuple

import torch

from .. import _native
from ..engine import Engine, Handle, Rows
from ..errors import Error, argument_error

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def dense(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Gradients come with any strides, those of a sum with 0."""
    return None if tensor is None else tensor.detach().contiguous()


class Dispatch(torch.autograd.Function):
    """(x [n, hidden], weights [n, k] or None, extra [n, any] float32 or None) -> the same of the m received rows, experts.

    Of weights and extra at most one is given: weights need ``experts``, extra travels without. ``anchor`` is a
    tensor whose only use is to require a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: Optional[torch.Tensor], extra: Optional[torch.Tensor],
                anchor: Optional[torch.Tensor], experts: Optional[torch.Tensor], handle: Handle, engine: Engine) -> Any:
        rows = engine.dispatch(dense(x), handle, weights=dense(weights), experts=dense(experts),
                               extra=() if extra is None else (dense(extra),)).rows
        ctx.handle, ctx.engine = handle, engine
        ctx.has_weights, ctx.has_extra = weights is not None, extra is not None
        if rows.experts is not None:
            ctx.mark_non_differentiable(rows.experts)
        # Always a tensor, which backward reads first. A checkpointed block runs again when a first saved tensor of it is read:
        # so that is after the same call on every rank, also on one whose experts save nothing.
        ctx.save_for_backward(x.new_empty(0) if weights is None else rows.experts)
        return rows.x, rows.weights, rows.extra[0] if extra is not None else None, rows.experts

    @staticmethod
    def backward(ctx: Any, grad_x: torch.Tensor, grad_weights: Optional[torch.Tensor], grad_extra: Optional[torch.Tensor],
                 _: Any) -> Any:
        (experts,) = ctx.saved_tensors
        if ctx.has_weights:  # elsewhere the weight was not sent here: its 0 is a constant
            sent = grad_weights.masked_fill(experts < 0, 0.0)
        else:
            sent = grad_extra if ctx.has_extra else None
        x, sums = Combine.apply(grad_x, sent, None, ctx.handle, ctx.engine)
        return x, sums if ctx.has_weights else None, sums if ctx.has_extra else None, None, None, None, None


class Combine(torch.autograd.Function):
    """(x [m, hidden], weights [m, any] or None, bias [n, hidden] or None) -> sums over the rows of each token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: Optional[torch.Tensor], bias: Optional[torch.Tensor], handle: Handle,
                engine: Engine) -> Any:
        done = engine.combine(dense(x), handle, weights=dense(weights), bias=() if bias is None else (dense(bias),))
        ctx.handle, ctx.engine = handle, engine
        ctx.has_weights, ctx.has_bias = weights is not None, bias is not None
        return done.x, done.weights

    @staticmethod
    def backward(ctx: Any, grad_x: torch.Tensor, grad_weights: Optional[torch.Tensor]) -> Any:
        x, _, weights, _ = Dispatch.apply(grad_x, None, grad_weights if ctx.has_weights else None, None, None, ctx.handle,
                                          ctx.engine)
        return x, weights, grad_x if ctx.has_bias else None, None, None


class Gather(torch.autograd.Function):
    """rows [m, any], index int64 [p] -> [p, any] of ``dtype``: row index[i] at i."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, dtype: torch.dtype, engine: Engine) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows, ctx.dtype, ctx.engine = rows.shape[0], rows.dtype, engine
        return rows.index_select(0, index).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return Scatter.apply(grad, index, ctx.num_rows, ctx.dtype, ctx.engine), None, None, None


class Scatter(torch.autograd.Function):
    """values [p, any], index int64 [p] -> [m, any] of ``dtype``: the sum of what belongs to each row, in float32 and in the
    order of the pairs, rounded once. It lies in the engine's window where there is room: combine takes it from there."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, index: torch.Tensor, num_rows: int, dtype: torch.dtype,
                engine: Engine) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.dtype, ctx.engine = values.dtype, engine
        library = engine._library(values)
        rows = engine._rows(library, num_rows, values.shape[1], library.name_of[dtype], 0, "float32").x
        if dtype == torch.float32:
            return rows.zero_().index_add_(0, index, values.float())
        sums = torch.zeros(rows.shape, dtype=torch.float32, device=values.device)
        return rows.copy_(sums.index_add_(0, index, values.float()))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return Gather.apply(grad, index, ctx.dtype, ctx.engine), None, None, None, None


@contextlib.contextmanager
def refusing(engine: Engine, op: str) -> Iterator[None]:
    """What goes wrong inside keeps this rank from its next call, ``op``: peers that make it get the text and do not wait. Where
    it goes wrong on every rank, nothing has happened."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Error):  # the engine has failed before: the first error is what matters
            engine._native.refuse(_native.OPS[op], f"{type(error).__name__}: {error}")
        raise


def check_floats(op: str, name: str, tensor: torch.Tensor) -> None:
    """The gradient of what dispatch sends comes back by combine, which adds these types only."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2 or tensor.dtype not in FLOATS:
        raise argument_error(op, name, f"{tensor.dtype} of shape {list(tensor.shape)}",
                             "2 dimensions of float32, bfloat16 or float16")


@torch.compiler.disable
def dispatch(x: torch.Tensor, handle: Handle, engine: Engine, *, experts: Optional[torch.Tensor] = None,
             weights: Optional[torch.Tensor] = None) -> Rows:
    """``Engine.dispatch`` with gradients. Collective; its backward is a combine with the same handle, collective too.

    Args:
        x: [num_tokens, hidden] float32, bfloat16 or float16; row bytes a multiple of 16.
        handle: of ``engine.route``. It must know the number of experts when ``experts`` is given.
        experts, weights: [num_tokens, k] global ids, int32 or int64, and float32; weights need experts.

    Returns:
        Rows: x [handle.num_rows, hidden]; experts [.., k], local ids, -1 = hosted elsewhere; weights [.., k], 0 there.
        Gradients flow from x and from weights.

    Whether x or weights require a gradient must be the same on every rank, else some rank's backward waits for the others.

    Raises:
        ArgumentError, CapacityError, StateError before anything is sent; PeerTimeoutError, PeerDeadError, MismatchError.
    """
    with refusing(engine, "dispatch"):
        check_floats("dispatch", "x", x)
        if weights is not None and (experts is None or weights.dtype != torch.float32):
            raise argument_error("dispatch", "weights", str(weights.dtype), "float32, with experts")
    rows, weights, _, experts = Dispatch.apply(x, weights, None, None, experts, handle, engine)
    return Rows(rows, None, experts, weights)


@torch.compiler.disable
def combine(x: torch.Tensor, handle: Handle, engine: Engine, *, weights: Optional[torch.Tensor] = None,
            bias: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """``Engine.combine`` with gradients. Collective; its backward is a cached dispatch with the same handle, collective too.

    Args:
        x: [handle.num_rows, hidden] float32, bfloat16 or float16, in the order of dispatch.
        weights: [handle.num_rows, any] float32, summed likewise. bias: [num_tokens, hidden] of x's type.

    Returns:
        (sums [num_tokens, hidden], sums of the weights [num_tokens, any] or None): bias + the rows of each token, ranks
        ascending, in float32, rounded once. Tokens that went nowhere get the bias, or 0.

    Whether x or weights require a gradient must be the same on every rank. Raises as ``dispatch`` does.
    """
    with refusing(engine, "combine"):
        check_floats("combine", "x", x)
        if weights is not None and (weights.dim() != 2 or weights.dtype != torch.float32):
            raise argument_error("combine", "weights", f"{weights.dtype} of shape {list(weights.shape)}",
                                 "float32 of 2 dimensions")
    return Combine.apply(x, weights, bias, handle, engine)
