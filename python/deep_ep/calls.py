"""The frame of every call into the C++ library: errors in V1's words, peers told of a refusal, log lines passed on."""

from __future__ import annotations

import re
from typing import Any, Dict, Optional, Type

from anyep import ArgumentError, Error, StateError
from anyep import _native
from anyep.engine import _forward_log

_OPS: Dict[str, int] = _native.OPS
_log_waits = _native.log_waits


class Method:
    """One method of the package.

    Args:
        name: what its messages begin with, "Buffer.dispatch".
        op: the C++ operation if it is collective: peers are told when Python finds an argument wrong.
        names: what the C++ library calls the method's arguments, and what V1 calls them.
    """

    __slots__ = ("name", "op", "_names", "_pattern")

    def __init__(self, name: str, op: Optional[str] = None, names: Optional[Dict[str, str]] = None) -> None:
        self.name = name
        self.op = None if op is None else _OPS[op]
        self._names = names or {}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)") if names else None

    def call(self, engine: Any = None) -> "_Call":
        """``with method.call(engine): ...`` around everything that may fail."""
        return _Call(self, engine)

    def refuse(self, argument: str, got: object, allowed: str, remedy: str = "") -> ArgumentError:
        text = f"{self.name}: {argument} = {got}, allowed: {allowed}" + (f". {remedy}" if remedy else "")
        return ArgumentError(text, op=self.name, argument=argument, got=str(got), allowed=allowed)

    def not_now(self, why: str) -> StateError:
        return StateError(f"{self.name}: {why}", op=self.name)

    def _renamed(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(lambda match: self._names[match[0]], text)

    def reword(self, error: Error) -> None:
        """In place: the same exception, the same fields, V1's names."""
        if error.op == self.name or not error.args:
            return
        text = str(error)
        prefix = f"{error.op}: "
        error.args = (f"{self.name}: {self._renamed(text[len(prefix):] if text.startswith(prefix) else text)}",)
        error.argument = self._renamed(error.argument)
        error.allowed = self._renamed(error.allowed)


class _Call:
    __slots__ = ("_method", "_engine")

    def __init__(self, method: Method, engine: Any) -> None:
        self._method = method
        self._engine = engine

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Any) -> None:
        if _log_waits():
            _forward_log()
        if kind is None:
            return
        # Where an engine refused the call itself, it told the peers, and the error names the rank.
        found_here = isinstance(error, Exception) and (not isinstance(error, Error) or
                                                       (isinstance(error, ArgumentError) and error.rank < 0))
        if found_here and self._engine is not None and self._method.op is not None:
            try:
                self._engine._native.refuse(self._method.op, str(error))
            except Error:  # the engine has failed, or another thread is inside: the first error is what matters
                pass
        if isinstance(error, Error):
            self._method.reword(error)
