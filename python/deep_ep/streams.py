"""On which stream an operation of a Buffer on a GPU runs, and who waits for whom (specification 5.3).

S = the stream that is current at the call, Q = the Buffer's communication stream. What is synchronous and comes after nothing in
particular runs on S itself: in the order that can be observed that is the same as Q between two waits, and cheaper. Everything
else runs on Q, with Q as torch's current stream: so its outputs are allocated there, where nothing of S can still use their
memory, and S is noted as a user of them.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch

from .calls import Method
from .events import EventHandle, EventOverlap


class Place:
    """One operation's: ``with place: ...`` around its launches and allocations; then ``finish``."""

    __slots__ = ("number", "_runtime", "_caller", "_queue", "_context", "_async", "_given_away")

    def __init__(self, runtime: Any, before: Optional[EventHandle], async_finish: bool, on_comm_stream: bool) -> None:
        self._async = async_finish
        self._context: Any = None
        self._runtime = runtime
        if before is None and not async_finish:
            self.number: int = runtime.gpu.stream()
            return
        caller = torch.cuda.current_stream(runtime.gpu.device)
        queue = runtime.get_comm_stream()
        if before is not None:
            before._hold_back(queue)
        elif caller != queue:
            queue.wait_stream(caller)
        self.number = queue.cuda_stream
        self._caller, self._queue = caller, queue
        self._given_away = on_comm_stream
        self._context = torch.cuda.stream(queue)

    def __enter__(self) -> "Place":
        if self._context is not None:
            self._context.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, traceback)

    def mark(self) -> Optional[torch.cuda.Event]:
        """The end of what torch has put there so far, where ``finish`` has to know it."""
        if self._context is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def finish(self, method: Method, event: Any, inputs: Tuple[Any, ...], outputs: Tuple[Any, ...]) -> EventOverlap:
        """``event``: of the operation, an anyep.Event or a torch.cuda.Event."""
        if self._context is None:
            return EventOverlap(None)
        caller, queue = self._caller, self._queue
        apart = caller != queue
        if apart and not self._given_away:
            for tensor in outputs:
                if tensor is not None:
                    tensor.record_stream(caller)
        if not self._async:
            if apart:
                event.wait(caller if isinstance(event, torch.cuda.Event) else caller.cuda_stream)
            return EventOverlap(None)
        keep: Tuple[Any, ...] = ()
        if torch.cuda.is_current_stream_capturing():
            keep = inputs + outputs
        elif apart:
            for tensor in inputs:
                if tensor is not None:
                    tensor.record_stream(queue)
        if isinstance(event, torch.cuda.Event):
            handle = EventHandle._of(None, method, self._runtime.gpu.device, keep)
            handle._recorded = event
            return EventOverlap(handle)
        return EventOverlap(EventHandle._of(event, method, self._runtime.gpu.device, keep))
