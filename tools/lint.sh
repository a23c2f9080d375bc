#!/usr/bin/env bash
# Part of ./dev: lint and format. Uses need, have, say and find_python of ./dev.

our_sources() { git ls-files '*.h' '*.cc' '*.cu' '*.cuh'; }

run_lint() {
  need lint python3 -- clang-format-14
  local bad=0 unformatted
  if have clang-format-14; then
    unformatted=$(our_sources | xargs -r clang-format-14 --dry-run 2>&1 | sed -n 's/^\([^:]*\):[0-9]*:[0-9]*: warning: .*/\1/p' | sort -u)
    if [[ -n $unformatted ]]; then
      say "not in house format (./dev format mends it):"
      sed 's/^/  /' <<<"$unformatted"
      bad=1
    fi
  else
    say "format not checked: clang-format-14 is not here"
  fi
  find_python
  if [[ -n $python ]] && "$python" -c 'import ruff' 2>/dev/null; then
    "$python" -m ruff check -q python tests/python examples tools bench || bad=1
  else
    say "Python not checked: ${no_python:-ruff is not here}"
  fi
  python3 tools/check_layers.py --self-test || bad=1
  python3 tools/check_layers.py || bad=1
  [[ $bad = 0 ]] && say "lint: clean"
  return $bad
}

run_format() {
  need format clang-format-14
  our_sources | xargs -r clang-format-14 -i
}
