"""Names that some callers take from upstream's extension module."""

from deep_ep.buffer import Buffer
from deep_ep.config import Config, topk_idx_t
from deep_ep.events import EventHandle

is_sm90_compiled = Buffer.is_sm90_compiled
get_low_latency_rdma_size_hint = Buffer.get_low_latency_rdma_size_hint

__all__ = ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"]
