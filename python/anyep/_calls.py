"""What the engine's methods share: log lines, the argument ``stream``, a low-latency operation."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, Callable, Optional, Tuple

from . import _native
from .errors import StateError

Event = _native.Event

logger = logging.getLogger("anyep")
logger.addHandler(logging.NullHandler())  # silent unless the program listens
_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
_log_waits = _native.log_waits


def _forward_log() -> None:
    for level, line in _native.take_log():
        logger.log(_LEVELS[level], line)


def on_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument ``stream``."""

    @functools.wraps(method)
    def call(self: Any, *arguments: Any, stream: Any = None, **named: Any) -> Any:
        if stream is None:
            return method(self, *arguments, **named)
        with self._on(stream):
            return method(self, *arguments, **named)

    signature = inspect.signature(method)
    parameter = inspect.Parameter("stream", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Any")
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), parameter])
    return call


class LowLatency:
    """One low-latency operation: its results, and the hook that completes them.

    Attributes:
        result: Slabs of a dispatch, or the tensor [num_tokens, hidden] of a combine.
        event: ends with the operation; complete when the call waited. With a hook it is what ``receive`` gave, before that
            None.
    """

    __slots__ = ("result", "event", "_engine", "_pending", "_keep", "_stream")

    def __init__(self, engine: Any, result: Any, done: Any, keep: Tuple[Any, ...], hook: bool, wait: bool, stream: int) -> None:
        self.result = result
        self._engine = engine
        self._stream = stream
        if hook:
            self.event: Optional[Event] = None
            self._pending = done
            self._keep = keep
            engine._sends.append(self)
        else:
            self.event = done
            self._pending = None
            self._keep = ()
            if not wait and engine._gpu is None:
                engine._hold(done, keep)

    def receive(self) -> Event:
        """The hook: runs the receive half on this thread, on a GPU on the stream of the send. Once, in the order of the sends
        (StateError otherwise). Results and statistics may be read afterwards."""
        if self._pending is None:
            raise StateError("receive: this operation was already received", op="receive")
        event = self._pending.receive(self._stream)
        self._engine._sends.remove(self)
        self._keep = ()
        self.event = event
        return event
