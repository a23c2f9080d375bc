"""What ``Engine.route`` learned."""

from __future__ import annotations

import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple

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


class _Shown(weakref.ref):
    """A native handle and the tensors that show its arrays; a reference to the first of them."""

    __slots__ = ("key", "native", "others", "versions")


class ShownHandles:
    """Native handles of one engine by the torch tensors that were made of them, for callers whose handles are tensors. An entry
    lives as long as its first tensor and keeps no tensor alive. Tensors that were made, copied or moved elsewhere are not
    known, nor are those that were changed in place, as far as torch counts changes: not in inference mode."""

    def __init__(self) -> None:
        self._shown: Dict[int, _Shown] = {}

    def add(self, native: Any, tensors: Sequence[Any]) -> None:
        """All of them different tensors."""
        first = tensors[0]
        shown = self._shown
        entry = _Shown(first, lambda gone: shown.pop(gone.key, None))
        entry.key, entry.native = id(first), native
        entry.others = tuple(map(weakref.ref, tensors[1:]))
        entry.versions = _versions(tensors)
        shown[entry.key] = entry

    def find(self, tensors: Sequence[Any]) -> Optional[Any]:
        """The handle that all of these tensors show; None if it is not known."""
        first = tensors[0]
        entry = self._shown.get(id(first))
        if entry is None or entry() is not first:
            return None
        for tensor, known in zip(tensors[1:], entry.others):
            if known() is not tensor:
                return None
        return entry.native if entry.versions == _versions(tensors) else None

    def clear(self) -> None:
        self._shown.clear()


def _versions(tensors: Sequence[Any]) -> Optional[List[int]]:
    """How often each was changed in place; None if torch does not count that."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # made in inference mode
        return None
