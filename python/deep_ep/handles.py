"""V1's flat handles: made from what the engine learned, and the engine's handle behind them: the one that they were made from
where the tensors are the same objects, else one made from their values alone."""

from __future__ import annotations

from typing import Any, Sequence, Tuple

import torch
from anyep import _native
from anyep.arrays import torch_library, view

from .calls import Method

_TORCH = torch_library()
NUM_TENSORS = 6


def make_handle(engine: Any, native: Any, num_rows: int, is_token_in_rank: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Specification 9.1. ``num_rows``: rows of the outputs; where they were not counted, [3] has rows to spare or lacks some."""
    num_ranks, num_tokens = engine.num_ranks, is_token_in_rank.shape[0]
    prefix = _TORCH.new((num_ranks, num_ranks), torch.int32)
    tokens = _TORCH.new((num_ranks, 1), torch.int32)
    source = _TORCH.new((max(num_rows, native.num_rows()),), torch.int32)
    place = _TORCH.new((num_tokens, num_ranks), torch.int32)
    native.copy_v1(prefix, tokens, source, place)
    if source.shape[0] > num_rows:  # num_worst_tokens was too small, which the dispatch reports
        source = source[:num_rows].clone()
    else:
        engine._shown.add(native, (prefix, tokens, source, place, is_token_in_rank))
    return prefix, tokens, tokens, source, is_token_in_rank, place


def must_be_six(method: Method, handle: Any) -> None:
    if not isinstance(handle, (tuple, list)):
        raise TypeError(f"handle must be a tuple or a list, got {type(handle).__name__}")
    if len(handle) != NUM_TENSORS:
        raise method.refuse("len(handle)", len(handle), f"{NUM_TENSORS}, as dispatch returns")


def find(method: Method, engine: Any, handle: Any, with_ranks: bool) -> Any:
    """The engine's own handle that these tensors show, or None. ``with_ranks``: the values of [4] count too."""
    must_be_six(method, handle)
    prefix, tokens, tokens_again, source, token_in_rank, place = handle
    if tokens_again is not tokens:
        return None
    return engine._shown.find((prefix, tokens, source, place, token_in_rank) if with_ranks else (prefix, tokens, source, place))


def handle_of(method: Method, engine: Any, handle: Any) -> Tuple[Any, int]:
    """The engine's handle, and the rows that the tensors of this handle's dispatch have."""
    native = find(method, engine, handle, with_ranks=True)
    return native or adopt(method, handle, engine.rank, engine.num_ranks), handle[3].shape[0]


def adopt(method: Method, handle: Sequence[Any], rank: int, num_ranks: int) -> Any:
    prefix, tokens, _, source, token_in_rank, place = [view(method.name, f"handle[{i}]", tensor)
                                                        for i, tensor in enumerate(handle)]
    return _native.Handle.adopt_v1(num_ranks, rank, prefix, tokens, source, token_in_rank, place)


#: What the C++ library calls the tensors of a handle.
HANDLE_NAMES = {"rows_until": "handle[0]", "tokens": "handle[1]", "source": "handle[3]", "place": "handle[5]"}


def low_latency_handle(method: Method, handle: Any) -> Tuple[Any, Any, int, int, int]:
    """Specification 9.3: recv_src_info, recv_layout_range, most tokens of a rank, hidden, experts."""
    if not isinstance(handle, (tuple, list)):
        raise TypeError(f"handle must be a tuple or a list, got {type(handle).__name__}")
    if len(handle) != 5:
        raise method.refuse("len(handle)", len(handle), "5, as low_latency_dispatch returns")
    source, layout_range, max_tokens, hidden, num_experts = handle
    return (source, layout_range, method.number("handle[2]", max_tokens), method.number("handle[3]", hidden),
            method.number("handle[4]", num_experts))
