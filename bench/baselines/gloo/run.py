#!/usr/bin/env python3
"""torch.distributed's gloo all_to_all_single, anyep and deep_ep in the same processes, recorded in bench/results/.

    PYTHONPATH=BUILD/python python bench/baselines/gloo/run.py [--starts N] [--seconds S] [--quick] [--results FOLDER]

./dev bench cpu runs it after the MPI part, ./dev bench cpu --only gloo alone. METRICS.md says what is measured. Exit status: 0
all results right, 1 something was wrong (a missed bar is reported, not an error).
"""
import argparse
import collections
import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import ranks  # noqa: E402
from records import (RESULTS, SHAPE_FIELDS, Figure, base_record, print_end, rates, revision, rounded, spread,  # noqa: E402
                     this_machine, verdict, write)

RANKS, TOKENS, HIDDEN = (2, 4), (1024, 4096), 7168
SPEEDUP_BAR = 2.0
FLUSH_BYTES = 128 << 20  # of all ranks together, as in the C++ benchmarks
MOST_ITERATIONS, WARM_UP = 400, 2


# ---- One rank

class _Case:
    """One figure: what is timed, how its output is checked, what it moves."""

    def __init__(self, about, call, wrong, output):
        self.about, self.call, self.wrong, self.output = about, call, wrong, output
        self.us, self.num_wrong = [], 0


def _cases(work, engine, buffer):
    import torch
    from engines import AnyEP, DeepEP
    from exchange import Gloo

    def rows(count):
        return torch.zeros((count, work.hidden), dtype=torch.bfloat16)

    x, recv, answers, out = rows(work.tokens), rows(work.num_rows), rows(work.num_rows), rows(work.tokens)
    work.fill_input(x)
    work.fill_answers(answers)
    gloo = Gloo(work, x, recv, answers, rows(int(work.reads[work.rank].sum())), out)
    window, caller = (AnyEP(engine, work, memory, x, recv, answers, out) for memory in ("window", "caller"))
    deep_ep = DeepEP(buffer, work, x, answers)
    cases = []

    def add(who, op, memory, one, call, **more):
        wrong, output = (one.wrong_dispatch, recv) if op == "dispatch" else (one.wrong_combine, out)
        if op == "dispatch" and one is window:
            output = window.rows.x
        cases.append(_Case({"who": who, "op": op, "memory": memory, **more}, call, wrong, output))

    add("gloo", "dispatch", "caller", gloo, gloo.dispatch)
    for who, memory, one in (("anyep", "window", window), ("anyep", "caller", caller), ("deep_ep", "window", deep_ep)):
        add(who, "dispatch", memory, one, one.dispatch)
    add("gloo", "combine", "caller", gloo, gloo.combine_float32, settings="float32")
    add("gloo", "combine", "caller", gloo, gloo.combine_bfloat16, settings="bfloat16")
    for who, memory, one in (("anyep", "window", window), ("anyep", "caller", caller), ("deep_ep", "caller", deep_ep)):
        add(who, "combine", memory, one, one.combine)
    return cases


def _check(cases):
    for case in cases:
        case.output.fill_(-1)
        case.call()
        case.num_wrong += case.wrong()


def _round(cases, flush, keep):
    import torch.distributed as dist

    for case in cases:
        flush.fill_(len(case.us))
        int(flush.sum())
        dist.barrier()
        begin = time.perf_counter_ns()
        case.call()
        end = time.perf_counter_ns()
        if keep:
            case.us.append((end - begin) * 1e-3)


def measure_rank(rank, num_ranks, options):
    """Measures every number of tokens in this process start; rank 0 writes the lines."""
    import anyep
    import deep_ep
    import torch
    import torch.distributed as dist
    from engines import rows_bytes_for
    from rows import Workload

    most_rows = max(options["tokens"]) * num_ranks
    num_bytes = rows_bytes_for(most_rows, options["hidden"], num_ranks)
    engine = anyep.Engine.create(dist.group.WORLD, rows_bytes=num_bytes)
    buffer = deep_ep.Buffer(dist.group.WORLD, num_nvl_bytes=num_bytes, explicitly_destroy=True)
    flush = torch.zeros(FLUSH_BYTES // num_ranks // 8, dtype=torch.int64)
    for tokens in options["tokens"]:
        work = Workload(rank, num_ranks, tokens, options["hidden"], options["experts"], options["topk"])
        cases = _cases(work, engine, buffer)
        _check(cases)
        begin = time.perf_counter()
        _round(cases, flush, keep=False)
        us = ranks.most(int((time.perf_counter() - begin) * 1e6))
        iterations = max(options["least_iterations"], min(MOST_ITERATIONS, int(options["seconds"] * 1e6 / max(us, 1))))
        for _ in range(WARM_UP):
            _round(cases, flush, keep=False)
        for _ in range(iterations):
            _round(cases, flush, keep=True)
        _check(cases)
        _write_lines(cases, work, options["out"])
        del cases
    engine.close()
    buffer.destroy()


def _write_lines(cases, work, out):
    import torch

    wire_rows, logical_rows = ranks.most(work.wire_rows), ranks.most(work.num_rows)
    for case in cases:
        us, wrong = ranks.slowest(case.us), ranks.total(case.num_wrong)
        if work.rank != 0:
            continue
        line = {**case.about, "kind": "ht", "dtype": "bf16", "row_bytes": 2 * work.hidden, "wire_rows": wire_rows,
                "logical_rows": logical_rows, "tokens": work.tokens, "hidden": work.hidden, "topk": work.top_k,
                "experts": work.num_experts, "ranks": work.num_ranks, "routing": work.routing, "us": us, "wrong": wrong,
                "torch": torch.__version__, **this_machine()}
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# ---- Records

def _key(about):
    return about["ranks"], about["tokens"], about["op"], about["who"], about["memory"], about.get("settings", "")


def peers_of(figures, about):
    """The baseline's figures for the same work, the quickest right one first."""
    same = [figure for figure in figures.values() if figure.about["who"] == "gloo" and
            all(figure.about[field] == about[field] for field in ("op", *SHAPE_FIELDS))]
    return sorted(same, key=lambda figure: (figure.wrong > 0, figure.p50))


def peer_record(peer):
    wire, _, _, _ = rates(peer, peer.p50, None)
    record = {"name": "torch gloo all_to_all_single", "version": peer.about["torch"], "op": peer.about["op"],
              "us_p50": rounded(peer.p50), "us_p99": rounded(peer.p99), "wire_gbs": rounded(wire), "sms": 1,
              "wrong": peer.wrong, "spread": rounded(spread(peer.medians))}
    return record | ({"settings": peer.about["settings"]} if "settings" in peer.about else {})


def record_of(figures, figure, commit, command):
    about, p50 = figure.about, figure.p50
    wire, logical, _, _ = rates(figure, p50, None)
    record = base_record(about, commit)
    record.update({field: about[field] for field in ("op", "kind", "dtype", *SHAPE_FIELDS)})
    record.update({"sms": 1, "us_p50": rounded(p50), "us_p99": rounded(figure.p99), "wire_gbs": rounded(wire),
                   "ceiling_gbs": None, "ratio": None, "graph": False, "routing": about["routing"],
                   "memory": about["memory"], "logical_gbs": rounded(logical), "wire_rows": about["wire_rows"],
                   "iters": figure.iterations, "starts": len(figure.starts), "spread": rounded(spread(figure.medians)),
                   "wrong": figure.wrong, "api": about["who"]})
    peers = peers_of(figures, about)
    record["peer"] = [peer_record(peer) for peer in peers]
    if peers and not peers[0].wrong:
        record["speedup"] = rounded(peers[0].p50 / p50)
        record["bar"] = {"speedup": SPEEDUP_BAR}
        record["pass"] = record["speedup"] >= SPEEDUP_BAR
    record["command"] = command
    return record


COLUMNS = "{:>5} {:>6} {:<8} {:<7} {:<6} {:>9} {:>9} {:>6} {:>9} {:<8} {:>5} {:>4}"


def print_records(records):
    print(COLUMNS.format("ranks", "tokens", "op", "api", "memory", "us", "p99", "spread", "gloo us", "", "x", "goal"))
    for record in records:
        peer = record["peer"][0]
        print(COLUMNS.format(record["ranks"], record["tokens"], record["op"], record["api"], record["memory"],
                             f"{record['us_p50']:.0f}", f"{record['us_p99']:.0f}", f"{record['spread']:.1%}",
                             f"{peer['us_p50']:.0f}", peer.get("settings", ""), f"{record.get('speedup', 0):.2f}",
                             SPEEDUP_BAR), verdict(record))


# ---- The run

def measure(arguments):
    figures = collections.OrderedDict()
    options = {"tokens": arguments.tokens, "hidden": arguments.hidden, "experts": arguments.experts,
               "topk": arguments.topk, "seconds": arguments.seconds, "least_iterations": arguments.least_iterations}
    for start in range(arguments.starts):
        for num_ranks in arguments.ranks:
            print(f"gloo: start {start + 1}/{arguments.starts}, {num_ranks} ranks", file=sys.stderr, flush=True)
            with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
                ranks.run(num_ranks, measure_rank, options | {"out": out.name},
                          timeout_s=120 + 5 * arguments.seconds * len(arguments.tokens))
                for text in pathlib.Path(out.name).read_text(encoding="utf-8").splitlines():
                    line = json.loads(text)
                    figures.setdefault(_key(line), Figure(line)).add(line)
    return collections.OrderedDict(sorted(figures.items()))


def _numbers(text):
    return tuple(int(number) for number in text.split(","))


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3, help="process starts (3 or more for a record)")
    parser.add_argument("--seconds", type=float, default=5, help="per configuration and start, about")
    parser.add_argument("--least-iterations", type=int, default=5)
    parser.add_argument("--ranks", type=_numbers, default=RANKS, help="default: 2,4")
    parser.add_argument("--tokens", type=_numbers, default=TOKENS, help="default: 1024,4096")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="one short start, nothing recorded: does it run?")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--command", default="", help="what records say was run")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.starts, arguments.seconds, arguments.least_iterations = 1, 0.5, 2
    return arguments


def main():
    arguments = parse()
    commit = revision()
    command = arguments.command or "./dev bench cpu --only gloo"
    figures = measure(arguments)
    records = [record_of(figures, figure, commit, command) for figure in figures.values() if figure.about["who"] != "gloo"]
    print_records(records)
    print(f"gloo: torch {next(iter(figures.values())).about['torch']}, TCP over loopback, 1 thread per rank")
    path = None if arguments.quick else write(records, arguments.results, "gloo")
    # A torch whose bfloat16 sums round at every addition has no right bfloat16 figure; float32 is the baseline then.
    wrong = sum(figure.wrong for figure in figures.values() if figure.about.get("settings") != "bfloat16")
    print_end(records, commit, path, wrong)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
