"""Runs pytest over this folder; the last line is "N passed, N failed, N skipped", as ./dev reads it.

Without arguments: all tests on CPU ranks, then, where there is a GPU, those of gpu/ in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
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


def run_gpu_tests(here: Path, count: Count) -> None:
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    environment = {name: value for name, value in os.environ.items() if name != "ANYEP_BACKEND"}
    done = subprocess.run([sys.executable, __file__, str(here / "gpu")], env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    last = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped\s*$", done.stdout)
    passed, failed, skipped = map(int, last.groups()) if last else (0, 1, 0)
    count.passed += passed
    count.failed += failed
    count.skipped += skipped


def main() -> int:
    count = Count()
    here = Path(__file__).parent
    everything = not any(not argument.startswith("-") for argument in sys.argv[1:])
    arguments = [*sys.argv[1:], str(here)] if everything else sys.argv[1:]
    if everything:  # else a Buffer takes the GPU that is current
        os.environ["ANYEP_BACKEND"] = "cpu"
    code = pytest.main(["-q", "--durations=5", "-p", "no:cacheprovider", "--rootdir", str(here), *arguments],
                       plugins=[count])
    if everything:
        run_gpu_tests(here, count)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and count.failed == 0:
        count.failed = 1
    print(f"{count.passed} passed, {count.failed} failed, {count.skipped} skipped")
    return 1 if count.failed else 0


if __name__ == "__main__":
    sys.exit(main())
