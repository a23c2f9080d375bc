"""The exceptions of anyep: one class per code of the C++ library, each with the same fields.

``str(error)`` says what happened, the value, what is allowed and what to do.
"""

from __future__ import annotations

from typing import Any, Dict, List


class Error(RuntimeError):
    """Base of all. Raised itself for what a correct program does not meet (corruption, internal faults, transports).

    Attributes:
        code: "argument", "unsupported", "capacity", "mismatch", "state", "timeout", "peer_dead", "aborted", "device",
            "resource", "transport", "corrupt" or "internal".
        rank: the rank that reports, -1 where there is none.
        peers: ranks that failed, are missing or suspected, ascending.
        op: "create", "route", "dispatch", ... ; phase: "before_send", "mid_send", "in_recv", ...
        generation, sequence: the life of the group and the number of the operation.
        expected, seen: the words of a failed wait; elapsed_s, limit_s: seconds.
        argument, got, allowed: of ArgumentError; need, have: of CapacityError and ResourceError.
    """

    code: str = "internal"
    rank: int = -1
    op: str = ""
    phase: str = ""
    generation: int = 0
    sequence: int = 0
    expected: int = 0
    seen: int = 0
    elapsed_s: float = 0.0
    limit_s: float = 0.0
    argument: str = ""
    got: str = ""
    allowed: str = ""
    need: int = 0
    have: int = 0

    def __init__(self, text: str = "", **fields: Any) -> None:
        super().__init__(text)
        self.peers: List[int] = []
        for name, value in fields.items():
            setattr(self, name, value)

    def __reduce__(self):  # so that multiprocessing can carry it to a parent
        return _restore, (type(self), str(self), dict(self.__dict__))


class ArgumentError(Error, ValueError):
    """A value, shape, element type, stride or handle is wrong: fix the call."""

    code = "argument"


class UnsupportedError(Error):
    """A valid request that this build, group or machine cannot serve."""

    code = "unsupported"


class CapacityError(Error):
    """More tokens, rows or bytes than there is room for: need, have."""

    code = "capacity"


class MismatchError(Error):
    """Ranks disagree on budget, version, operation, shape or order: who, in what."""

    code = "mismatch"


class StateError(Error):
    """Not legal now: closed, failed, overlapping, out of order."""

    code = "state"


class PeerTimeoutError(Error, TimeoutError):
    """A peer did not answer within the limit."""

    code = "timeout"


class PeerDeadError(Error):
    """A peer's process is gone (code "peer_dead"), or a peer said that it leaves, and why (code "aborted")."""

    code = "peer_dead"


class DeviceError(Error):
    """CUDA failed in this process."""

    code = "device"


class ResourceError(Error):
    """The operating system refused memory, descriptors or threads: need, have."""

    code = "resource"


_CLASSES = {
    "argument": ArgumentError,
    "unsupported": UnsupportedError,
    "capacity": CapacityError,
    "mismatch": MismatchError,
    "state": StateError,
    "timeout": PeerTimeoutError,
    "peer_dead": PeerDeadError,
    "aborted": PeerDeadError,
    "device": DeviceError,
    "resource": ResourceError,
}


def _restore(cls: type, text: str, fields: Dict[str, Any]) -> Error:
    return cls(text, **fields)


def _from_native(text: str, fields: Dict[str, Any]) -> Error:
    """Called by the extension: kPeerDead -> PeerDeadError with code "peer_dead"."""
    name = fields["code"][1:]
    fields["code"] = "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))
    return _CLASSES.get(fields["code"], Error)(text, **fields)


def argument_error(op: str, argument: str, got: object, allowed: str, remedy: str = "") -> ArgumentError:
    """The message form of the whole package: "<op>: <argument> = <value>, allowed: <rule>. <what to do>"."""
    text = f"{op}: {argument} = {got}, allowed: {allowed}" + (f". {remedy}" if remedy else "")
    return ArgumentError(text, op=op, argument=argument, got=str(got), allowed=allowed)
