"""bench/run_gpu and bench/gpu_table.py, with a program in the benchmark's place that knows what it would measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

PROGRAM = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
common = {{"gpu": "NVIDIA H100 80GB HBM3", "gpus": 2, "cuda_driver": 13000, "version": "0.1.0+abc"}}
shape = {{"tokens": 4096, "hidden": 7168, "topk": 8, "experts": 256, "routing": "uniform:1", "ranks": 2, "sms": 16}}
with open(given["--out"], "a") as out:
    def put(**fields):
        out.write(json.dumps(fields | common) + "\\n")
    for sms, us in ((14, 180.0), (16, 170.0), (20, 100.0)):
        put(who="probe", kind="ht", op="push", dtype="bf16", order="tickets", probe_sms=sms, wrong=0, us=[us] * 3, **shape)
    put(who="probe", kind="ht", op="ceiling", order="push", ranks=2, probe_sms=16, row_bytes=7168, wrong=0, gbs=[340.0])
    put(who="anyep", kind="ht", op="dispatch_cached", dtype="bf16", memory="window", wire_rows=4082, logical_rows=8163,
        row_bytes=14336, wrong={wrong}, us=[{us}, {us} + 1, {us} + 9], host_us=[7.0], idle_us=[], **shape)
"""


def stand_in(folder: Path, program: str, gpu: str, count: int) -> dict[str, str]:
    """A bench program of ours and an nvidia-smi, in a folder; the environment that finds them."""
    gpus = "".join(f"{gpu}, 580.1\\n" for _ in range(count))
    for name, text in (("anyep_bench_gpu", program), ("nvidia-smi", f"#!/bin/sh\nprintf '{gpus}'\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture
def run(tmp_path: Path):
    def go(us: float, wrong: int = 0) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
        environment = stand_in(tmp_path, PROGRAM.format(python=sys.executable, us=us, wrong=wrong), "NVIDIA H100 80GB HBM3", 2)
        command = [sys.executable, str(BENCH / "run_gpu"), str(tmp_path), "--part", "bars", "--results", str(tmp_path / "results")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        (file,) = (tmp_path / "results").glob("*.jsonl")
        return done, [json.loads(line) for line in file.read_text().splitlines()]

    return go


def test_a_figure_is_measured_against_the_fastest_pattern_with_as_many_sms(run):
    done, records = run(173.0)
    (record,) = [one for one in records if one["op"] == "dispatch_cached"]
    assert done.returncode == 0, done.stderr
    assert record["us_p50"] == 174.0 and record["starts"] == 3 and record["iters"] == 9
    assert record["us_max"] == 182.0 and record["max_at"] == [2, 2, 2]
    assert record["pattern_us"] == 170.0 and record["times"] == 1.0235 and record["pass"]  # not that of 20 SMs
    assert record["bar"] == {"yardstick": "push", "bar": 1.04, "goal": 1.01, "peer_us": 281, "p99": 1.15}
    assert record["gpu"] == "NVIDIA H100 80GB HBM3" and record["count"] == 2 and record["cuda"] == "13.0"
    assert record["wire_gbs"] == pytest.approx(4082 * 14336 / 174.0e3, abs=0.1)


def test_a_missed_bar_is_no_error_and_a_wrong_value_is(run):
    done, records = run(190.0)
    assert done.returncode == 0 and "MISSED" in done.stdout
    assert [one["pass"] for one in records if "pass" in one] == [False]


def test_wrong_values_fail_the_run(run):
    done, _ = run(173.0, wrong=2)
    assert done.returncode == 1 and "WRONG (6 elements)" in done.stdout


def test_the_table_of_the_readme_comes_from_records(run, tmp_path: Path):
    run(173.0)
    files = [str(file) for file in (tmp_path / "results").glob("*.jsonl")]
    done = subprocess.run([sys.executable, str(BENCH / "gpu_table.py"), "--print", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| dispatch BF16, cached handle | 174 (1.02) | 281 |" in done.stdout
    assert "./dev bench gpu --part bars" in done.stdout


def test_the_table_is_in_one_order_and_names_only_runs_that_it_shows(run, tmp_path: Path):
    _, records = run(173.0)
    others = [{**one, "gpu": f"NVIDIA {gpu}"} for gpu in ("Z9", "A1", "M5", "K7") for one in records]
    unseen = [{**one, "tokens": 17, "commit": "0123456789"} for one in records]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (*records, *others, *unseen)))
    tables = {subprocess.run([sys.executable, str(BENCH / "gpu_table.py"), "--print", str(file)], capture_output=True, text=True,
                             check=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2", "3")}
    assert len(tables) == 1 and "0123456789" not in tables.pop()


def test_a_table_has_the_date_of_what_is_in_it(run, tmp_path: Path):
    _, records = run(173.0)
    later = [{**one, "kind": "ll", "op": "pair", "mode": "graph", "tokens": 8, "date": "2999-01-01"} for one in records]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps({**one, "date": one["date"] if one["kind"] == "ll" else "2998-01-01"}) + "\n"
                            for one in (*records, *later)))
    done = subprocess.run([sys.executable, str(BENCH / "gpu_table.py"), "--print", str(file)], capture_output=True, text=True, check=True)
    (high,) = [line for line in done.stdout.splitlines() if line.startswith("|  | 2 ranks")]
    (decode,) = [line for line in done.stdout.splitlines() if line.startswith("| tokens per rank |")]
    assert "2998-01-01" in high and "2999-01-01" in decode and "2999" not in high


LOGGING_PROGRAM = """#!{python}
import json, sys
with open("{log}", "a") as out:
    out.write(json.dumps(dict(zip(sys.argv[1::2], sys.argv[2::2]))) + "\\n")
"""


def test_the_part_of_points_has_every_named_one_and_enough_calls_for_p99(tmp_path: Path):
    log = tmp_path / "starts"
    environment = stand_in(tmp_path, LOGGING_PROGRAM.format(python=sys.executable, log=log), "NVIDIA H100 80GB HBM3", 2)
    command = [sys.executable, str(BENCH / "run_gpu"), str(tmp_path), "--part", "points", "--starts", "1"]
    done = subprocess.run([*command, "--results", str(tmp_path / "results")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    starts = [json.loads(line) for line in log.read_text().splitlines()]
    points = [set(point.split()) for start in starts for point in start["--ht"].split(";")]
    named = [f"sms={sms}" for sms in (4, 8, 12, 24, 64)] + [f"tokens={tokens}" for tokens in (256, 1024, 8192, 16384)]
    named += [f"hidden={hidden}" for hidden in (2048, 2880, 4096, 5120)] + [f"topk={topk}" for topk in (1, 4, 16, 22)]
    named += ["profile=lognormal:1.1", "profile=hot-rank:4", "product=1"]
    for name in named:
        assert any(name in point for point in points), name
    assert all(7 * int(start["--rounds"]) >= 300 for start in starts)


PAIR_PROGRAM = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
common = {{"gpu": "NVIDIA H200", "gpus": 4, "cuda_driver": 13000, "version": "0.1.0+abc"}}
shape = {{"kind": "ll", "tokens": 32, "hidden": 7168, "topk": 8, "experts": 256, "routing": "uniform:1", "ranks": 4, "max_tokens": 128}}
with open(given["--out"], "a") as out:
    def put(**fields):
        out.write(json.dumps(fields | common | shape) + "\\n")
    for dtype, us in (("fp8", 8.5), ("bf16", 10.0)):
        put(who="probe", op="step", dtype=dtype, form="copied", blocks=32, wrong=0, us=[us] * 3)
    for dtype, us in (("fp8", {fp8}), ("bf16", {bf16})):
        put(who="anyep", op="pair", mode="graph", dtype=dtype, sms=0, wire_rows=32, wrong=0, us=[us] * 3)
"""


@pytest.mark.parametrize("fp8, bf16, passed", [(20.3, 20.9, (True, True)), (20.5, 21.0, (False, False)), (20.7, 20.8, (False, True))])
def test_on_four_h200_a_pair_is_measured_in_microseconds_as_well(tmp_path: Path, fp8: float, bf16: float, passed: tuple[bool, bool]):
    environment = stand_in(tmp_path, PAIR_PROGRAM.format(python=sys.executable, fp8=fp8, bf16=bf16), "NVIDIA H200", 4)
    command = [sys.executable, str(BENCH / "run_gpu"), str(tmp_path), "--ranks", "4", "--part", "decode", "--results", str(tmp_path / "results")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").glob("*.jsonl")
    pairs = {record["dtype"]: record for record in map(json.loads, file.read_text().splitlines()) if record["op"] == "pair"}
    assert [pairs[dtype]["bar"]["most_us"] for dtype in ("fp8", "bf16")] == [20.6, 20.9]
    assert [pairs[dtype]["times"] for dtype in ("fp8", "bf16")] == [pytest.approx(fp8 / 18.5, abs=1e-4), pytest.approx(bf16 / 20, abs=1e-4)]
    assert (pairs["fp8"]["pass"], pairs["bf16"]["pass"]) == passed
    assert f"at most 20.6 us: {'met' if fp8 <= 20.6 else 'missed'}" in done.stdout  # 20.5 is 1.108 times its steps
