"""The Python benchmarks run, their results are right, and their records have the fields that bench/METRICS.md names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest

pytest.importorskip("torch")
pytest.importorskip("numpy")

BENCH = Path(__file__).resolve().parents[2] / "bench"
COMMON = {"date", "gpu", "count", "driver", "cuda", "commit", "op", "kind", "dtype", "tokens", "hidden", "topk", "experts",
          "ranks", "sms", "us_p50", "us_p99", "wire_gbs", "ceiling_gbs", "ratio", "graph", "routing", "iters", "starts",
          "spread", "wrong", "api", "command"}
TINY = ["--starts", "1", "--hidden", "128", "--experts", "8", "--topk", "2"]


def records_of(script: str, folder: Path, *options: str) -> List[Dict[str, Any]]:
    """Of one run of a script, with what was printed when it fails."""
    done = subprocess.run([sys.executable, str(BENCH / script), *TINY, *options, "--results", str(folder)],
                          capture_output=True, text=True, timeout=300, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_gloo_baseline(tmp_path: Path) -> None:
    records = records_of("baselines/gloo/run.py", tmp_path, "--ranks", "2", "--tokens", "16", "--seconds", "0.1", "--least-iterations", "2")
    assert {(record["op"], record["api"], record["memory"]) for record in records} == {
        ("dispatch", "anyep", "window"), ("dispatch", "anyep", "caller"), ("dispatch", "deep_ep", "window"),
        ("combine", "anyep", "window"), ("combine", "anyep", "caller"), ("combine", "deep_ep", "caller")}
    for record in records:
        assert COMMON | {"memory", "logical_gbs", "wire_rows", "peer", "speedup", "bar", "pass"} <= set(record)
        assert record["wrong"] == 0 and record["iters"] >= 2 and record["us_p50"] > 0
        assert {peer.get("settings") for peer in record["peer"]} == (
            {"float32", "bfloat16"} if record["op"] == "combine" else {None})
        right = [peer for peer in record["peer"] if peer["wrong"] == 0]
        assert record["speedup"] == pytest.approx(min(peer["us_p50"] for peer in right) / record["us_p50"], rel=1e-3)


def test_cost_of_a_python_call(tmp_path: Path) -> None:
    """Without the C++ side, which the test build lacks: figures, no costs."""
    records = records_of("python_cost.py", tmp_path, "--ranks", "1", "--tokens", "4", "--calls", "20", "--library", "none")
    imported = [record for record in records if record["op"] == "import"]
    assert len(imported) == 1 and imported[0]["bar"] == {"us_p50": 300000} and imported[0]["bare_us_p50"] > 0
    calls = [record for record in records if record["op"] != "import"]
    assert {(record["kind"], record["op"], record["api"]) for record in calls} == {
        *(("ht", op, api) for op in ("route", "dispatch_cached", "dispatch", "combine") for api in ("native", "anyep")),
        *(("ll", op, api) for op in ("dispatch", "combine") for api in ("native", "anyep", "deep_ep")),
        ("ht", "dispatch", "deep_ep"), ("ht", "combine", "deep_ep")}
    for record in calls:
        assert COMMON <= set(record) and record["wrong"] == 0 and record["iters"] == 20 and "cost_us" not in record


def test_costs_are_differences_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import python_cost

    about = {"op": "combine", "kind": "ht", "tokens": 16, "hidden": 7168, "topk": 8, "experts": 256, "ranks": 2,
             "routing": "uniform:1", "cpu": "some", "cores": 2, "kernel": "some", "wrong": 0}
    figures = {}
    for who, starts in (("c++", ([10, 11, 99], [20, 20, 20])), ("anyep", ([12, 14, 13], [39, 40, 41]))):
        figure = python_cost.Figure(about)
        for us in starts:
            figure.add({**about, "us": us})
        figures[2, "ht", "combine", who] = figure
    record = python_cost.record_of(figures, (2, "ht", "combine", "anyep"), "commit", "command")
    assert record["cost_us"] == 11  # of 13 - 11 and 40 - 20
    assert record["cost_spread_us"] == 18
    assert record["bar"] == {"cost_us": 15} and record["pass"] is True


def test_checks_of_rows_and_sums_see_one_wrong_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import torch
    from rows import Workload

    work = Workload(1, 2, 40, hidden=128, num_experts=8, top_k=2)
    x = work._row(0, work.source, work.token)
    ids, weights = work._experts[work.source, work.token], work._weights[work.source, work.token]
    here = ids >= 4
    experts, weights = torch.where(here, ids - 4, -1), torch.where(here, weights, 0)
    assert work.wrong_rows(x, experts, weights) == 0
    sums = torch.zeros((40, 128))
    for reader in range(2):
        rows = work._row(1 + reader, 1, torch.arange(40)).float()
        sums += rows * work.reads[1, :, reader].unsqueeze(1)
    assert work.wrong_sums(sums.to(torch.bfloat16)) == 0

    swapped = torch.cat([x[1:2], x[:1], x[2:]])
    assert work.wrong_rows(swapped, experts, weights) > 100
    experts[3, 1] += 1
    weights[5, 0] += 1
    assert work.wrong_rows(x, experts, weights) == 2
    sums[7, 9] += 1
    assert work.wrong_sums(sums.to(torch.bfloat16)) == 1
    assert work.wrong_rows(x[1:], experts[1:], weights[1:]) > 0
