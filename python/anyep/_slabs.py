"""The outputs of low latency, made when the extension has read the inputs."""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Dict, List, Optional, Tuple

from .rows import Slabs

WIRES = {"bf16": 0, "fp8": 1, "ue8m0": 2, "logfmt": 3}

_Array = Tuple[Tuple[int, ...], str]  # shape, element type
_Key = Tuple[int, int, int, int, int]  # num_experts, top_k, hidden, max_tokens, wire

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
    """Makes those of one engine on a GPU. What an allocation costs the host, microseconds each, decides: so the small ones of
    several calls are cut from one block each, on the stream of those calls. Nothing is used twice: a block is freed with the last
    tensor of it, in stream order, and ``record_stream`` of one counts for all."""

    def __init__(self, gpu: Any, num_ranks: int, rank: int) -> None:
        self._gpu, self._num_ranks, self._rank = gpu, num_ranks, rank
        self._is_inference = gpu.torch.is_inference_mode_enabled  # whose tensors do not serve outside, nor others inside
        self._of_shape: Dict[_Key, _OfShape] = {}

    def make(self, *key: int) -> Slabs:
        gpu, kept = self._gpu, self._of_shape.get(key) or self._keep(key)  # type: ignore[call-overload]
        if gpu.is_capturing():  # a graph's memory is its own
            small = self._cut(kept.small, 1).pop()
        else:
            place = gpu.stream(), self._is_inference()
            ready = kept.ready.get(place)
            if not ready:
                ready = self._cut(kept.small, kept.next_calls)
                if type(ready[0][0]) is not gpu.torch.Tensor:  # a mode makes tensors of its own, for a while
                    ready = ready[:1]
                else:
                    if len(kept.ready) >= _MOST_KEPT:
                        kept.ready.clear()
                    kept.ready[place] = ready
                kept.next_calls = min(2 * kept.next_calls, kept.most_calls)  # so that shapes that come and go cost little
            small = ready.pop()
        return Slabs(gpu.empty(*kept.x), None if kept.scales is None else gpu.empty_swapped(*kept.scales), *small)

    def clear(self) -> None:
        self._of_shape.clear()

    def _keep(self, key: _Key) -> "_OfShape":
        if len(self._of_shape) >= _MOST_KEPT:
            self._of_shape.clear()
        x, scales, small = _arrays(self._num_ranks, self._rank, True, *key)
        num_bytes = sum(self._pitch(array) * self._size(array) for array in small)
        kept = self._of_shape[key] = _OfShape(x, scales, small, max(1, min(_MOST_CALLS, _BLOCK_BYTES // max(num_bytes, 1))))
        return kept

    def _size(self, array: _Array) -> int:
        return self._gpu.dtype_of[array[1]].itemsize

    def _pitch(self, array: _Array) -> int:
        """Elements from one call's to the next one's."""
        size = self._size(array)
        return -(-math.prod(array[0]) * size // _ALIGNMENT) * _ALIGNMENT // size

    def _cut(self, arrays: List[_Array], num_calls: int) -> List[Tuple[Any, ...]]:
        columns = []
        for array in arrays:
            (shape, dtype), pitch = array, self._pitch(array)
            strides = [math.prod(shape[dim + 1:]) for dim in range(len(shape))]
            block = self._gpu.empty((num_calls * pitch,), dtype)
            columns.append(block.as_strided((num_calls, *shape), (pitch, *strides)).unbind(0))
        return list(zip(*columns))


class _OfShape:
    __slots__ = ("x", "scales", "small", "most_calls", "next_calls", "ready")

    def __init__(self, x: _Array, scales: Optional[_Array], small: List[_Array], most_calls: int) -> None:
        self.x, self.scales, self.small, self.most_calls = x, scales, small, most_calls
        self.next_calls = min(2, most_calls)  # of the next block
        self.ready: Dict[Tuple[int, bool], List[Tuple[Any, ...]]] = {}  # cut, by stream and inference mode
