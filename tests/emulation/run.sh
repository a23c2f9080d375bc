#!/usr/bin/env bash
# The CUDA kernels on emulated GPUs: random operations against the oracles, faults. A line per program; the last one is
# "N passed, N failed".
#   tests/emulation/run.sh <build folder> [--long]
set -uo pipefail
programs=$1/tests/emulation
passed=0 failed=0 limit=540

run() { # what, command...
  local what=$1 out code=0
  shift
  out=$(timeout -k 5 "$limit" "$@" 2>&1) || code=$?
  if [[ $code = 0 ]]; then
    echo "ok: $what"
    passed=$((passed + 1))
  else
    echo "FAILED ($code): $what: $*"
    tail -n 30 <<<"$out"
    failed=$((failed + 1))
  fi
}

high_throughput() { # cases: a GPU has room for the launches of two ranks
  local cases=$1
  export ANYEP_EMULATED_SMS=32
  run "high throughput, 1 and 2 ranks, faults" \
    "$programs/emulated_high_throughput" --ranks 1 --ranks 2 --cases "$cases" --faults --limit 500
  run "high throughput, 4 ranks" "$programs/emulated_high_throughput" --ranks 4 --cases $((cases / 3)) --limit 500
  run "high throughput without bulk copies" "$programs/emulated_portable" --ranks 2 --cases "$cases" --faults --limit 500
  unset ANYEP_EMULATED_SMS
}

if [[ ${2:-} = --long ]]; then
  limit=2400
  high_throughput 60
  # All phases take some five minutes with two ranks, twelve with four; what is left is for random pairs.
  for ranks in 1 2 3 4; do run "low latency, $ranks ranks" "$programs/emulated_low_latency" "$ranks" $((400 * ranks)); done
else
  high_throughput 12
  run "low latency, 2 ranks" "$programs/emulated_low_latency" 2 480 --few
fi
echo "$passed passed, $failed failed"
[[ $failed = 0 ]]
