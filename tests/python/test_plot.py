"""anyep.plot: what is written, what the pictures name and how many curves they hold, and how bad input is refused."""

import builtins
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyep import plot, workload
from anyep._charts import spread
from anyep.errors import ArgumentError

pytest.importorskip("matplotlib")
ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.jsonl"))


def record(**fields):
    base = {"gpu": "cpu:Model", "count": 4, "op": "dispatch", "kind": "ht", "dtype": "bf16", "memory": "window",
            "tokens": 1024, "hidden": 7168, "topk": 8, "experts": 256, "ranks": 2, "sms": 1, "us_p50": 100.0,
            "us_p99": 150.0, "wire_gbs": 5.0, "ceiling_gbs": 10.0, "ratio": 0.5, "graph": False, "routing": "uniform:1",
            "commit": "0123456789abcdef", "wrong": 0,
            "peer": [{"name": "MPI_Alltoallv", "us_p50": 300.0, "us_p99": 400.0, "wire_gbs": 1.7, "sms": 1}]}
    return {**base, **fields}


def sweep(**fields):
    """Two records whose times, those of the peer included, grow with the tokens."""
    peers = fields.pop("peer", record()["peer"])
    return [record(tokens=tokens, us_p50=100.0 * tokens, us_p99=150.0 * tokens, **fields,
                   peer=[{**peer, "us_p50": peer["us_p50"] * tokens, "us_p99": peer["us_p99"] * tokens} for peer in peers])
            for tokens in (1024, 4096)]


def text_of(path):
    """All text of an SVG, in the order of the file."""
    return " | ".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8")))


def curves(path, role=""):
    return re.findall(rf'id="series-\d+-\d+-{role}[^"]*"', path.read_text(encoding="utf-8"))


# ---- Files


@pytest.mark.parametrize("draw", [plot.latency, plot.bandwidth])
def test_both_formats_without_an_ending(draw, tmp_path):
    png, svg = draw(sweep(), tmp_path / "new folder" / "picture")
    assert png.read_bytes().startswith(b"\x89PNG") and "<svg" in svg.read_text(encoding="utf-8")
    assert (png.name, svg.name) == ("picture.png", "picture.svg")


def test_one_format_with_an_ending(tmp_path):
    assert plot.latency(sweep(), str(tmp_path / "a.svg")) == [tmp_path / "a.svg"]
    assert plot.load([[0]], 1, 1, tmp_path / "b.png") == [tmp_path / "b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.png"]


def test_equal_records_give_equal_files(tmp_path):
    first, second = (plot.latency(sweep(), tmp_path / name)[0].read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


def test_the_programs_matplotlib_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot.latency(sweep(), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before
    code = "import sys, anyep.plot; assert not any(name.startswith('matplotlib') for name in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(filter(None, sys.path))},
                          timeout=120).returncode == 0


# ---- What the pictures hold


def test_latency_names_what_is_compared(tmp_path):
    records = sweep(dtype="bf16") + sweep(dtype="fp8")
    path, = plot.latency(records, tmp_path / "a.svg")
    text = text_of(path)
    for label in ("Time per call: AnyEP against MPI_Alltoallv", "Model, 4 cores", "H 7168", "top-8 of 256 experts",
                  "routing uniform:1", "commit 0123456", "dispatch, 2 ranks", "tokens per rank", "time per call, ms",
                  "1,024", "4,096", "BF16  410", "FP8  410", "MPI_Alltoallv, BF16", "floor, FP8"):
        assert label in text, label
    assert [len(curves(path, role)) for role in ("ours", "peer", "limit")] == [2, 2, 2]


def test_bandwidth_has_one_ceiling(tmp_path):
    path, = plot.bandwidth(sweep(dtype="bf16") + sweep(dtype="fp8"), tmp_path / "a.svg")
    text = text_of(path)
    for label in ("Rate on the wire", "wire rate, GB/s", "ceiling: memory copy  10", "BF16  5", "MPI_Alltoallv, FP8  1.7"):
        assert label in text, label
    assert [len(curves(path, role)) for role in ("ours", "peer", "limit")] == [2, 2, 1]


def test_panels_by_operation_and_ranks(tmp_path):
    records = sweep() + sweep(op="combine") + sweep(ranks=4)
    path, = plot.bandwidth(records, tmp_path / "a.svg")
    text = text_of(path)
    for title in ("dispatch, 2 ranks", "combine, 2 ranks", "dispatch, 4 ranks"):
        assert title in text
    assert "combine, 4 ranks" not in text
    assert text.count("tokens per rank") == 2 and text.count("4,096") == 2  # also under the panel above the missing one
    assert len(curves(path, "ours")) == 3


def test_kinds_are_named(tmp_path):
    path, = plot.latency(sweep(), tmp_path / "a.svg")
    assert "high throughput" in text_of(path)
    path, = plot.latency(sweep() + sweep(op="pair", kind="ll"), tmp_path / "a.svg")
    assert "pair: dispatch + combine, 2 ranks, low latency" in text_of(path)


def test_gpu_records_with_pattern_and_peers_by_sms(tmp_path):
    peers = [{"name": "v1", "us_p50": 300.0, "us_p99": 400.0, "wire_gbs": 2.0, "sms": sms} for sms in (16, 24)]
    path, = plot.bandwidth(sweep(gpu="Card", pattern_gbs=9.0, peer=peers), tmp_path / "a.svg")
    text = text_of(path)
    for label in ("Card x 4", "ceiling: link", "pattern without protocol  9", "v1, 16 SMs", "v1, 24 SMs", "AnyEP  5"):
        assert label in text, label


def test_pairs_have_no_rate_but_a_floor_of_steps(tmp_path):
    pair = record(op="pair", kind="ll", tokens=8, wire_gbs=None, ceiling_gbs=None, ratio=None, steps_us=31.0, peer=[])
    path, = plot.latency([pair], tmp_path / "a.svg")
    assert "floor  31" in text_of(path) and "against" not in text_of(path)
    with pytest.raises(ArgumentError, match="bandwidth: records = 1 without a figure to draw"):
        plot.bandwidth([pair], tmp_path / "b.svg")


def test_the_last_record_of_a_figure_counts(tmp_path):
    path, = plot.latency([record(us_p50=123.0), record(us_p50=222.0)], tmp_path / "a.svg")
    assert "AnyEP  222" in text_of(path) and "123" not in text_of(path).replace("0123456", "")


def test_records_that_may_not_be_quoted_say_so(tmp_path):
    path, = plot.latency([record(commit="0123456789+dirty")], tmp_path / "a.svg")
    assert "uncommitted changes: not to be quoted" in text_of(path).replace(" | ", " ")


def test_wrong_results_are_left_out(tmp_path):
    with pytest.warns(UserWarning, match="left out dispatch with 1024 tokens: 3 wrong elements"):
        path, = plot.latency([record(wrong=3), record(op="combine")], tmp_path / "a.svg")
    assert "dispatch, 2 ranks" not in text_of(path)


def test_load_counts_choices_and_rows(tmp_path):
    experts = np.array([[0, 1], [1, 0], [1, 4], [-1, -1]])  # ranks own 0..2 and 3..4
    path, = plot.load(experts, 5, 2, tmp_path / "a.svg")
    text = text_of(path)
    for label in ("4 tokens, top-2 of 5 experts on 2 ranks", "expert 1: 3 = 2.50 x mean", "choices (compute): max 1.67 x mean",
                  "rows (network): max 1.50 x mean", "rank 0", "rank 1"):
        assert label in text, label
    source = path.read_text(encoding="utf-8")
    assert source.count('id="experts-of-rank-0"') == 3 and source.count('id="experts-of-rank-1"') == 2


@pytest.mark.parametrize("num_experts, num_ranks", [(64, 4), (10, 4)])
def test_load_agrees_with_the_library(tmp_path, num_experts, num_ranks):
    batch = workload.generate("lognormal:1.1", num_experts=num_experts, top_k=3, num_ranks=num_ranks, tokens_per_rank=200)
    realised = batch.measure()
    path, = plot.load(batch.experts, num_experts, num_ranks, tmp_path / "a.svg")
    text = text_of(path).split(" | ")
    for count in (*realised.pairs_per_rank, *realised.rows_per_rank):
        assert f"{count:,}" in text
    for label in (f"choices (compute): max {realised.rank_pairs_max_over_mean:.2f} x mean",
                  f"rows (network): max {realised.rank_rows_max_over_mean:.2f} x mean"):
        assert label in text
    assert any(f"= {realised.expert_max_over_mean:.2f} x mean" in label for label in text)


@pytest.mark.parametrize("shape, num_experts, num_ranks", [((0, 2), 4, 2), ((3, 0), 4, 2), ((4, 1), 2, 5), ((9, 2), 64, 32)])
def test_load_of_unusual_batches(tmp_path, shape, num_experts, num_ranks):
    ids = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % num_experts
    assert plot.load(ids, num_experts, num_ranks, tmp_path / "a.svg")[0].stat().st_size > 0


@given(st.lists(st.floats(0, 1), max_size=9), st.floats(0.01, 0.1))
def test_labels_do_not_overlap(heights, gap):
    heights = sorted(heights)
    moved = spread(heights, gap, 0.0, 1.0)
    assert len(moved) == len(heights)
    assert all(b - a >= gap - 1e-9 for a, b in zip(moved, moved[1:]))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in moved)
    if all(b - a >= gap for a, b in zip(heights, heights[1:])):
        assert moved == pytest.approx(heights, abs=1e-9)  # nothing moves without need


# ---- Bad input


@pytest.mark.parametrize("line, fault", [
    ("{", ":2 is not JSON"),
    ("[1]", ":2: list, allowed: a JSON object"),
    ('{"tokens": 1, "ranks": 1}', ":2: op = None, allowed: a text"),
    ('{"op": "dispatch", "tokens": "8", "ranks": 1}', ":2: tokens = '8', allowed: an integer from 0"),
    ('{"op": "dispatch", "tokens": 8, "ranks": 1, "us_p50": "x"}', ":2: us_p50 = 'x', allowed: a finite number"),
    ('{"op": "dispatch", "tokens": 8, "ranks": 1, "us_p50": NaN}', ":2: us_p50 = nan, allowed: a finite number"),
    ('{"op": "dispatch", "tokens": 8, "ranks": 1, "peer": [{}]}', ":2: peer, allowed: a list of objects with a name"),
    ('{"op": "dispatch", "tokens": 8, "ranks": 1, "peer": [{"name": "p", "us_p50": -1}]}', ":2: us_p50 = -1"),
])
def test_read_records_names_the_line(tmp_path, line, fault):
    path = tmp_path / "records.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(ArgumentError, match=re.escape(fault)):
        plot.read_records(path)


def test_select():
    records = sweep(ranks=2) + sweep(ranks=4)
    assert plot.select(records, ranks=4, tokens=1024) == [records[2]]
    assert plot.select(records, tokens=(1024, 4096)) == records


@pytest.mark.parametrize("draw", [plot.latency, plot.bandwidth])
def test_charts_refuse_nothing_and_other_formats(draw, tmp_path):
    with pytest.raises(ArgumentError, match="records = 0 without a figure"):
        draw([], tmp_path / "a")
    with pytest.raises(ArgumentError, match="a record has op = None"):
        draw([{"tokens": 1}], tmp_path / "a")
    with pytest.raises(ArgumentError, match=r"\.pdf', allowed: a path that ends in .png or .svg"):
        draw(sweep(), tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experts, num_experts, num_ranks, fault", [
    ([[0, 4]], 4, 2, r"experts\[0, 1\] = 4, allowed: -1..3"),
    ([[0], [-2]], 4, 2, r"experts\[1, 0\] = -2, allowed: -1..3"),
    ([0, 1], 4, 2, r"experts = \(2,\) int64, allowed: integers \[tokens, top_k\]"),
    ([[0.5]], 4, 2, r"experts = \(1, 1\) float64, allowed: integers"),
    ([[0]], 0, 2, r"num_experts = 0"),
    ([[0]], 4, 0, r"num_ranks = 0"),
])
def test_load_refuses(tmp_path, experts, num_experts, num_ranks, fault):
    with pytest.raises(ArgumentError, match=fault):
        plot.load(experts, num_experts, num_ranks, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *arguments):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.latency(sweep(), tmp_path / "a")
    assert plot.main([str(RESULTS[0]), "--out", str(tmp_path)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- The command


def test_command_draws_the_committed_records(tmp_path, capsys):
    assert plot.main([*map(str, RESULTS), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.split()
    assert {pathlib.Path(path).name for path in printed} >= {"latency_ht.svg", "latency_ll.png", "bandwidth_ht.svg"}
    assert all(pathlib.Path(path).stat().st_size > 1000 for path in printed)


def test_command_filters_and_draws_traces(tmp_path, capsys):
    trace = tmp_path / "trace"
    trace.write_text("anyep-trace 1\nexperts 8\ntop_k 2\ntokens 2 1\nrows\n3:0.75 5:0.25\n0:0.5 -1:0\n7:0.625 6:0.375\nend 3\n")
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps(r) + "\n" for r in sweep(ranks=2) + sweep(ranks=4) + sweep(op="combine")))
    arguments = [str(records), "--out", str(tmp_path), "--where", "ranks=2,3", "--where", "op=dispatch", "--trace", str(trace)]
    assert plot.main(arguments) == 0
    assert "4 ranks" not in text_of(tmp_path / "latency_ht.svg")
    assert "3 tokens, top-2 of 8 experts on 2 ranks" in text_of(tmp_path / "load.svg")
    assert plot.main(["--out", str(tmp_path), "--trace", str(trace), "--ranks", "4"]) == 0
    assert "8 experts on 4 ranks" in text_of(tmp_path / "load.svg")


@pytest.mark.parametrize("arguments, code, says", [
    (["absent.jsonl", "--out", "."], 2, "absent.jsonl"),
    ([str(ROOT / "README.md"), "--out", "."], 2, "is not JSON"),
    ([str(RESULTS[0]), "--out", ".", "--where", "ranks"], 2, "allowed: FIELD=VALUE"),
    ([str(RESULTS[0]), "--out", ".", "--where", "op=memory"], 1, "no figure to draw"),
])
def test_command_exit_codes(tmp_path, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    assert plot.main(arguments) == code
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["records.jsonl"], ["--out", "x"]])
def test_command_usage(arguments):
    with pytest.raises(SystemExit) as exit_:
        plot.main(arguments)
    assert exit_.value.code == 2
