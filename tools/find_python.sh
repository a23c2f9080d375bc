#!/usr/bin/env bash
# Part of ./dev: the one virtual environment of Python tests, benchmarks and lint. Uses have, probe, say and offline of ./dev.

# Sets `python` to an interpreter that has what tests/python/requirements.txt names; empty, with the reason in `no_python`,
# when there is none.
python= no_python=
find_python() {
  local wanted venv=build/venv log
  if ! have python3; then no_python="needs python3"; return; fi
  wanted=$({ python3 --version; cat tests/python/requirements.txt; } | sha256sum)
  if [[ $(cat $venv/.requirements 2>/dev/null) == "$wanted" ]]; then python=$PWD/$venv/bin/python; return; fi
  if [[ $offline = 1 ]]; then
    if python3 -c 'import torch, numpy, nanobind, scikit_build_core, pytest, hypothesis' 2>/dev/null && probe python3-dev
    then python=$(command -v python3)
    else no_python="needs torch, numpy, nanobind, scikit-build-core, pytest, hypothesis and Python.h (--offline)"
    fi
    return
  fi
  if ! probe python3-venv || ! probe python3-dev; then no_python="needs python3-venv and python3-dev"; return; fi
  say "python: installing tests/python/requirements.txt into $venv"
  log=$(mktemp)
  # megatron-core is a client that a test runs unmodified; of what it asks for it needs only what is there.
  if python3 -m venv $venv >"$log" 2>&1 &&
    $venv/bin/python -m pip install -q --disable-pip-version-check -r tests/python/requirements.txt >>"$log" 2>&1 &&
    $venv/bin/python -m pip install -q --disable-pip-version-check --no-deps megatron-core==0.16.1 >>"$log" 2>&1; then
    printf '%s' "$wanted" >$venv/.requirements
    python=$PWD/$venv/bin/python
  else
    tail -n 5 "$log" >&2
    no_python="the packages of tests/python/requirements.txt could not be installed"
  fi
  rm -f "$log"
}
