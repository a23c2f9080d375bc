"""Arrays of other libraries: how their memory is seen (View) and how outputs of the same library are made.

torch tensors and numpy arrays are known by name; anything else with DLPack, the CUDA array interface or the buffer protocol
serves as an input, and its outputs are numpy arrays. Neither library is imported here before a caller hands over one of its
arrays. ``device`` is where an engine's tensors lie: a GPU's number, or -1 for the memory of the CPU. Outputs of engines on GPUs
are torch tensors (_gpu.py).
"""

from __future__ import annotations

import math
import sys
from typing import Any, Callable, Dict, Optional, Tuple

from . import _native
from .errors import ArgumentError

View = _native.View
_CODES: Dict[str, int] = {name: code for name, (code, _) in _native.DTYPES.items()}
_SIZES: Dict[int, int] = dict(_native.DTYPES.values())
_BYTES: Dict[str, int] = {name: size for name, (_, size) in _native.DTYPES.items()}
# glibc's DEFAULT_MMAP_THRESHOLD_MAX: what is larger gets fresh pages from malloc every time (native/recycle.cc).
_LARGE_BYTES = 32 << 20


class Typed:
    """An array whose library has no name for its element type: raw elements and the type they stand for.

    Args:
        array: elements of the same size, e.g. numpy uint16 for "bfloat16", uint8 for "float8_e4m3fn".
        dtype: one of ``anyep.DTYPES``.

    Outputs of a call with a Typed input are Typed, on numpy arrays of unsigned integers.
    """

    __slots__ = ("array", "dtype")

    def __init__(self, array: Any, dtype: str) -> None:
        if dtype not in _CODES:
            raise ArgumentError(f"Typed: dtype = {dtype!r}, allowed: {', '.join(_CODES)}", argument="dtype")
        self.array = array
        self.dtype = dtype

    @property
    def shape(self) -> Tuple[int, ...]:
        return tuple(self.array.shape)

    def __repr__(self) -> str:
        return f"Typed({self.array!r}, {self.dtype!r})"


class TorchLibrary:
    """torch on one device. Every tensor gets its type and device: users set defaults of their own. ``dtype``: torch's or a name."""

    _TYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float8_e4m3fn", "bfloat16", "float16", "float32", "float64")

    def __init__(self, torch: Any, device: Any, most_bytes: float = math.inf) -> None:
        self.torch = torch
        self.torch_device = device
        self.dtype_of = {name: getattr(torch, name) for name in self._TYPES}
        self.name_of = {dtype: name for name, dtype in self.dtype_of.items()}
        self.code_of = {dtype: _CODES[name] for name, dtype in self.dtype_of.items()}
        self._most_bytes = most_bytes  # larger ones are made by _large
        # By type and by name: a tensor without elements, whose new_empty takes half of torch.empty's time, and most elements.
        self._seeds: Dict[Any, Tuple[Any, float]] = {}

    def _seed(self, dtype: Any) -> Tuple[Any, float]:
        kind = self.dtype_of.get(dtype, dtype)
        made = self.torch.empty(0, dtype=kind, device=self.torch_device)
        seed = made, self._most_bytes / kind.itemsize
        if type(made) is self.torch.Tensor:  # else a mode makes tensors of its own, for a while
            self._seeds[dtype] = seed
        return seed

    def empty(self, shape: Tuple[int, ...], dtype: Any) -> Any:
        """``torch.empty``."""
        seed, most = self._seeds.get(dtype) or self._seed(dtype)
        return seed.new_empty(*shape) if most == math.inf or math.prod(shape) <= most else self._large(shape, dtype)

    new = empty

    def empty_swapped(self, shape: Tuple[int, int, int], dtype: Any) -> Any:
        """The middle dimension is the one without gaps."""
        planes, rows, columns = shape
        seed, most = self._seeds.get(dtype) or self._seed(dtype)
        if math.prod(shape) > most:
            return self._large((planes, columns, rows), dtype).transpose(1, 2)
        return seed.new_empty_strided(shape, (rows * columns, 1, rows))

    def _large(self, shape: Tuple[int, ...], dtype: Any) -> Any:
        raise NotImplementedError


class _Torch(TorchLibrary):
    """torch on the CPU. Large tensors get memory that served others before."""

    def __init__(self) -> None:
        torch = sys.modules["torch"]
        super().__init__(torch, torch.device("cpu"), _LARGE_BYTES)
        _native.use_torch(torch.Tensor, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),  # since torch 2.10
                          getattr(torch._C, "_from_dlpack", torch.utils.dlpack.from_dlpack))

    def view(self, tensor: Any, device: int = -1) -> View:
        if tensor.get_device() != device or (device < 0 and not tensor.is_cpu):
            raise ValueError(_elsewhere(device, str(tensor.device)))
        return View(tensor.data_ptr(), self.code_of[tensor.dtype], tensor.shape, tensor.stride())

    def _large(self, shape: Tuple[int, ...], dtype: Any) -> Any:
        kind = self.dtype_of.get(dtype, dtype)
        return self.over(_native.recycled_memory(math.prod(shape) * kind.itemsize), shape, kind)

    def over(self, memory: Any, shape: Tuple[int, ...], dtype: Any) -> Any:
        """A tensor over memory that it keeps alive."""
        return self.torch.frombuffer(memory, dtype=self.dtype_of.get(dtype, dtype)).view(*shape)


class _Numpy:
    """numpy; element types that it lacks (bfloat16, float8_e4m3fn) come from ml_dtypes arrays or as Typed."""

    _RAW = {1: "uint8", 2: "uint16"}

    def __init__(self, extension: Optional[Dict[str, Any]] = None) -> None:
        import numpy

        self.numpy = numpy
        self._extension = extension or {}

    def _make(self, dtype: str, make: Callable[[Any], Any]) -> Any:
        if dtype in self._extension:
            return make(self._extension[dtype])
        if dtype in ("bfloat16", "float8_e4m3fn"):
            return Typed(make(self.numpy.dtype(self._RAW[_BYTES[dtype]])), dtype)
        return make(self.numpy.dtype(dtype))

    def empty(self, shape: Tuple[int, ...], dtype: str) -> Any:
        num_bytes = math.prod(shape) * _BYTES[dtype]
        if num_bytes > _LARGE_BYTES:
            return self.over(_native.recycled_memory(num_bytes), shape, dtype)
        return self._make(dtype, lambda kind: self.numpy.empty(shape, dtype=kind))

    def empty_swapped(self, shape: Tuple[int, int, int], dtype: str) -> Any:
        planes, rows, columns = shape
        return self.empty((planes, columns, rows), dtype).transpose(0, 2, 1)

    def over(self, memory: Any, shape: Tuple[int, ...], dtype: str) -> Any:
        return self._make(dtype, lambda kind: self.numpy.frombuffer(memory, dtype=kind).reshape(shape))


_torch: Optional[_Torch] = None
_numpy: Optional[_Numpy] = None
_views: Dict[type, Callable[[Any, int], View]] = {View: lambda view, device: view}


def _is_torch(kind: type) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "Tensor") and issubclass(kind, torch.Tensor)


def torch_library() -> _Torch:
    """For an input of torch, and for modules that work on its tensors only: torch has been imported."""
    global _torch
    if _torch is None:
        _torch = _Torch()
    return _torch


def _numpy_library() -> _Numpy:
    global _numpy
    if _numpy is None:
        _numpy = _Numpy()
    return _numpy


def _is_extension(array: Any) -> bool:
    """An ml_dtypes array: numpy does not know the type itself, but its name is one of ours."""
    dtype = getattr(array, "dtype", None)
    return getattr(dtype, "kind", "") == "V" and getattr(dtype, "name", "") in _CODES


def _elsewhere(device: int, where: str) -> str:
    return f"a tensor on {'the CPU' if device < 0 else f'GPU {device} (cuda:{device})'} is needed, this one is on {where}"


# Names of the CUDA array interface; what it lacks (bfloat16, float8) comes as Typed.
_TYPESTRS = {"|b1": "bool", "|u1": "uint8", "|i1": "int8", "<i2": "int16", "<i4": "int32", "<i8": "int64", "<f2": "float16",
             "<f4": "float32", "<f8": "float64", "<u2": "int16", "<u4": "int32", "<u8": "int64", "<V2": "int16", "|V2": "int16"}


def _interface_view(array: Any, device: int, code: int) -> View:
    """Of an array with __cuda_array_interface__, CuPy's say."""
    interface = array.__cuda_array_interface__
    lies_on = getattr(getattr(array, "device", None), "id", None)
    if lies_on is not None and lies_on != device:
        raise ValueError(_elsewhere(device, f"GPU {lies_on}"))
    name = _TYPESTRS.get(interface["typestr"])
    if name is None:
        raise TypeError("its element type is none of anyep's; name one with anyep.Typed")
    size = _BYTES[name]
    if code >= 0 and size != _SIZES[code]:
        raise TypeError("the named element type has another size than the array's elements")
    shape, strides = interface["shape"], interface.get("strides")
    return View(interface["data"][0], _CODES[name] if code < 0 else code, shape,
                None if strides is None else tuple(stride // size for stride in strides))


def _foreign_view(array: Any, device: int, code: int = -1) -> View:
    if hasattr(array, "__cuda_array_interface__"):
        if device < 0:
            raise ValueError(_elsewhere(device, "a GPU"))
        return _interface_view(array, device, code)
    return _native.view_of(array, code, device)


def _typed_view(typed: Typed, device: int) -> View:
    if _is_torch(type(typed.array)):
        view = torch_library().view(typed.array, device)
        if _BYTES[view.dtype] != _BYTES[typed.dtype]:
            raise TypeError("the named element type has another size than the array's elements")
        return View(view.address, _CODES[typed.dtype], view.shape, view.strides)
    return _foreign_view(typed.array, device, _CODES[typed.dtype])


def _other_view(array: Any, device: int) -> View:
    if _is_extension(array):
        raw = array.view(_Numpy._RAW[array.dtype.itemsize])
        return _native.view_of(raw, _CODES[array.dtype.name], device)
    return _foreign_view(array, device)


def _view_function(kind: type) -> Callable[[Any, int], View]:
    if kind is Typed:
        function: Callable[[Any, int], View] = _typed_view
    elif _is_torch(kind):
        function = torch_library().view
    else:
        function = _other_view
    _views[kind] = function
    return function


def _any_view(op: str, name: str, array: Any, device: int) -> View:
    """What ``view`` does not read itself."""
    kind = type(array)
    try:
        return (_views.get(kind) or _view_function(kind))(array, device)
    except KeyError:
        got: object = getattr(array, "dtype", kind.__name__)
        allowed = ", ".join(_CODES)
    except TypeError as error:
        if hasattr(array, "dtype") or isinstance(array, Typed):
            got, allowed = f"{getattr(array, 'dtype', '')} array", f"{', '.join(_CODES)} ({error})"
        else:
            raise TypeError(f"{op}: {name} must be a tensor (torch, numpy, DLPack or buffer), got {kind.__name__}") from None
    except ValueError as error:
        got, allowed = _describe(array), str(error).splitlines()[0]
    except (RuntimeError, BufferError) as error:  # torch: sparse, ...
        got, allowed = _describe(array), f"a strided tensor with memory of its own ({str(error).splitlines()[0]})"
    raise ArgumentError(f"{op}: {name} = {got}, allowed: {allowed}", op=op, argument=name, got=str(got), allowed=allowed)


def _describe(array: Any) -> str:
    return f"tensor of shape {list(array.shape)}" if hasattr(array, "shape") else type(array).__name__


_native.read_others(_any_view)
#: (op, name, array, device=-1) -> View: the memory of an array. TypeError: not an array; ArgumentError: not on ``device``, an
#: element type that anyep lacks, not 1 to 4 dimensions. The caller keeps the array alive.
view: Callable[..., View] = _native.view
#: The same; None for None.
optional_view: Callable[..., Optional[View]] = _native.optional_view


def library_of(array: Any) -> Any:
    """What makes outputs of the same kind as an input."""
    if _torch is not None and type(array) is _torch.torch.Tensor:
        return _torch
    if isinstance(array, Typed):
        return _numpy_library()
    if _is_torch(type(array)):
        return torch_library()
    if _is_extension(array):
        return _Numpy(extension={array.dtype.name: array.dtype})
    return _numpy_library()


def code_of(dtype: str) -> int:
    return _CODES[dtype]
