"""The frame of every call into the C++ library: errors in V1's words, peers told of a refusal, log lines passed on."""

from __future__ import annotations

import operator
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
        self._names = {"budget.max_experts": "most experts of a Buffer", **(names or {})}
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")

    def call(self, runtime: Any = None) -> "_Call":
        """``with method.call(runtime) as engine: ...`` around everything that may fail."""
        if runtime is None:
            return _Call(self, None)
        calls = runtime.calls
        return calls.get(self) or calls.setdefault(self, _Call(self, runtime))

    def refuse(self, argument: str, got: object, allowed: str, remedy: str = "") -> ArgumentError:
        text = f"{self.name}: {argument} = {got}, allowed: {allowed}" + (f". {remedy}" if remedy else "")
        return ArgumentError(text, op=self.name, argument=argument, got=str(got), allowed=allowed)

    def number(self, argument: str, value: Any) -> int:
        """A number that outputs are sized by before the library sees it."""
        if type(value) is int and -(2**31) <= value < 2**31:
            return value
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
        whole = operator.index(value)
        if not -(2**31) <= whole < 2**31:
            raise self.refuse(argument, whole, "what 32 bits hold")
        return whole

    def not_now(self, why: str) -> StateError:
        return StateError(f"{self.name}: {why}", op=self.name)

    def _renamed(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._names[match[0]], text)

    def reword(self, error: Error) -> None:
        """In place: the same exception, the same fields, V1's names."""
        if error.op == self.name:
            return
        error.args = (f"{self.name}: {self._renamed(_without_op(str(error)))}",)
        error.argument = self._renamed(error.argument)
        error.allowed = self._renamed(error.allowed)

    def reword_type_error(self, error: TypeError) -> None:
        text = self._renamed(_without_op(str(error)))
        if "incompatible function arguments" in text:  # of the extension, which lists C++ types
            text = "an argument that is to be a whole number of at most 64 bits is another"
        error.args = (f"{self.name}: {text}",)


def _without_op(text: str) -> str:
    op, colon, rest = text.partition(": ")
    return rest if colon and op.replace("::", "").isidentifier() else text


class _Call:
    """Has no state of its own: one serves all calls of a method of a Buffer."""

    __slots__ = ("_method", "_runtime")

    def __init__(self, method: Method, runtime: Any) -> None:
        self._method = method
        self._runtime = runtime

    def __enter__(self) -> Any:
        runtime = self._runtime
        if runtime is None:
            return None
        # The engine refuses a second thread too, but a method may be several of its calls, and half of them is harm.
        if not runtime.entered.acquire(False):
            raise self._method.not_now("another thread is inside a call of this Buffer")
        return runtime.engine

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Any) -> None:
        if _log_waits():
            _forward_log()
        try:
            if kind is not None:
                self._failed(error)
        finally:
            if self._runtime is not None:
                self._runtime.entered.release()

    def _failed(self, error: Optional[BaseException]) -> None:
        method = self._method
        engine = None if self._runtime is None else self._runtime.engine
        # Where an engine refused the call itself, it told the peers, and the error names the rank.
        found_here = isinstance(error, Exception) and (not isinstance(error, Error) or
                                                       (isinstance(error, ArgumentError) and error.rank < 0))
        if isinstance(error, Error):
            method.reword(error)
        elif isinstance(error, TypeError):
            method.reword_type_error(error)
        if found_here and engine is not None and method.op is not None:
            try:
                engine._native.refuse(method.op, str(error))
            except Error:  # the engine has failed, or another thread is inside: the first error is what matters
                pass
