#!/usr/bin/env bash
# Builds the wheel as `pip install .` does and tries it in an environment with nothing else: no torch, no numpy, no compiler
# on the path. Last line: "N passed, N failed".
#   test_wheel.sh <python with nanobind and scikit-build-core> <parallel jobs>
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
python=$1
export CMAKE_BUILD_PARALLEL_LEVEL=$2
if command -v ccache >/dev/null; then export CMAKE_CXX_COMPILER_LAUNCHER=ccache; fi  # kernels as the tests' build has them
work=build/wheel
passed=0 failed=0

check() { # title, command...
  local title=$1 log
  shift
  log=$("$@" 2>&1 | tr -d "\000")
  if [[ $? -eq 0 ]]; then passed=$((passed + 1)); echo "ok: $title"
  else failed=$((failed + 1)); printf 'FAILED: %s\n%s\n' "$title" "$(tail -n 15 <<<"$log")"
  fi
}

# The build folder stays, so that a second wheel compiles only what changed.
make_wheel() { # folder, pip arguments...
  local folder=$1
  shift
  rm -rf "$folder"
  "$python" -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w "$folder" -C "build-dir=$PWD/$work/cmake" \
    -C cmake.define.ANYEP_WERROR=ON "$@" .
}

has() { grep -q "$2" <<<"$("$python" -m zipfile -l "$1"/anyep-*.whl)"; }
lacks() { ls "$1"/anyep-*.whl && ! has "$@"; }

check "a wheel is built" make_wheel $work/whole -C cmake.define.ANYEP_DEEP_EP=ON
check "it holds the type stubs" has $work/whole '^anyep/_native\.pyi'
check "it holds deep_ep and its shim" has $work/whole '^deep_ep_cpp/__init__\.py'
check "it holds the command line tool" has $work/whole '^anyep/bin/anyep'
check "it holds no C++ source" lacks $work/whole '\.cc '

rm -rf $work/clean
check "a clean environment" "$python" -m venv $work/clean
clean=$PWD/$work/clean/bin/python
check "the wheel is installed there, from nothing else" \
  "$clean" -m pip install -q --disable-pip-version-check --no-index "$(echo $work/whole/anyep-*.whl)"

cd $work  # not where the sources lie
in_clean() { env -i PATH=/nowhere "$clean" -c "$1"; }
check "neither torch nor numpy is there" in_clean '
import importlib.util as found
assert found.find_spec("torch") is None and found.find_spec("numpy") is None'
check "importing starts and loads nothing" in_clean '
import os, sys, threading
before = dict(os.environ), len(os.listdir("/proc/self/fd"))
import anyep
assert (dict(os.environ), len(os.listdir("/proc/self/fd"))) == before
assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1
assert not {"torch", "numpy", "multiprocessing", "subprocess"} & set(sys.modules)'
check "ranks as threads move buffers without numpy" in_clean '
import array, anyep
def body(bootstrap):
    with anyep.Engine.create(bootstrap, rows_bytes=16 << 20) as engine:
        x = memoryview(array.array("f", [engine.rank + 1.0] * 8)).cast("B").cast("f", [2, 4])
        experts = memoryview(array.array("i", [0, 1])).cast("B").cast("i", [2, 1])
        handle = engine.route(experts, 2)
        rows = memoryview(bytearray(16 * handle.num_rows)).cast("f", [handle.num_rows, 4])
        engine.dispatch(x, handle, out=anyep.Rows(rows))
        answer = memoryview(bytearray(32)).cast("f", [2, 4])
        engine.combine(rows, handle, out=answer)
        return rows.tolist(), answer.tolist()
for rank, (rows, answer) in enumerate(anyep.run_threads(2, body)):
    assert rows == [[1.0] * 4, [2.0] * 4] and answer == [[rank + 1.0] * 4] * 2'
check "without torch, deep_ep says what is missing" in_clean '
try: import deep_ep
except ImportError as error: assert "torch" in str(error), error
else: raise SystemExit("it was imported")'
check "python -m anyep is the tool" env -i PATH=/nowhere "$clean" -m anyep info
check "so is anyep" env -i PATH=/nowhere clean/bin/anyep plan --help
check "an import takes at most 0.3 s (whole process, median of 10)" "$python" -c "
import statistics, subprocess, time
def once():
    start = time.perf_counter()
    subprocess.run(['$clean', '-c', 'import anyep'], check=True)
    return time.perf_counter() - start
once()
median = statistics.median(once() for _ in range(10))
print(f'{median:.3f} s')
assert median <= 0.3, median"
cd ../..

check "a wheel without deep_ep" make_wheel $work/bare -C cmake.define.ANYEP_DEEP_EP=OFF
check "it holds neither deep_ep nor the shim" lacks $work/bare '^deep_ep'
check "and anyep all the same" has $work/bare '^anyep/engine\.py'

# Kills at random times need no fault points: the installed library stands the test.
check "ranks killed at random times, with the wheel" \
  env PYTHONPATH="$(echo "$PWD"/$work/clean/lib/python*/site-packages)" "$python" tests/python/run.py tests/python/test_kill.py -k random

echo "$passed passed, $failed failed"
[[ $failed -eq 0 ]]
