#!/usr/bin/env bash
# Installs a build folder to a temporary prefix and uses the result as strangers do: find_package, pkg-config, the README's
# C++ snippet, the examples, the installed tool. Prints one line per check, then "N passed, N failed".
#
#   tools/test_package.sh BUILD_FOLDER
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
built=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
cxx=${CXX:-c++}
passed=0 failed=0 skipped=0

check() { # title, command...
  local title=$1
  shift
  if "$@" >"$work/log" 2>&1; then
    passed=$((passed + 1)); echo "ok      $title"
  else
    failed=$((failed + 1)); echo "FAILED  $title"; tail -n 30 "$work/log" | sed 's/^/        /'
  fi
}
finish() {
  echo "$passed passed, $failed failed, $skipped skipped"
  [ "$failed" = 0 ]
  exit
}

check "installs" cmake --install "$built" --prefix "$prefix"
library=$(find "$prefix" -name 'libanyep.*' | head -n 1)
[ -n "$library" ] || finish
libdir=$(dirname "$library")
export LD_LIBRARY_PATH=$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

# Moved, so that nothing can depend on where it was installed first.
mv "$prefix" "$work/moved"
prefix=$work/moved libdir=${libdir/$work\/prefix/$work/moved}
LD_LIBRARY_PATH=${LD_LIBRARY_PATH/$work\/prefix/$work/moved}

# The first C++ block of the README, and every example.
awk '/^```cpp/ { inside = 1; next } /^```/ { if (inside) exit } inside' "$root/README.md" >"$work/readme_snippet.cc"
check "README has a C++ snippet" grep -q 'int main' "$work/readme_snippet.cc"

find_package_consumer() {
  cmake -S "$root/tests/package" -B "$work/consumer" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release \
    -DCONSUMER_SOURCE="$work/readme_snippet.cc" && cmake --build "$work/consumer"
}
check "find_package(AnyEP): the snippet builds" find_package_consumer
check "find_package(AnyEP): the snippet runs" timeout 120 "$work/consumer/consumer"

by_pkg_config() { # source, output
  # shellcheck disable=SC2046
  "$cxx" -std=c++20 -O1 -Wall -Wextra -Wpedantic -Werror "$1" -o "$2" \
    $(PKG_CONFIG_PATH="$libdir/pkgconfig" pkg-config --cflags --libs anyep)
}
if command -v pkg-config >/dev/null; then
  for source in "$root"/examples/*.cc; do
    [ -e "$source" ] || continue
    name=$(basename "$source" .cc)
    check "pkg-config: examples/$name builds" by_pkg_config "$source" "$work/$name"
    check "pkg-config: examples/$name runs" timeout 120 "$work/$name"
  done
else
  echo "skipped pkg-config: not here"; skipped=$((skipped + 1))
fi

# Only the public names may be visible: no internal folder's, and no bundled library's.
hidden_names() {
  ! nm -D --defined-only -C "$library" | sed 's/^[0-9a-f]* [A-Za-z] //; s/^\(vtable\|typeinfo\|typeinfo name\|VTT\) for //' |
    grep -E '^(fmt::|anyep::(core|protocol|backend|cpu|bootstrap|reference)::)'
}
library=$(find "$prefix" -name 'libanyep.so' | head -n 1)
if [ -n "$library" ] && command -v nm >/dev/null; then check "internal names are hidden" hidden_names; fi

if [ -x "$prefix/bin/anyep" ]; then check "the installed tool starts" "$prefix/bin/anyep" info; fi
finish
