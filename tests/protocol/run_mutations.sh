#!/bin/sh
# Plants mistakes in a copy of the protocol headers, one at a time; the scenarios of tests/protocol must catch each of them.
# One line per mistake; last line `N passed, N failed`; exit status 0 if none failed.
#
#   tests/protocol/run_mutations.sh [NAME...]      about a minute on 2 cores      Needs: python3, and CXX or c++ with libtsan.
exec python3 "$(dirname "$0")/mutations/mutations.py" "$@"
