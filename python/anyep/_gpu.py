"""What an engine on a GPU needs of torch: streams, outputs, and tensors over memory of the engine's own."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from typing import Any, Iterator, List, Optional, Sequence, Tuple

from . import _native
from .arrays import TorchLibrary, code_of, torch_library
from .errors import CapacityError, UnsupportedError, argument_error

logger = logging.getLogger("anyep")

_UINT8 = code_of("uint8")
_LEAST_CUT = 2 << 20  # bytes; torch splits a large block where more than 1 MiB would be left
# One for the process: torch keeps no reference to it, and frees what it gave at any time. Making it lets other threads run.
_allocator: Any = None
_making_allocator = threading.Lock()


class Gpu(TorchLibrary):
    """One engine's GPU. A library of arrays (see arrays.py): its tensors lie on that GPU."""

    def __init__(self, native: Any, device: int) -> None:
        import torch

        super().__init__(torch, torch.device("cuda", device))
        torch_library()  # inputs are read as torch's
        self._native = native
        self.device = device
        self.pool = WindowPool(native, device)
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or self._slow_stream
        #: Is torch's current stream being captured into a graph?
        self.is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)

    def _slow_stream(self, device: int) -> int:
        return self.torch.cuda.current_stream(device).cuda_stream

    def stream(self) -> int:
        """torch's current stream on this GPU."""
        return self._raw_stream(self.device)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """``stream`` as torch's current stream: what is allocated belongs to it. The current one afterwards is the one before."""
        torch = self.torch
        if not isinstance(stream, torch.cuda.Stream):
            stream = torch.cuda.ExternalStream(number_of(stream), device=self.torch_device)
        if stream.device_index != self.device:
            raise argument_error("stream", "stream", f"of GPU {stream.device_index}", f"a stream of GPU {self.device}")
        with torch.cuda.stream(stream):
            yield

    # ---- outputs

    def rows(self, *parts: Tuple[Tuple[int, ...], Any]) -> List[Any]:
        """Rows that peers can write, where the window has room; elsewhere one more copy brings them there. ``parts``: shapes and
        element types of the fields of rows."""
        made = [self._captured_rows(*part) for part in parts] if self.is_capturing() else self.pool.empty(self, parts)
        return [self.empty(*part) if tensor is None else tensor for part, tensor in zip(parts, made)]

    def rows_ahead(self, *parts: Tuple[Tuple[int, ...], Any]) -> List[Optional[List[Any]]]:
        """The same for a guess of the number of rows, each for ``cut``; None: the window has no free room for so many."""
        return [None if tensor is None else [tensor] for tensor in self.pool.empty(self, parts, ahead=True)]

    def cut(self, ahead: List[Any], num_rows: int) -> Any:
        """The first rows of what ``rows_ahead`` gave; what lies behind them goes back to the pool where torch lets it."""
        return self.pool.cut(ahead, num_rows, self)

    def _captured_rows(self, shape: Tuple[int, ...], dtype: Any) -> Any:
        """A capture has a pool of its own, which torch prefers to ours. What is allocated here goes to no other call as long as
        the engine lives: a replay writes it again."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return None
        try:
            rows = self._native.make_rows(1, num_bytes, _UINT8, 0, self.stream())
        except CapacityError:
            return None
        memory, _ = _native.memories_of(rows)
        return self.over(memory, shape, dtype)

    def over(self, memory: Any, shape: Tuple[int, ...], dtype: Any) -> Any:
        """A tensor over memory on this GPU, which it keeps alive."""
        view = _native.View(memory.address, _UINT8, (memory.bytes,))
        flat = _native.tensor_of(view, self.device, memory)
        return flat.view(self.dtype_of.get(dtype, dtype)).view(*shape)

    def copy_of(self, view: Any) -> Any:
        """A tensor with what a view shows, in stream order."""
        return _native.tensor_of(view, self.device).clone()


class WindowPool:
    """Tensors in an engine's window that behave as all of torch's: torch's caching allocator hands them out, from segments that
    lie there. So a freed one is reused in stream order, and ``record_stream`` counts. Without torch's pools (before 2.5), or
    without room in the window, there are none."""

    def __init__(self, native: Any, device: int) -> None:
        self._native = native
        self._device = device
        self._pool: Any = None
        self._torch: Any = None
        self._begin: Any = None
        self._usable = True
        self._too_large = [math.inf, math.inf]  # bytes that did not fit (of rows made ahead), until something is freed
        self._freed = 0

    def close(self) -> None:
        """Tensors that are alive stay so."""
        self._usable, self._pool = False, None

    def empty(self, gpu: Gpu, parts: Sequence[Tuple[Tuple[int, ...], Any]], ahead: bool = False) -> List[Any]:
        """Tensors of these shapes and element types; None: ordinary memory has to do. ``ahead``: only what is free in pool or
        window."""
        if self._pool is None and not (self._usable and self._open()):
            return [None] * len(parts)
        made: List[Any] = []
        _native.allocate_from(self._native, ahead)
        try:
            if self._begin is None:
                with self._torch.cuda.use_mem_pool(self._pool, gpu.torch_device):
                    self._fill(made, gpu, parts, ahead)
            else:
                pool = self._id
                self._begin(self._device, pool)
                try:
                    self._fill(made, gpu, parts, ahead)
                finally:
                    self._end(self._device, pool)
                    self._release(self._device, pool)
        except RuntimeError as error:  # this torch, or its settings, has no pools like this one
            self._native.check()
            self._usable, self._pool = False, None
            logger.info("rows lie outside the window, which costs a copy: torch's pools: %s", error)
            made += [None] * (len(parts) - len(made))
        finally:
            _native.allocate_from(None)
        return made

    def _fill(self, made: List[Any], gpu: Gpu, parts: Sequence[Tuple[Tuple[int, ...], Any]], ahead: bool) -> None:
        for shape, dtype in parts:
            num_bytes = math.prod(shape) * dtype.itemsize
            made.append(None if num_bytes == 0 or self._does_not_fit(num_bytes, ahead) else
                        self._one(gpu, shape, dtype, num_bytes, ahead))

    def _does_not_fit(self, num_bytes: int, ahead: bool) -> bool:
        if num_bytes < self._too_large[ahead]:
            return False
        if self._freed == _native.num_freed():
            return True
        self._too_large = [math.inf, math.inf]
        return False

    def _one(self, gpu: Gpu, shape: Tuple[int, ...], dtype: Any, num_bytes: int, ahead: bool) -> Any:
        try:
            return gpu.new(shape, dtype)
        except self._torch.cuda.OutOfMemoryError:
            self._native.check()  # a failed engine refuses rows too, and its error is what matters
            self._too_large[ahead], self._freed = num_bytes, _native.num_freed()
            if not ahead:
                logger.info("rows of %d bytes lie outside the window: %s", num_bytes, _native.refusal())
            return None

    def cut(self, ahead: List[Any], num_rows: int, gpu: Gpu) -> Any:
        """torch cannot shrink a block. But a block that is freed and asked for again in a smaller size comes from the same place,
        unless a smaller free one fits better: then it is taken back whole. Nobody else allocates from this pool in between, and
        on the stream nothing comes between the dispatch that fills the rows and who uses them."""
        whole = ahead.pop()
        shape, dtype = whole.shape, whole.dtype
        front = (num_rows, *shape[1:])
        kept_bytes = math.prod(front) * dtype.itemsize
        if self._begin is None or num_rows == 0 or whole.nbytes - kept_bytes < _LEAST_CUT:
            return whole.resize_(front)  # smaller, in its place: half the time of a slice, and no view
        address = whole.data_ptr()
        del whole
        rows = self.empty(gpu, ((front, dtype),), ahead=True)[0]
        if rows is not None and rows.data_ptr() == address:
            return rows
        del rows
        whole = self.empty(gpu, ((shape, dtype),), ahead=True)[0]
        if whole is not None and whole.data_ptr() == address:
            return whole.resize_(front)
        # Another thread has given tensors of the pool back meanwhile. The rows still lie where they lay.
        rows = gpu.new(front, dtype) if whole is None else whole.resize_(front)
        shown = _native.tensor_of(_native.View(address, _UINT8, (kept_bytes,)), self._device)
        rows.view(gpu.torch.uint8).view(-1).copy_(shown)
        return rows

    def _open(self) -> bool:
        global _allocator
        import torch

        self._torch = torch
        memory = getattr(torch.cuda, "memory", None)
        if not (hasattr(torch.cuda, "MemPool") and hasattr(torch.cuda, "use_mem_pool")):
            self._usable = False
            return False
        try:
            with torch.cuda.device(self._device):
                with _making_allocator:
                    if _allocator is None:
                        _allocator = memory.CUDAPluggableAllocator(_native.__file__, _native.ALLOCATE, _native.FREE)
                self._pool = torch.cuda.MemPool(_allocator.allocator())
        except (RuntimeError, OSError, AttributeError, TypeError) as error:
            self._usable = False
            logger.info("rows lie outside the window, which costs a copy: torch's pools: %s", error)
            return False
        self._id = self._pool.id
        # What use_mem_pool does, without its context manager: this is part of every dispatch.
        parts = [getattr(torch._C, name, None) for name in
                 ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool")]
        if all(parts):
            self._begin, self._end, self._release = parts
        return True


def number_of(stream: Any) -> int:
    """A stream of torch (``cuda_stream``), CuPy (``ptr``), the CUDA stream protocol, or its number."""
    if isinstance(stream, int):
        return stream
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            return getattr(stream, name)
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return (protocol() if callable(protocol) else protocol)[1]
    raise TypeError(f"stream must be a CUDA stream or its number, got {type(stream).__name__}")


def device_of(device: Any, group: Any) -> int:
    """The GPU of an engine; -1 = CPU ranks. ``device``: a number, a torch device or its name; None: torch's current GPU where the
    group's own tensors lie on GPUs (NCCL), else the CPU. ANYEP_BACKEND overrides: "cpu", or "cuda"."""
    backend = os.environ.get("ANYEP_BACKEND", "auto")
    if backend == "cpu":
        return -1
    if device is None:
        if backend == "cuda" or _talks_by_gpus(group):
            return _current_device()
        return -1
    if isinstance(device, int) and not isinstance(device, bool):
        number: Optional[int] = device
    else:
        torch = torch_library().torch if not isinstance(device, str) else _import_torch()
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError):
            raise argument_error("create", "device", repr(device), "a GPU's number, 'cuda', 'cuda:N', 'cpu' or a torch.device"
                                 ) from None
        if place.type not in ("cpu", "cuda"):
            raise argument_error("create", "device", repr(device), "a GPU's number, 'cuda', 'cuda:N' or 'cpu'")
        number = -1 if place.type == "cpu" else place.index if place.index is not None else _current_device()
    if number is None or number < -1:
        raise argument_error("create", "device", repr(device), "-1 (CPU ranks) or a GPU's number")
    if number < 0 and backend == "cuda":
        return _current_device()
    return number


def must_have_torch(device: int) -> None:
    """An engine on a GPU makes its outputs with torch."""
    try:
        torch = _import_torch()
    except ImportError as error:
        raise UnsupportedError(f"create: engines on GPUs need torch ({error}). Install it, or use CPU ranks.", op="create"
                               ) from None
    if not torch.cuda.is_available():
        raise UnsupportedError(f"create: device = {device}, but torch sees no GPU. Use CPU ranks, or install a torch with CUDA "
                               "and a driver.", op="create")
    if device >= torch.cuda.device_count():
        raise argument_error("create", "device", device, f"0..{torch.cuda.device_count() - 1}")
    torch.cuda.init()


def _talks_by_gpus(group: Any) -> bool:
    import sys

    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return False
    return dist.get_backend(group) == "nccl"


def _import_torch() -> Any:
    import torch

    return torch


def _current_device() -> int:
    try:
        torch = _import_torch()
    except ImportError:
        return 0
    return torch.cuda.current_device() if torch.cuda.is_available() else 0
