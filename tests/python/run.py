"""Runs pytest over this folder; the last line is "N passed, N failed, N skipped", as ./dev reads it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


class Count:
    """Counts tests, not their phases; what fails outside a test (collection, set-up) is a failure too."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed += 1


def main() -> int:
    count = Count()
    here = Path(__file__).parent
    arguments = sys.argv[1:] or [str(here)]
    code = pytest.main(["-q", "--durations=5", "-p", "no:cacheprovider", "--rootdir", str(here), *arguments],
                       plugins=[count])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and count.failed == 0:
        count.failed = 1
    print(f"{count.passed} passed, {count.failed} failed, {count.skipped} skipped")
    return 1 if count.failed else 0


if __name__ == "__main__":
    sys.exit(main())
