"""Events: the end of an operation, and what Python needs to overlap with it."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple, Union

import torch
from anyep import Event, StateError

from .calls import Method


class EventHandle:
    """The end of an operation. Made by hand it stands for everything before it on the current CUDA stream; on CPU ranks that is
    done already."""

    __slots__ = ("_event", "_method", "_device", "_recorded", "_keep")

    def __init__(self) -> None:
        self._event: Optional[Event] = None
        self._method: Optional[Method] = None
        self._device = -1
        self._keep: Tuple[Any, ...] = ()
        self._recorded: Optional[torch.cuda.Event] = None  # None and no event of an operation: complete
        if torch.cuda.is_initialized():  # else there has been no work on any stream
            self._recorded = torch.cuda.Event()
            self._recorded.record()

    @classmethod
    def _of(cls, event: Event, method: Method, device: int = -1, keep: Tuple[Any, ...] = ()) -> "EventHandle":
        """Of an operation; ``keep`` lives as long as the event."""
        handle = cls.__new__(cls)
        handle._event, handle._method, handle._device, handle._keep = event, method, device, keep
        handle._recorded = None
        return handle

    def _hold_back(self, stream: torch.cuda.Stream) -> None:
        """What follows on the stream comes after the event."""
        if self._recorded is not None:
            stream.wait_event(self._recorded)
        elif self._event is not None:
            self._event.wait(stream.cuda_stream)

    def current_stream_wait(self) -> None:
        """What follows comes after the operation: on the current stream, on CPU ranks on the calling thread, which waits and
        raises what went wrong."""
        if self._recorded is not None:
            self._recorded.wait()
        elif self._event is not None and self._method is not None:
            if self._device >= 0:
                self._event.wait(torch.cuda.current_stream().cuda_stream)
            else:
                with self._method.call():
                    self._event.wait()


class EventOverlap:
    """An event, tensors that live as long as it, and a hook.

    Args:
        event: None after synchronous calls: waiting does nothing then.
        extra_tensors: kept alive, never looked at.
    """

    def __init__(self, event: Optional[EventHandle] = None, extra_tensors: Optional[Tuple[Any, ...]] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Optional[Callable[[], Any]] = None
        self._release_handle = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Waits, then runs the registered hook once. ``release_handle`` drops ``event`` afterwards."""
        if self.event is None:
            return
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, fn: Callable[[], Any]) -> None:
        """``fn()`` runs after the next wait. StateError: one is registered already."""
        if self.hook_after_wait is not None:
            raise StateError("EventOverlap.register_hook_after_wait: a hook is registered already, allowed: one. "
                             "Wait for the event first.", op="register_hook_after_wait")
        self.hook_after_wait = fn

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        """``with event(release_handle=True): ...`` drops the event at the end of the block."""
        self._release_handle = release_handle
        return self

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        release, self._release_handle = self._release_handle, False
        self.current_stream_wait(release)


Previous = Union[None, EventHandle, EventOverlap]


def handle_before(previous_event: Previous) -> Optional[EventHandle]:
    """None without an event, which EventOverlap(None) means too."""
    handle = previous_event.event if isinstance(previous_event, EventOverlap) else previous_event
    if handle is not None and not isinstance(handle, EventHandle):
        raise TypeError(f"previous_event must be an EventOverlap, an EventHandle or None, got {type(handle).__name__}")
    return handle


def events_before(previous_event: Previous) -> Optional[List[Event]]:
    """The same for CPU ranks: what the operation comes after."""
    handle = handle_before(previous_event)
    if handle is None:
        return None
    if handle._recorded is not None:
        handle._recorded.synchronize()
    return [] if handle._event is None else [handle._event]
