"""Outputs that are made when the extension has read the inputs: those of low latency, and of a layout."""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Dict, List, Optional, Tuple

from .rows import Slabs

WIRES = {"bf16": 0, "fp8": 1, "ue8m0": 2, "logfmt": 3}

_Array = Tuple[Tuple[int, ...], str]  # shape, element type

_BLOCK_BYTES, _MOST_CALLS = 4 << 20, 16  # of one block
_ALIGNMENT = 512  # bytes: that of torch's own allocations on a GPU
_MOST_KEPT = 8  # shapes, and streams of a shape, that blocks are kept for


def sums_by(library: Any) -> Callable[[int, int], Any]:
    """What makes the output of a combine of (num_tokens, hidden)."""
    return lambda num_tokens, hidden: library.empty((num_tokens, hidden), "bfloat16")


def on_cpu(engine: Any, library: Any) -> Callable[..., Slabs]:
    """What makes slabs of a key on a CPU rank."""
    return functools.partial(_new, engine.num_ranks, engine.rank, library)


def _new(num_ranks: int, rank: int, library: Any, *key: int) -> Slabs:
    x, scales, small = _arrays(num_ranks, rank, False, *key)
    return Slabs(library.empty(*x), None if scales is None else library.empty_swapped(*scales),
                 *(library.empty(*each) for each in small))


def _arrays(num_ranks: int, rank: int, with_rows: bool, num_experts: int, top_k: int, hidden: int, max_tokens: int, wire: int
            ) -> Tuple[_Array, Optional[_Array], List[_Array]]:
    """x, scales, and the small ones, in the order of Slabs. The library has not checked the numbers yet."""
    base, rest = divmod(max(num_experts, 0), num_ranks)
    experts, tokens = base + (rank < rest), max(max_tokens, 0)
    rows = num_ranks * tokens
    scales: Optional[_Array] = None
    if wire == WIRES["fp8"]:
        scales = (experts, rows, -(-hidden // 128)), "float32"
    elif wire == WIRES["ue8m0"]:
        scales = (experts, rows, -(-hidden // 512)), "int32"
    small: List[_Array] = [((experts,), "int32"), ((experts, rows), "int32"), ((experts, num_ranks), "int64")]
    if with_rows:
        small.append(((num_ranks, tokens, top_k), "int32"))
    return ((experts, rows, hidden), "bfloat16" if scales is None else "float8_e4m3fn"), scales, small


class GpuSlabs:
    """Makes those of one engine on a GPU."""

    def __init__(self, gpu: Any, num_ranks: int, rank: int) -> None:
        self._gpu = gpu
        self._arrays = functools.partial(_arrays, num_ranks, rank, True)
        self._small = SmallOutputs(gpu, lambda *key: self._arrays(*key)[2])
        self._large: Dict[Tuple[int, ...], Tuple[_Array, Optional[_Array]]] = {}

    def make(self, *key: int) -> Slabs:
        gpu = self._gpu
        x, scales = self._large.get(key) or self._keep(key)
        return Slabs(gpu.empty(*x), None if scales is None else gpu.empty_swapped(*scales), *self._small.take(*key))

    def clear(self) -> None:
        self._small.clear()
        self._large.clear()

    def _keep(self, key: Tuple[int, ...]) -> Tuple[_Array, Optional[_Array]]:
        if len(self._large) >= _MOST_KEPT:
            self._large.clear()
        self._large[key] = large = self._arrays(*key)[:2]
        return large


def layouts(gpu: Any, num_ranks: int) -> "SmallOutputs":
    """The outputs of ``Engine.layout`` of one engine on a GPU, by (num_tokens, num_experts)."""
    return SmallOutputs(gpu, lambda num_tokens, num_experts: _layout_of(num_ranks, num_tokens, num_experts), zeroed=2)


def layout_on_cpu(engine: Any, library: Any) -> Callable[[int, int], Tuple[Any, ...]]:
    """What makes them on a CPU rank."""
    return lambda *numbers: tuple(library.empty(*each) for each in _layout_of(engine.num_ranks, *numbers))


def _layout_of(num_ranks: int, num_tokens: int, num_experts: int) -> List[_Array]:
    return [((num_ranks,), "int32"), ((max(num_experts, 0),), "int32"), ((num_tokens, num_ranks), "bool")]


class SmallOutputs:
    """Small outputs of calls of one engine on a GPU. What an allocation costs the host, microseconds each, decides: so those of
    several calls are cut from one block per array, on the stream of those calls. Nothing is used twice: a block is freed with
    the last tensor of it, in stream order, and ``record_stream`` of one counts for all.

    Args:
        arrays_of: the arrays of one call, by its numbers.
        zeroed: so many of the first ones hold zeros.
    """

    def __init__(self, gpu: Any, arrays_of: Callable[..., List[_Array]], zeroed: int = 0) -> None:
        self._gpu, self._arrays_of, self._zeroed = gpu, arrays_of, zeroed
        self._is_inference = gpu.torch.is_inference_mode_enabled  # whose tensors do not serve outside, nor others inside
        self._kept: Dict[Tuple[int, ...], _Small] = {}

    def take(self, *key: int) -> Tuple[Any, ...]:
        """Those of one call with these numbers."""
        gpu, kept = self._gpu, self._kept.get(key) or self._keep(key)
        if gpu.is_capturing():  # a graph's memory is its own
            return self._cut(kept.arrays, 1)[0]
        place = gpu.stream(), self._is_inference()
        ready = kept.ready.get(place)
        if not ready:
            ready = self._cut(kept.arrays, kept.next_calls)
            if type(ready[0][0]) is not gpu.torch.Tensor:  # a mode makes tensors of its own, for a while
                return ready[0]
            if len(kept.ready) >= _MOST_KEPT:
                kept.ready.clear()
            kept.ready[place] = ready
            kept.next_calls = min(2 * kept.next_calls, kept.most_calls)  # so that shapes that come and go cost little
        return ready.pop()

    def clear(self) -> None:
        self._kept.clear()

    def _keep(self, key: Tuple[int, ...]) -> "_Small":
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        arrays = self._arrays_of(*key)
        num_bytes = sum(self._pitch(array) * self._size(array) for array in arrays)
        kept = self._kept[key] = _Small(arrays, max(1, min(_MOST_CALLS, _BLOCK_BYTES // max(num_bytes, 1))))
        return kept

    def _size(self, array: _Array) -> int:
        return self._gpu.dtype_of[array[1]].itemsize

    def _pitch(self, array: _Array) -> int:
        """Elements from one call's to the next one's."""
        size = self._size(array)
        return -(-math.prod(array[0]) * size // _ALIGNMENT) * _ALIGNMENT // size

    def _cut(self, arrays: List[_Array], num_calls: int) -> List[Tuple[Any, ...]]:
        columns = []
        for index, array in enumerate(arrays):
            (shape, dtype), pitch = array, self._pitch(array)
            strides = [math.prod(shape[dim + 1:]) for dim in range(len(shape))]
            block = self._gpu.empty((num_calls * pitch,), dtype)
            if index < self._zeroed:
                block.zero_()
            parts = block.as_strided((num_calls, *shape), (pitch, *strides)).unbind(0)
            columns.append([part.data for part in parts])  # each counts its own changes in place
        return list(zip(*columns))


class _Small:
    __slots__ = ("arrays", "most_calls", "next_calls", "ready")

    def __init__(self, arrays: List[_Array], most_calls: int) -> None:
        self.arrays, self.most_calls = arrays, most_calls
        self.next_calls = min(2, most_calls)  # of the next block
        self.ready: Dict[Tuple[int, bool], List[Tuple[Any, ...]]] = {}  # cut, by stream and inference mode
