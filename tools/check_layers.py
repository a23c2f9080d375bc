#!/usr/bin/env python3
"""Checks what the architecture promises and a compiler does not see: layers, words that belong in one place, sizes.

    tools/check_layers.py              checks the tracked files; prints one line per finding; exit status 1 if any
    tools/check_layers.py --self-test  plants one violation per rule and looks whether it is found
"""
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Who may include whose headers. Only the registry names backends.
SEES = {
    "include": {"include"},
    "core": {"include", "core"},
    "protocol": {"include", "core", "protocol"},
    "bootstrap": {"include", "core", "bootstrap"},
    "workload": {"include", "core", "workload"},
    "reference": {"include", "core", "reference"},
    "backend": {"include", "core", "protocol", "bootstrap", "backend"},
    "simd": {"include", "core", "simd"},  # src/cpu/simd: hot loops that know nothing of ranks
    "device": {"device"},  # of src/cuda/device, names for instructions
    "host": {"include", "core", "protocol", "bootstrap", "backend", "host"},
    "cpu": {"include", "core", "protocol", "bootstrap", "backend", "host", "simd", "cpu"},
    "cuda": {"include", "core", "protocol", "bootstrap", "backend", "host", "device", "cuda"},
    "transport": {"include", "core", "protocol", "transport"},
    "cli": {"include", "core", "reference", "simd", "bench", "cli"},
    "bench": {"include", "core", "reference", "simd", "device", "bench"},
    "examples": {"include"},
}
DEVICE = re.compile(r"^(?:src/)?cuda/device/(ptx|bulk|mbarrier)\.cuh$")
REGISTRY = re.compile(r"^src/backend/registry\.(cc|h)$")
SRC_FOLDERS = {"core", "protocol", "bootstrap", "workload", "reference", "backend", "host", "cpu", "cuda", "transport"}

CODE = {".h", ".cc", ".cu", ".cuh"}
MAX_LINES, MAX_PUBLIC_LINES = 500, 200

# Each: name, which files, what must not stand there, files that may.
WORDS = [
    ("the environment is read in src/core/env only", r"^(src|cli|include|bench)/", r"\b(secure_)?getenv\s*\(|\benviron\b",
     r"^src/core/env[^/]*$"),
    ("asm stands in platform.h and ptx.cuh only", r"^(src|cli|include|bench)/", r"\basm\b|\b__asm__\b",
     r"/(platform\.h|ptx\.cuh)$"),
    ("words that others write are touched in src/protocol only", r"^(src|cli|include)/",
     r"\batomic_ref\b|\bSYS_futex\b|\bfutex\s*\(|\b(while|for)\s*\(.*\.load\s*\(",
     # The board is where ranks meet before there are windows; bootstrap lies beside protocol, not above it.
     r"^src/(protocol/|bootstrap/board\.cc$)"),
    ("the library never prints, exits or aborts", r"^(src|include)/",
     r"std::(cout|cerr|clog|exit|abort|terminate|quick_exit)\b|(?<![\w:])(printf|puts|exit|abort)\s*\(|fmt::print\b", r"^$"),
    ("the library uses fmt and the standard, C and POSIX libraries only", r"^(src|include)/",
     r"#\s*include\s*<(nlohmann|CLI|gtest|gmock|benchmark|boost|absl)/", r"^$"),
    ("public headers need no CUDA and no Torch", r"^include/", r"#\s*include\s*[<\"].*(cuda|torch|nccl|ATen|c10)", r"^$"),
    ("no boolean positional arguments in public functions", r"^include/", r"[(,]\s*(const\s+)?bool\b(?!\))", r"^$"),
]
WORDS = [(name, re.compile(where), re.compile(what), re.compile(allowed)) for name, where, what, allowed in WORDS]
# Spelled in pieces, so that this file passes its own check.
OPEN_ENDS = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|root|farm|home/[a-z]+)/")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
COMMENT = re.compile(r"//.*|/\*.*?\*/|\"(?:[^\"\\]|\\.)*\"")


def layer_of(path):
    parts = path.split("/")
    if path.startswith("src/cpu/simd/"):
        return "simd"
    if DEVICE.match(path):
        return "device"
    if parts[0] == "src":
        return parts[1] if len(parts) > 2 else None
    return parts[0]


def layer_of_include(name):
    if name.startswith("anyep/"):
        return "include"
    if name.startswith("cpu/simd/"):
        return "simd"
    if DEVICE.match(name):
        return "device"
    first = name.split("/")[0]
    return first if first in SRC_FOLDERS or first in ("cli", "bench") else None


def check_includes(path, lines, found):
    layer = layer_of(path)
    if layer not in SEES or REGISTRY.match(path):
        return
    for number, line in enumerate(lines, 1):
        match = INCLUDE.match(line)
        ours = match and (match.group(1) == '"' or match.group(2).startswith("anyep/"))
        target = layer_of_include(match.group(2)) if ours else None
        if target and target not in SEES[layer]:
            found.append(f"{path}:{number}: {layer} must not include {match.group(2)}")


def check_words(path, lines, found):
    for name, where, what, allowed in WORDS:
        if not where.match(path) or allowed.search(path):
            continue
        for number, line in enumerate(lines, 1):
            text = line if "include" in what.pattern else COMMENT.sub("", line)
            if what.search(text):
                found.append(f"{path}:{number}: {name}: {line.strip()[:80]}")


def check_size(path, lines, found):
    limit = MAX_PUBLIC_LINES if path.startswith("include/") else MAX_LINES
    if len(lines) > limit:
        found.append(f"{path}: {len(lines)} lines, at most {limit}")


def check(root, paths):
    found = []
    for path in paths:
        file = root / path
        if not file.is_file():
            continue
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        is_code = file.suffix in CODE
        if is_code:
            check_includes(path, lines, found)
            check_words(path, lines, found)
            if file.suffix in (".h", ".cuh") and not any(line.strip() == "#pragma once" for line in lines):
                found.append(f"{path}: no #pragma once")
        if is_code or file.suffix in (".py", ".sh", ".cmake", "") and not path.startswith("LICENSE"):
            check_size(path, lines, found)
        if path == ".gitignore":
            continue
        for number, line in enumerate(lines, 1):
            if OPEN_ENDS.search(line) and not path.startswith("bench/results/"):
                found.append(f"{path}:{number}: an open end: {line.strip()[:80]}")
            if MACHINE_PATH.search(line):
                found.append(f"{path}:{number}: a path of one machine: {line.strip()[:80]}")
    return found


def self_test():
    planted = {
        "src/core/a.h": '#pragma once\n#include "protocol/wait.h"\n',
        "src/backend/b.cc": '#include "cpu/ranks.h"\n',
        "src/cpu/c.cc": 'const char* x = getenv("HOME");\n',
        "src/cpu/d.cc": 'void pause() { asm volatile("pause"); }\n',
        "src/cpu/e.cc": "void f() { while (word.load() == 0) {} }\n",
        "src/cpu/f.cc": "void f() { std::atomic_ref<int> r(x); }\n",
        "src/cpu/g.cc": 'void f() { printf("x"); }\n',
        "src/cpu/h.cc": "#include <nlohmann/json.hpp>\n",
        "include/anyep/i.h": "#pragma once\n#include <cuda_runtime.h>\n",
        "include/anyep/j.h": "#pragma once\nvoid f(int a, bool wait);\n",
        "include/anyep/k.h": "#pragma once\n" + "\n" * MAX_PUBLIC_LINES,
        "src/cpu/l.cc": "\n" * (MAX_LINES + 1),
        "src/cpu/m.h": "struct M {};\n",
        "docs/n.md": "TO" "DO: write\n",
        "docs/o.md": "see /ro" "ot/x\n",
        "src/cpu/simd/r.cc": '#include "host/group.h"\n',
        "src/cuda/device/bulk.cuh": '#pragma once\n#include "cuda/kernels/team.h"\n',
        "examples/p.cc": '#include "core/layout.h"\n',
    }
    clean = {
        "src/protocol/wait.h": "#pragma once\nvoid f() { while (word.load() == 0) {} }\n",
        "src/core/env.cc": 'const char* x = getenv("HOME");\n',
        "src/backend/registry.cc": '#include "cpu/ranks.h"\n',
        "src/cpu/q.cc": '#include "protocol/wait.h"\n// printf( in a comment\nint n = snprintf(b, 1, "x");\nvoid g() { _exit(1); }\n',
    }
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for path, text in {**planted, **clean}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        blind = [path for path in planted if len(check(root, [path])) != 1]
        false = [line for line in check(root, clean)]
    for path in blind:
        print(f"self-test: {path}: expected exactly one finding")
    for line in false:
        print(f"self-test: false alarm: {line}")
    return bool(blind or false)


def main():
    if sys.argv[1:] == ["--self-test"]:
        sys.exit(self_test())
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = listed.stdout.splitlines()
    else:
        paths = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and "build" not in p.parts[:-1]]
    found = check(ROOT, paths)
    print("\n".join(found) if found else f"layers: {len(paths)} files, nothing found")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
