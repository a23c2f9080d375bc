"""AnyEP: expert parallelism for Mixture-of-Experts models.

*dispatch* sends each token to every rank that hosts one of its experts, *combine* brings the experts' answers back and sums
them. ``Engine`` is the interface; ``anyep.torch`` has autograd functions and a module, ``deep_ep`` the interface of DeepEP's V1.
Importing this package needs neither torch nor CUDA, starts nothing and prints nothing.
"""

from __future__ import annotations

try:
    from . import _native
except ImportError as error:
    raise ImportError(
        f"anyep: the native part is missing or does not fit this Python ({error}). Install the package (`pip install .` in the "
        "repository), do not import it from its source folder.") from error

from .arrays import Typed
from .bootstrap import (Bootstrap, LocalGroup, as_bootstrap, from_callback, from_mpi, from_torch, run_processes,
                        run_threads)
from .engine import Engine, Event, LowLatency, Tuning
from .errors import (ArgumentError, CapacityError, DeviceError, Error, MismatchError, PeerDeadError, PeerTimeoutError,
                     ResourceError, StateError, UnsupportedError)
from .handle import Handle
from .plan import low_latency_bytes, plan
from .rows import Combined, Dispatched, Rows, Slabs

__version__: str = _native.VERSION
DTYPES = tuple(_native.DTYPES)

_native.collect_log()

__all__ = [
    "ArgumentError", "Bootstrap", "CapacityError", "Combined", "DTYPES", "DeviceError", "Dispatched", "Engine", "Error",
    "Event", "Handle", "LocalGroup", "LowLatency", "MismatchError", "PeerDeadError", "PeerTimeoutError", "ResourceError",
    "Rows", "Slabs", "StateError", "Tuning", "Typed", "UnsupportedError", "as_bootstrap", "from_callback", "from_mpi",
    "from_torch", "low_latency_bytes", "plan", "run_processes", "run_threads",
]
