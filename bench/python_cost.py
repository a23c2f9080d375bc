#!/usr/bin/env python3
"""What a Python call costs over the C++ call that does the same, and what importing anyep costs; recorded in bench/results/.

    PYTHONPATH=BUILD/python python bench/python_cost.py [--library FILE] [--starts N] [--calls N] [--quick] [--results FOLDER]

./dev bench python runs it. Everything is timed call by call in the same processes, in turn: the C++ library (bench/calls, an
engine of its own), the extension with prebuilt views (`native`: what binding costs), anyep with given outputs, deep_ep with the
outputs that it makes. METRICS.md has the definitions. Exit status: 0 all results right, 1 something was wrong (a missed bar is
reported, not an error).
"""
import argparse
import collections
import ctypes
import json
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import ranks  # noqa: E402
from records import (RESULTS, ROOT, SHAPE_FIELDS, Figure, base_record, median, print_end, revision, rounded, spread,  # noqa: E402
                     this_machine, verdict, write)

RANKS, TOKENS, HIDDEN, EXPERTS, TOP_K = (1, 2), 16, 7168, 256, 8
COST_BARS_US = {("anyep", "route"): 15, ("anyep", "dispatch_cached"): 15, ("anyep", "combine"): 15, ("anyep", "dispatch"): None,
                ("deep_ep", "dispatch"): 45, ("deep_ep", "combine"): 25}
IMPORT_BAR_S = 0.3
BLOCK = 20  # calls of one implementation before the next one's turn; one more before them is not timed
ROWS_BYTES = 256 << 20
LIBRARY = ROOT / "build" / "bench" / "bench" / "calls" / "libanyep_bench_calls.so"
_clock = time.perf_counter_ns


# ---- Implementations: `high_throughput(us)` and `low_latency(us)` append the microseconds of their steps, one call each

class _Cpp:
    """bench/calls by ctypes, which lets other threads run meanwhile as the extension does."""

    STEPS = {"ht": ("route", "dispatch_cached", "combine"), "ll": ("dispatch", "combine")}
    _AllGather = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)

    class _Request(ctypes.Structure):
        _fields_ = [(name, ctypes.c_int) for name in ("rank", "num_ranks", "num_experts", "top_k")] + [
            ("tokens", ctypes.c_int64), ("hidden", ctypes.c_int64), ("seed", ctypes.c_uint64)]

    def __init__(self, library, work):
        self._library = ctypes.CDLL(str(library))
        self._library.anyep_calls_open.restype = ctypes.c_void_p
        self._library.anyep_calls_error.restype = ctypes.c_char_p
        self._library.anyep_calls_wrong.restype = ctypes.c_int64
        self._all_gather = self._AllGather(self._gather)
        request = self._Request(work.rank, work.num_ranks, work.num_experts, work.top_k, work.tokens, work.hidden, 1)
        self._calls = ctypes.c_void_p(self._library.anyep_calls_open(ctypes.byref(request), self._all_gather))
        if not self._calls:
            raise RuntimeError(self._library.anyep_calls_error().decode())

    @staticmethod
    def _gather(mine, num_bytes, out):
        import torch
        import torch.distributed as dist

        here = torch.frombuffer(bytearray(ctypes.string_at(mine, num_bytes)), dtype=torch.uint8)
        everywhere = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, here)
        ctypes.memmove(out, bytes(torch.cat(everywhere).numpy()), num_bytes * len(everywhere))

    def run(self, kind, count):
        function = self._library.anyep_calls_high_throughput if kind == "ht" else self._library.anyep_calls_low_latency
        steps = len(self.STEPS[kind])
        us = (ctypes.c_double * (count * steps))()
        if function(self._calls, ctypes.c_int64(count), us) != 0:
            raise RuntimeError(self._library.anyep_calls_error().decode())
        return [list(us[step::steps]) for step in range(steps)]

    def wrong(self):
        return self._library.anyep_calls_wrong(self._calls)

    def close(self):
        self._library.anyep_calls_close(self._calls)


class _Python:
    """One step after the other, each timed by the process's clock (its own cost, below 0.1 us, is in every step)."""

    def run(self, kind, count):
        call = self.high_throughput if kind == "ht" else self.low_latency
        stamps = [call() for _ in range(count)]
        return [[(row[step + 1] - row[step]) * 1e-3 for row in stamps] for step in range(len(self.STEPS[kind]))]


class _AnyEP(_Python):
    """Given outputs: dispatch into the window, combine from and into memory of the caller, as _Cpp."""

    STEPS = _Cpp.STEPS

    def __init__(self, engine, work, data):
        import anyep
        import torch

        self.engine, self.work, self.data = engine, work, data
        self.rows = anyep.Rows(engine.make_rows(work.num_rows, work.hidden, "bfloat16", like=data.x).x,
                               experts=torch.zeros((work.num_rows, work.top_k), dtype=torch.int64),
                               weights=torch.zeros((work.num_rows, work.top_k)))
        self.out = torch.zeros_like(data.x)
        self.pair_out = torch.zeros_like(data.x)
        self.slabs = engine.low_latency_dispatch(data.x, work.experts, work.num_experts, work.tokens).result

    def high_throughput(self):
        engine, work, data = self.engine, self.work, self.data
        start = _clock()
        handle = engine.route(work.experts, work.num_experts)
        routed = _clock()
        engine.dispatch(data.x, handle, experts=work.experts, weights=work.weights, out=self.rows)
        dispatched = _clock()
        engine.combine(data.answers, handle, out=self.out)
        return start, routed, dispatched, _clock()

    def low_latency(self):
        engine, work, data, slabs = self.engine, self.work, self.data, self.slabs
        start = _clock()
        engine.low_latency_dispatch(data.x, work.experts, work.num_experts, work.tokens, out=slabs)
        dispatched = _clock()
        engine.low_latency_combine(slabs.x, work.experts, work.weights, slabs, work.num_experts, work.tokens, out=self.pair_out)
        return start, dispatched, _clock()

    def wrong(self):
        return (self.work.wrong_rows(self.rows.x, self.rows.experts, self.rows.weights) + self.work.wrong_sums(self.out) +
                self.data.wrong_pair(self.slabs.x, self.slabs.source, self.slabs.range, self.pair_out))


class _Native(_AnyEP):
    """The same on the extension itself, with views made before: what is left is the cost of binding."""

    def __init__(self, engine, work, data):
        from anyep.arrays import view

        super().__init__(engine, work, data)
        names = {"x": data.x, "answers": data.answers, "experts": work.experts, "weights": work.weights, "rows": self.rows.x,
                 "row_experts": self.rows.experts, "row_weights": self.rows.weights, "out": self.out, "pair_out": self.pair_out,
                 "slab_x": self.slabs.x, "counts": self.slabs.counts, "source": self.slabs.source, "range": self.slabs.range}
        self.views = {name: view("bench", name, tensor) for name, tensor in names.items()}
        self.native = engine._native

    def high_throughput(self):
        native, work, views = self.native, self.work, self.views
        start = _clock()
        handle = native.route(work.num_experts, work.top_k, views["experts"], None, None, 0, 0.0, [], True)
        routed = _clock()
        native.dispatch(handle, views["x"], None, views["experts"], views["weights"], [], views["rows"], None,
                        views["row_experts"], views["row_weights"], [], 0, 0.0, 0, [], True)
        dispatched = _clock()
        native.combine(handle, views["answers"], None, None, None, views["out"], None, 0, 0.0, 0, [], True)
        return start, routed, dispatched, _clock()

    def low_latency(self):
        native, work, views = self.native, self.work, self.views
        shape = (work.num_experts, work.tokens)
        slabs = (views["slab_x"], None, views["counts"], views["source"], views["range"], None)
        start = _clock()
        native.low_latency_dispatch(*shape, views["x"], views["experts"], slabs, None, None, 0, False, False, 0, 0.0, [], True)
        dispatched = _clock()
        native.low_latency_combine(*shape, views["slab_x"], views["source"], views["range"], None, views["experts"],
                                   views["weights"], views["pair_out"], None, 0, False, False, 0, 0.0, [], True)
        return start, dispatched, _clock()


class _DeepEP(_Python):
    """V1's calls: new outputs every time, the layout made before, a handle of tensors."""

    STEPS = {"ht": ("dispatch", "combine"), "ll": ("dispatch", "combine")}

    def __init__(self, buffer, work, data):
        self.buffer, self.work, self.data = buffer, work, data
        counts, _, pairs, in_rank, _ = buffer.get_dispatch_layout(work.experts, work.num_experts)
        self.layout = {"num_tokens_per_rank": counts, "num_tokens_per_expert": pairs, "is_token_in_rank": in_rank}

    def high_throughput(self):
        buffer, work, data = self.buffer, self.work, self.data
        self.received = self.out = None
        start = _clock()
        self.received = buffer.dispatch(data.x, topk_idx=work.experts, topk_weights=work.weights, **self.layout)
        dispatched = _clock()
        self.out = buffer.combine(data.answers, self.received[4])[0]
        return start, dispatched, _clock()

    def low_latency(self):
        buffer, work, data = self.buffer, self.work, self.data
        self.pair = self.pair_out = None
        start = _clock()
        self.pair = slabs, _, handle, _, _ = buffer.low_latency_dispatch(data.x, work.experts, work.tokens, work.num_experts,
                                                                         use_fp8=False)
        dispatched = _clock()
        self.pair_out = buffer.low_latency_combine(slabs, work.experts, work.weights, handle)[0]
        return start, dispatched, _clock()

    def wrong(self):
        slabs, _, handle, _, _ = self.pair
        return (self.work.wrong_rows(*self.received[:3]) + self.work.wrong_sums(self.out) +
                self.data.wrong_pair(slabs, handle[0], handle[1], self.pair_out))


class _Data:
    """Inputs, and the check of a low-latency pair whose experts answer with the rows that they got."""

    def __init__(self, work):
        import torch

        self.work = work
        self.x = torch.zeros((work.tokens, work.hidden), dtype=torch.bfloat16)
        self.answers = torch.zeros((work.num_rows, work.hidden), dtype=torch.bfloat16)
        work.fill_input(self.x)
        work.fill_answers(self.answers)

    def wrong_pair(self, slabs, source, ranges, out):
        """Rows exactly. The sums of K products, a rank's rounded to bfloat16 before they are added: within 2^-7 of |x| sum |w|."""
        wrong = 0
        for expert, row in enumerate(ranges.tolist()):
            for rank, packed in enumerate(row):
                rows = slice(packed >> 32, (packed >> 32) + (packed & 0xFFFFFFFF))
                wrong += self.work.wrong_tokens(slabs[expert, rows], rank, source[expert, rows].long())
        x, weights = self.x.float(), self.work.weights.sum(1, keepdim=True)
        return wrong + int(((out.float() - x * weights).abs() > 2.0**-7 * x.abs() * weights + 1e-30).sum())


# ---- One process

def measure_rank(rank, num_ranks, options):
    import anyep
    import deep_ep
    import torch.distributed as dist
    from rows import Workload

    ranks.bind_to_core(rank, num_ranks)
    work = Workload(rank, num_ranks, options["tokens"], options["hidden"], options["experts"], options["topk"])
    data = _Data(work)
    low_latency = anyep.low_latency_bytes(num_experts=work.num_experts, top_k=work.top_k, hidden=work.hidden,
                                          max_tokens=work.tokens, num_ranks=num_ranks)
    engine = anyep.Engine.create(dist.group.WORLD, rows_bytes=ROWS_BYTES, low_latency_bytes=low_latency)
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(work.tokens, work.hidden, num_ranks, work.num_experts)
    buffer = deep_ep.Buffer(dist.group.WORLD, ROWS_BYTES, hint, low_latency_mode=True, explicitly_destroy=True)
    everyone = {"native": _Native(engine, work, data), "anyep": _AnyEP(engine, work, data),
                "deep_ep": _DeepEP(buffer, work, data)}
    if options["library"]:
        everyone = {"c++": _Cpp(options["library"], work), **everyone}
    us = collections.defaultdict(list)
    for turn in range(-1, max(1, options["calls"] // BLOCK)):  # the first turn warms up
        for kind in ("ht", "ll"):
            for who, one in everyone.items():
                one.run(kind, 1)
                steps = one.run(kind, min(BLOCK, options["calls"]))
                for op, times in zip(one.STEPS[kind], steps):
                    us[who, kind, op] += times if turn >= 0 else []
    for who, one in everyone.items():
        _write_lines(who, one, us, work, options)
    if "c++" in everyone:
        everyone["c++"].close()
    del everyone, one
    engine.close()
    buffer.destroy()


def _write_lines(who, one, us, work, options):
    wrong = ranks.total(one.wrong())
    for (name, kind, op), times in us.items():
        if name != who:
            continue
        slowest = ranks.slowest(times)
        if work.rank != 0:
            continue
        line = {"who": who, "kind": kind, "op": op, "dtype": "bf16", "tokens": work.tokens, "hidden": work.hidden,
                "topk": work.top_k, "experts": work.num_experts, "ranks": work.num_ranks, "routing": work.routing,
                "us": slowest, "wrong": wrong, **options["machine"]}
        with open(options["out"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# ---- Records

def whole_dispatch(figures):
    """Adds `dispatch` = route + dispatch_cached, call by call, for all but deep_ep, whose call does both."""
    for (num_ranks, kind, op, who), figure in list(figures.items()):
        if op != "route":
            continue
        rest = figures[num_ranks, kind, "dispatch_cached", who]
        whole = None
        for first, second in zip(figure.starts, rest.starts):
            line = first | {"op": "dispatch", "us": [a + b for a, b in zip(first["us"], second["us"])]}
            whole = whole or Figure(line)
            whole.add(line)
        figures[num_ranks, kind, "dispatch", who] = whole


def record_of(figures, key, commit, command):
    num_ranks, kind, op, who = key
    figure, peer = figures[key], figures.get((num_ranks, kind, op, "c++"))
    about = figure.about
    record = base_record(about, commit)
    record.update({"op": op, "kind": kind, "dtype": "bf16"})
    record.update({field: about[field] for field in SHAPE_FIELDS})
    record.update({"sms": 1, "us_p50": rounded(figure.p50), "us_p99": rounded(figure.p99), "wire_gbs": None,
                   "ceiling_gbs": None, "ratio": None, "graph": False, "routing": about["routing"],
                   "iters": figure.iterations, "starts": len(figure.starts), "spread": rounded(spread(figure.medians)),
                   "wrong": figure.wrong, "api": who})
    if kind == "ht":
        record["memory"] = "caller" if op == "combine" else "window"
    if peer is not None and who != "c++":
        costs = [mine - theirs for mine, theirs in zip(figure.medians, peer.medians)]
        record["peer"] = [{"name": "anyep c++", "version": commit, "op": op, "us_p50": rounded(peer.p50),
                           "us_p99": rounded(peer.p99), "wire_gbs": None, "sms": 1}]
        record["cost_us"] = rounded(median(costs))
        record["cost_spread_us"] = rounded(max(costs) - min(costs))
        bar = COST_BARS_US.get((who, op)) or (15 if (who, kind, op) == ("anyep", "ll", "dispatch") else None)
        if bar is not None:
            record["bar"] = {"cost_us": bar}
            record["pass"] = record["cost_us"] <= bar
    record["command"] = command
    return record


def import_record(commit, command, count=10):
    """The whole life of a process that imports anyep and nothing else, beside one that imports nothing."""
    def seconds(program):
        times = []
        for _ in range(count + 1):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            times.append(time.perf_counter() - start)
        return times[1:]
    times = seconds("import sys, anyep; assert 'torch' not in sys.modules")
    record = base_record(this_machine(), commit)
    record.update({"op": "import", "kind": "import", "tokens": 0, "ranks": 0, "api": "anyep",
                   "us_p50": rounded(1e6 * median(times), 1), "iters": count,
                   "us_p99": rounded(1e6 * max(times), 1), "bare_us_p50": rounded(1e6 * median(seconds("pass")), 1),
                   "wrong": 0, "bar": {"us_p50": 1e6 * IMPORT_BAR_S}})
    record["pass"] = median(times) <= IMPORT_BAR_S
    record["command"] = command
    return record


COLUMNS = "{:>5} {:<4} {:<16} {:<8} {:>8} {:>8} {:>7} {:>8} {:>7} {:>5}"


def print_records(records):
    print(COLUMNS.format("ranks", "kind", "op", "api", "us", "p99", "spread", "cost us", "+-", "goal"))
    for record in records:
        if record["op"] == "import":
            print(f"import anyep: {record['us_p50'] / 1e3:.0f} ms, of which a process that imports nothing "
                  f"{record['bare_us_p50'] / 1e3:.0f} ms; goal {IMPORT_BAR_S * 1e3:.0f} ms", verdict(record))
            continue
        cost = record.get("cost_us")
        print(COLUMNS.format(record["ranks"], record["kind"], record["op"], record["api"], f"{record['us_p50']:.1f}",
                             f"{record['us_p99']:.1f}", f"{record['spread']:.1%}", "-" if cost is None else f"{cost:.1f}",
                             "-" if cost is None else f"{record['cost_spread_us']:.1f}",
                             record.get("bar", {}).get("cost_us", "-")), verdict(record))


# ---- The run

def measure(arguments):
    figures = {}
    options = {"tokens": arguments.tokens, "hidden": arguments.hidden, "experts": arguments.experts,
               "topk": arguments.topk, "calls": arguments.calls, "machine": this_machine(),
               "library": str(arguments.library) if arguments.library.is_file() else None}
    for start in range(arguments.starts):
        for num_ranks in arguments.ranks:
            print(f"cost: start {start + 1}/{arguments.starts}, {num_ranks} ranks", file=sys.stderr, flush=True)
            with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
                ranks.run(num_ranks, measure_rank, options | {"out": out.name})
                for text in pathlib.Path(out.name).read_text(encoding="utf-8").splitlines():
                    line = json.loads(text)
                    key = line["ranks"], line["kind"], line["op"], line["who"]
                    figures.setdefault(key, Figure(line)).add(line)
    whole_dispatch(figures)
    return figures


def parse(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=pathlib.Path, default=LIBRARY, help="of bench/calls; without it no costs")
    parser.add_argument("--starts", type=int, default=3, help="process starts (3 or more for a record)")
    parser.add_argument("--calls", type=int, default=700, help="of each kind, per process start")
    parser.add_argument("--ranks", type=lambda text: tuple(map(int, text.split(","))), default=RANKS, help="default: 1,2")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--topk", type=int, default=TOP_K)
    parser.add_argument("--quick", action="store_true", help="one short start, nothing recorded: does it run?")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--command", default="", help="what records say was run")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.starts, arguments.calls = 1, min(arguments.calls, 100)
    return arguments


def main():
    arguments = parse()
    commit, command = revision(), arguments.command or "bench/python_cost.py"
    figures = measure(arguments)
    order = {who: place for place, who in enumerate(("c++", "native", "anyep", "deep_ep"))}
    records = [record_of(figures, key, commit, command)
               for key in sorted(figures, key=lambda key: (key[0], key[1], key[2], order[key[3]]))]
    records.append(import_record(commit, command, 10 if arguments.starts > 1 else 2))
    print_records(records)
    if "c++" not in {key[3] for key in figures}:
        print(f"no costs: {arguments.library} is not there (./dev bench python builds it)")
    path = None if arguments.quick else write(records, arguments.results, "python-cost")
    wrong = sum(record["wrong"] for record in records)
    print_end(records, commit, path, wrong)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
