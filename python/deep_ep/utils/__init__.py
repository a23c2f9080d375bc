"""Events, and helpers that scripts written for DeepEP import."""

from __future__ import annotations

import logging
from typing import Any

from ..events import EventHandle, EventOverlap
from . import envs, math, testing

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections", "envs", "math", "testing"]


def check_nvlink_connections(group: Any) -> None:
    """Upstream refuses GPUs that are not joined by NVLink. AnyEP works without, so this only logs what it finds."""
    logging.getLogger("anyep").info("check_nvlink_connections: ranks on the CPU need no NVLink")
