"""A dispatch whose rows move before the host knows how many they are."""

from __future__ import annotations

from typing import Any, Optional, Tuple

from ._calls import _forward_log, _log_waits
from .handle import Handle
from .rows import Dispatched, Rows


def dispatch_ahead(engine: Any, handle: Handle, given: Rows, views: Tuple[Any, ...], options: Tuple[Any, ...]
                   ) -> Optional[Dispatched]:
    """On a GPU, behind a route whose counts the host has not seen: into room for a guess of the number of rows, which is cut to
    size while they move. None: the window has no such room, or more rows come than that, and none has moved."""
    gpu, native = engine._gpu, engine._native
    tensors = (given.x, given.scales, given.experts, given.weights, *given.extra)
    if any(tensor is not None and not (isinstance(tensor, gpu.torch.Tensor) and tensor.dim() == 2) for tensor in tensors):
        return None
    guess = native.rows_ahead(handle.num_tokens)
    held = gpu.rows_ahead(*(((guess, tensor.shape[1]), tensor.dtype) for tensor in (given.x, given.scales) if tensor is not None))
    if None in held:
        return None
    if given.scales is None:
        held.append(None)
    beside = [None if tensor is None else gpu.new((guess, tensor.shape[1]), tensor.dtype) for tensor in tensors[2:]]
    event, dispatched = native.dispatch_ahead(
        handle._native, *views, *(None if one is None else one[0] for one in held), *beside[:2], beside[2:], engine._stream(),
        *options)
    if _log_waits():
        _forward_log()
    if not dispatched:
        return None
    num_rows = handle.num_rows
    x, scales = (None if one is None else gpu.cut(one, num_rows) for one in held)
    experts, weights, *extra = (None if tensor is None else tensor.resize_(num_rows, tensor.shape[1]) for tensor in beside)
    return Dispatched(Rows(x, scales, experts, weights, tuple(extra)), event)
