#!/usr/bin/env bash
# Compiles headers for the GPU, all in one unit: the protocol, the same text that CPU ranks and ThreadSanitizer run, and what
# kernels include. The kernels themselves are compiled by the build.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for header in "$root"/src/protocol/*.h "$root"/src/core/layout.h "$root"/src/cuda/*.h "$root"/src/cuda/device/*.cuh \
  "$root"/src/cuda/kernels/*.h; do
  case $header in */src/cuda/rank.h | */src/cuda/backend.h | */src/cuda/handle.h) continue ;; esac  # host code
  [ -e "$header" ] && echo "#include \"${header#"$root"/src/}\"" >>"$work/all.cu"
done
for unit in "$work/all.cu" "$root"/tests/protocol/*.cu; do
  [ -e "$unit" ] || continue
  # CMake 3.25 does not hand -std=c++20 to this compiler by itself, hence the direct call.
  nvcc -std=c++20 -arch=sm_90 -Werror all-warnings -I"$root/include" -I"$root/src" -c "$unit" -o "$work/out.o"
  echo "compiled for sm_90: $(basename "$unit")"
done
