#!/bin/sh
# Runs every protocol model, the region search, every PTX litmus test and every mutant of the litmus checker, and compares
# each verdict with the expected one. A model that must fail and passes is as bad as the reverse: it has gone blind.
#
#   models/run.sh          under a minute on 2 cores      Needs: spin, gcc, python3.
#   models/run.sh --full   plus the long models           (3 minutes more and 4.5 GiB of memory)
#
# One line per verdict; last line `N passed, N failed`; exit status 0 if none failed, 2 if a tool is missing.
set -u
here=$(cd "$(dirname "$0")" && pwd)
for tool in spin gcc python3; do
  command -v "$tool" >/dev/null || { echo "missing: $tool (apt-get install spin gcc python3)"; exit 2; }
done
exec python3 "$here/run.py" "$@"
