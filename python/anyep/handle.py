"""What ``Engine.route`` learned."""

from __future__ import annotations

from typing import Any, List, Tuple

from . import _native
from .arrays import library_of, optional_view, view


class Handle:
    """What ``route`` learned: serves any number of calls, in any order, at any later time. Values only."""

    __slots__ = ("_native", "_gpu", "_keep")

    def __init__(self, native: Any, gpu: Any = None, keep: Any = None) -> None:
        self._native = native
        self._gpu = gpu
        self._keep = keep  # tensors that an adopted handle shows

    @classmethod
    def adopt(cls, num_ranks: int, rank: int, rows_until: Any, place: Any, source: Any, tokens: Any) -> "Handle":
        """From arrays that a caller kept (see ``arrays``); copies them. ArgumentError: malformed or inconsistent arrays. For
        engines on GPUs: ``Engine.adopt``."""
        op = "adopt"
        return cls(_native.Handle.adopt(num_ranks, rank, view(op, "rows_until", rows_until), view(op, "place", place),
                                        view(op, "source", source), view(op, "tokens", tokens)))

    @property
    def num_rows(self) -> int:
        """Rows that this rank receives. Waits for the counts of all ranks."""
        return self._native.num_rows()

    @property
    def num_tokens(self) -> int:
        return self._native.num_tokens()

    @property
    def num_ranks(self) -> int:
        return self._native.num_ranks()

    def pairs_per_expert(self, alignment: int = 1) -> List[int]:
        """Pairs received per local expert, each rounded up to ``alignment``. Waits; empty for an adopted handle."""
        return self._native.pairs_per_expert(alignment)

    def arrays(self, like: Any = None) -> Tuple[Any, Any, Any, Any]:
        """Copies: rows_until int32 [R], place int32 [num_tokens, R] (row at that rank, -1 = not sent there), source int32
        [num_rows], tokens int32 [R] (every source's number of tokens). Of the library of ``like`` (default: numpy). On a GPU:
        torch tensors in stream order, after the first dispatch, source with as many entries as it had rows."""
        if self._gpu is not None:
            return tuple(self._gpu.copy_of(view) for view in self._native.views())  # type: ignore[return-value]
        library = library_of(like)
        num_ranks = self.num_ranks
        shapes = ((num_ranks,), (self.num_tokens, num_ranks), (self.num_rows,), (num_ranks,))
        arrays = tuple(library.empty(shape, "int32") for shape in shapes)
        self.copy_arrays(*arrays)
        return arrays

    def copy_arrays(self, rows_until: Any = None, place: Any = None, source: Any = None, tokens: Any = None) -> None:
        """The same into the caller's dense int32 arrays; None leaves one out."""
        op = "copy_arrays"
        if self._gpu is not None:
            for target, array in zip((rows_until, place, source, tokens), self.arrays()):
                if target is not None:
                    target[:array.shape[0]].copy_(array)
            return
        self._native.copy_arrays(optional_view(op, "rows_until", rows_until), optional_view(op, "place", place),
                                 optional_view(op, "source", source), optional_view(op, "tokens", tokens))
