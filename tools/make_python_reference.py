"""Writes docs/python/reference.md from the docstrings of the installed packages; a test compares it with what is committed.

    PYTHONPATH=build/test/python build/venv/bin/python tools/make_python_reference.py > docs/python/reference.md
"""

from __future__ import annotations

import inspect
import re
from typing import Any, Iterator, List

import anyep
import anyep.plot
import anyep.torch
import anyep.workload

PARTS = [
    (anyep, "anyep", ["Engine", "Handle", "LowLatency", "Rows", "Dispatched", "Combined", "Slabs", "Typed", "Event", "Tuning",
                      "Bootstrap", "LocalGroup", "from_callback", "from_mpi", "from_torch", "as_bootstrap", "run_threads",
                      "run_processes", "plan", "low_latency_bytes", "Error", "ArgumentError", "UnsupportedError",
                      "CapacityError", "MismatchError", "StateError", "PeerTimeoutError", "PeerDeadError", "DeviceError",
                      "ResourceError"]),
    (anyep.torch, "anyep.torch", anyep.torch.__all__),
    (anyep.workload, "anyep.workload", ["generate", "profiles", "Batch", "Statistics", "write_trace", "read_trace", "models",
                                        "find_model", "ModelPreset", "TextWorkload"]),
    (anyep.plot, "anyep.plot", ["read_records", "latency", "bandwidth", "load"]),
]


def signature_of(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):  # the extension's own
        return "(...)"
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are strings; defaults keep their quotes


def paragraphs(doc: str) -> str:
    """A docstring as it stands, its sections' bodies as a block so that their indentation survives."""
    return "```text\n" + inspect.cleandoc(doc) + "\n```\n"


def members_of(kind: type) -> Iterator[str]:
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(member, property):
            if member.__doc__:
                yield f"`{name}`: {inspect.cleandoc(member.__doc__)}\n"
        elif inspect.isfunction(function) or "nanobind" in type(member).__module__ or "nb_" in type(member).__name__:
            doc = inspect.getdoc(function) or ""
            shown = signature_of(function)
            shown = re.sub(r"^\((self|cls)(, )?", "(", shown)
            yield f"`{name}{shown}`\n\n" + (paragraphs(doc) if doc else "")


def page() -> str:
    lines: List[str] = [
        "# Python reference\n",
        "Written by `tools/make_python_reference.py` from the docstrings; edit those. `deep_ep` has a page of its own: "
        "[coming from DeepEP](coming_from_deep_ep.md).\n"]
    for module, name, names in PARTS:
        lines.append(f"## {name}\n")
        lines.append(inspect.cleandoc(module.__doc__ or "") + "\n")
        for thing_name in names:
            thing = getattr(module, thing_name)
            is_class = inspect.isclass(thing)
            shown = "" if is_class and (issubclass(thing, (Exception, tuple)) or "nanobind" in type(thing).__module__) else (
                signature_of(thing))
            lines.append(f"### `{thing_name}{shown}`\n")
            doc = inspect.getdoc(thing)
            if doc:
                lines.append(paragraphs(doc))
            if is_class and not issubclass(thing, Exception):
                if issubclass(thing, tuple):
                    fields = ", ".join(f"`{field}`" for field in thing._fields)
                    lines.append(f"Fields: {fields}\n")
                else:
                    lines.extend(members_of(thing))
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
