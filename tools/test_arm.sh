#!/usr/bin/env bash
# Cross-compiles the library's objects and the oracle for 64-bit Arm. Nothing is linked or run.
#
#   tools/test_arm.sh JOBS
set -euo pipefail
cd "$(dirname "$0")/.."
fmt_folder=$(sed -n 's/^fmt_DIR:PATH=//p' build/test/CMakeCache.txt)  # headers only, the same for every processor
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
cmake -S . -B build/arm "${generator[@]}" "${launcher[@]}" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -Dfmt_DIR="$fmt_folder" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0 \
  -DANYEP_BUILD_TESTS=OFF -DANYEP_BUILD_CLI=OFF -DANYEP_CUDA=OFF -DANYEP_WERROR=ON
cmake --build build/arm -j "${1:-2}" --target anyep_objects anyep_reference
