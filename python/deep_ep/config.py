"""Configurations, default tables and size hints, to the byte of V1 (computed by the C++ library)."""

from __future__ import annotations

import os
from typing import Any, Tuple

import torch
from anyep import _native

from .calls import Method


def _topk_idx_type() -> torch.dtype:
    bits = os.environ.get("ANYEP_TOPK_IDX_BITS", "64")
    if bits not in ("32", "64"):
        raise ImportError(f"deep_ep: ANYEP_TOPK_IDX_BITS = {bits!r}, allowed: 64, 32. Change or unset it.")
    return torch.int32 if bits == "32" else torch.int64


#: What ids are by default; every ``topk_idx`` may be int64 or int32 all the same.
topk_idx_t: torch.dtype = _topk_idx_type()

_FIELDS = ("num_sms", "num_max_nvl_chunked_send_tokens", "num_max_nvl_chunked_recv_tokens",
           "num_max_rdma_chunked_send_tokens", "num_max_rdma_chunked_recv_tokens")
_CONFIG = Method("Config", names=dict(zip(("num_sms", "nvl_send", "nvl_recv", "rdma_send", "rdma_recv"), _FIELDS)))
_HINT_NAMES = {"max_tokens": "num_max_dispatch_tokens_per_rank"}


class Config:
    """How much of the machine an operation may take. ``num_sms``: most SMs (threads on CPU ranks); the four chunk sizes enter
    the size hints and are otherwise advice."""

    __slots__ = ("_native",)

    def __init__(self, num_sms: int = 20, num_max_nvl_chunked_send_tokens: int = 6, num_max_nvl_chunked_recv_tokens: int = 256,
                 num_max_rdma_chunked_send_tokens: int = 6, num_max_rdma_chunked_recv_tokens: int = 256) -> None:
        with _CONFIG.call():
            self._native = _native.v1_config(num_sms, num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens,
                                             num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens)

    @property
    def num_sms(self) -> int:
        return self._native.num_sms

    @property
    def num_max_nvl_chunked_send_tokens(self) -> int:
        return self._native.num_max_nvl_chunked_send_tokens

    @property
    def num_max_nvl_chunked_recv_tokens(self) -> int:
        return self._native.num_max_nvl_chunked_recv_tokens

    @property
    def num_max_rdma_chunked_send_tokens(self) -> int:
        return self._native.num_max_rdma_chunked_send_tokens

    @property
    def num_max_rdma_chunked_recv_tokens(self) -> int:
        """As rounded up to a multiple of ``num_max_rdma_chunked_send_tokens``."""
        return self._native.num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """V1's bytes of ``num_nvl_bytes`` for rows of ``hidden_bytes``."""
        with _NVL_HINT.call():
            return _native.v1_nvl_size_hint(self._native, hidden_bytes, num_ranks, topk_idx_t.itemsize)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """V1's bytes of ``num_rdma_bytes``; 0 for up to 8 ranks."""
        with _RDMA_HINT.call():
            return _native.v1_rdma_size_hint(self._native, hidden_bytes, num_ranks, topk_idx_t.itemsize)

    def _values(self) -> Tuple[int, ...]:
        return tuple(getattr(self, name) for name in _FIELDS)

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{name}={value}" for name, value in zip(_FIELDS, self._values())) + ")"

    def __reduce__(self) -> Any:
        return Config, self._values()


_NVL_HINT = Method("Config.get_nvl_buffer_size_hint")
_RDMA_HINT = Method("Config.get_rdma_buffer_size_hint")
_LOW_LATENCY_HINT = Method("Buffer.get_low_latency_rdma_size_hint", names=_HINT_NAMES)
_DISPATCH_CONFIG = Method("Buffer.get_dispatch_config")
_COMBINE_CONFIG = Method("Buffer.get_combine_config")


def _config_of(native: Any) -> Config:
    return Config(native.num_sms, native.num_max_nvl_chunked_send_tokens, native.num_max_nvl_chunked_recv_tokens,
                  native.num_max_rdma_chunked_send_tokens, native.num_max_rdma_chunked_recv_tokens)


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    with _DISPATCH_CONFIG.call():
        return _config_of(_native.v1_dispatch_config(num_ranks, num_sms))


def combine_config(num_ranks: int, num_sms: int) -> Config:
    with _COMBINE_CONFIG.call():
        return _config_of(_native.v1_combine_config(num_ranks, num_sms))


def low_latency_size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    with _LOW_LATENCY_HINT.call():
        return _native.v1_low_latency_size_hint(max_tokens, hidden, num_ranks, num_experts)
