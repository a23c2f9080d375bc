"""The interface of DeepEP's V1 ``Buffer``, served by AnyEP: code written for it runs unchanged, on CPU tensors as well.

Every member and its state: docs/python/coming_from_deep_ep.md. Importing touches no GPU, starts nothing and prints nothing.
"""

from __future__ import annotations

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError(f"deep_ep: torch 2.4 or later is needed ({error}). Install it, or use `anyep`, which works without."
                      ) from error

import anyep
from anyep import (ArgumentError, CapacityError, DeviceError, Error, MismatchError, PeerDeadError, PeerTimeoutError,
                   ResourceError, StateError, UnsupportedError)

from . import buffer, utils
from .buffer import Buffer
from .config import Config, topk_idx_t
from .events import EventHandle, EventOverlap

__version__: str = "1.2.1+anyep." + anyep.__version__.replace("+", ".")
__provider__ = "anyep"

__all__ = [
    "ArgumentError", "Buffer", "CapacityError", "Config", "DeviceError", "Error", "EventHandle", "EventOverlap",
    "MismatchError", "PeerDeadError", "PeerTimeoutError", "ResourceError", "StateError", "UnsupportedError", "buffer",
    "topk_idx_t", "utils",
]
