"""V1's flat handles: made from what the engine learned, and the engine's handle behind them: the one that they were made from
where the tensors are the same objects, else one made from their values alone."""

from __future__ import annotations

from typing import Any, NamedTuple, Sequence, Tuple

import torch
from anyep import _native
from anyep.arrays import view

from .calls import Method

_View = _native.View
_INT32: int = _native.DTYPES["int32"][0]
_CPU = torch.device("cpu")
NUM_TENSORS = 6


def _column(matrix: torch.Tensor, num_ranks: int, column: int) -> Any:
    """Of a matrix made here, [num_ranks, num_ranks] int32."""
    return _View(matrix.data_ptr() + 4 * column, _INT32, (num_ranks,), (num_ranks,))


def make_handle(engine: Any, native: Any, num_rows: int, is_token_in_rank: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Specification 9.1. ``num_rows``: rows of the outputs; where they were not counted, [3] has rows to spare or lacks some."""
    rank, num_ranks = engine.rank, engine.num_ranks
    num_tokens = is_token_in_rank.shape[0]
    prefix = torch.zeros(num_ranks, num_ranks, dtype=torch.int32, device=_CPU)
    tokens = torch.empty(num_ranks, 1, dtype=torch.int32, device=_CPU)
    source = torch.empty(max(num_rows, native.num_rows()), dtype=torch.int32, device=_CPU)
    place = torch.empty(num_tokens, num_ranks, dtype=torch.int32, device=_CPU)
    native.copy_arrays(_column(prefix, num_ranks, rank), _View(place.data_ptr(), _INT32, (num_tokens, num_ranks)),
                       _View(source.data_ptr(), _INT32, source.shape), _View(tokens.data_ptr(), _INT32, (num_ranks,)))
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


class LowLatencyHandle(NamedTuple):
    """Specification 9.3."""

    source: torch.Tensor  #: recv_src_info
    range: torch.Tensor  #: recv_layout_range
    max_tokens: int
    hidden: int
    num_experts: int


def low_latency_handle(method: Method, handle: Sequence[Any]) -> LowLatencyHandle:
    if not isinstance(handle, (tuple, list)):
        raise TypeError(f"handle must be a tuple or a list, got {type(handle).__name__}")
    if len(handle) != len(LowLatencyHandle._fields):
        raise method.refuse("len(handle)", len(handle), f"{len(LowLatencyHandle._fields)}, as low_latency_dispatch returns")
    return LowLatencyHandle(handle[0], handle[1], *(method.number(f"handle[{index}]", handle[index]) for index in (2, 3, 4)))
