"""Events: the end of an operation, and what Python needs to overlap with it."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple, Union

from anyep import Event, StateError

from .calls import Method


class EventHandle:
    """The end of an operation. Made by hand it stands for everything before it; on CPU ranks that is done already."""

    __slots__ = ("_event", "_method")

    def __init__(self) -> None:
        self._event: Optional[Event] = None  # complete
        self._method: Optional[Method] = None

    @classmethod
    def _of(cls, event: Event, method: Method) -> "EventHandle":
        handle = cls()
        handle._event = event
        handle._method = method
        return handle

    def current_stream_wait(self) -> None:
        """What follows comes after the operation. On CPU ranks the calling thread waits; raises what went wrong."""
        if self._event is not None and self._method is not None:
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


def events_before(previous_event: Previous) -> Optional[List[Event]]:
    """None without an event, which EventOverlap(None) means too; else what the operation comes after."""
    handle = previous_event.event if isinstance(previous_event, EventOverlap) else previous_event
    if handle is None:
        return None
    if not isinstance(handle, EventHandle):
        raise TypeError(f"previous_event must be an EventOverlap, an EventHandle or None, got {type(handle).__name__}")
    return [] if handle._event is None else [handle._event]
