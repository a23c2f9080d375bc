"""Tests on GPUs: skipped where torch sees none, where this build has no CUDA backend, and under ANYEP_BACKEND=cpu."""

from __future__ import annotations

import os

import pytest


def why_not() -> str:
    torch = pytest.importorskip("torch")
    if os.environ.get("ANYEP_BACKEND") == "cpu":
        return "ANYEP_BACKEND=cpu"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return ""


def pytest_collection_modifyitems(items) -> None:
    here = os.path.dirname(__file__)
    mine = [item for item in items if str(item.path).startswith(here)]
    reason = why_not() if mine else ""
    if reason:
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", params=[int(n) for n in os.environ.get("ANYEP_TEST_RANKS", "2").split(",")])
def team(request):
    from team import Team

    ranks = Team(request.param)
    yield ranks
    ranks.stop()
