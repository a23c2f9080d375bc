#!/usr/bin/env python3
"""Whole operations of `deep_ep` on GPU ranks, from Python, beside the best peer on the same cards; recorded in bench/results/.

    PYTHONPATH=BUILD/python python bench/python_gpu.py [--ranks N] [--sms N] [--starts N] [--rounds N] [--quick]
                                                       [--results FOLDER] [--commit HASH]

./dev bench deep_ep runs it. One process per rank, tensors of torch, one GPU each. High throughput at 4096 tokens, hidden 7168,
top-8 of 256: calls back to back, each from an event before it to an event behind it, dispatches into the Buffer's memory and into
ordinary tensors (memory = caller). Decode pairs at 1, 8, 32 and 128 tokens: 20 in
a replayed graph, whole and with hooks, and eager. All of a round in turn, the slowest rank counts. `host us` is what the call takes
the host, where it waits for nothing. Exit status: 0 all results right, 1 something was wrong (a missed bar is reported, not an error).
"""
import argparse
import json
import pathlib
import re
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import gpu_bars  # noqa: E402
import ranks  # noqa: E402
from records import RESULTS, Figure, base_record, gpus, median, print_end, revision, rounded, spread, verdict, write  # noqa: E402

TOKENS, HIDDEN, TOP_K, EXPERTS = 4096, 7168, 8, 256
DECODE, MAX_TOKENS, PAIRS = (1, 8, 32, 128), 128, 20
CALLS, DROPPED = 10, 3  # of a round; ranks are together after the first ones
WRAP_PAIRS = 510  # past the wrap of an engine's epochs (1,000 turns, decision 0006), whose turns clear regions
HOST_BARS_US = {"ht": 25, "ll": 30}


class _Bench:
    """One rank. Every value is an integer that BF16 and FP8 hold exactly, so results are compared for equality."""

    def __init__(self, rank, num_ranks, sms):
        import deep_ep
        import torch

        self.torch, self.rank, self.num_ranks, self.lines = torch, rank, num_ranks, {}
        torch.cuda.set_device(rank)
        import torch.distributed as dist
        hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, num_ranks, EXPERTS)
        deep_ep.Buffer.set_num_sms(sms)
        self.buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 30, hint, low_latency_mode=True, explicitly_destroy=True)
        self.sms, self.dist = sms, dist
        generator = torch.Generator().manual_seed(rank)
        self.ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)]).cuda()
        powers = torch.randint(0, 4, (TOKENS, HIDDEN), generator=generator)
        self.x = (2.0 ** powers).to(torch.bfloat16).cuda()
        self.weights = torch.full((TOKENS, TOP_K), 1 / TOP_K, device="cuda")
        hosts = torch.zeros(TOKENS, num_ranks, device="cuda").scatter_(1, self.ids // (EXPERTS // num_ranks), 1.0)
        self.sums = self.x.float() * hosts.sum(dim=1, keepdim=True)  # of rows that come back as they went
        self.x8 = self.x.to(torch.float8_e4m3fn), torch.ones(TOKENS, HIDDEN // 128, device="cuda")

    def align(self):
        self.torch.cuda.synchronize()
        self.dist.barrier()

    def note(self, about, us, host_us, wrong):
        line = self.lines.setdefault(json.dumps(about, sort_keys=True), about | {"us": [], "host_us": [], "wrong": 0})
        line["us"] += ranks.slowest(us)
        line["host_us"] += [ranks.slowest([median(host_us)])[0]] if host_us else []
        line["wrong"] += ranks.total(wrong)

    # ---- high throughput

    def timed(self, call):
        """Microseconds of each call, and of the host in it; what the last one returned."""
        torch = self.torch
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
        host_us = []
        self.align()
        marks[0].record()
        for mark in marks[1:]:
            begin = time.perf_counter_ns()
            got = call()
            host_us.append((time.perf_counter_ns() - begin) * 1e-3)
            mark.record()
        torch.cuda.synchronize()
        us = [1e3 * first.elapsed_time(second) for first, second in zip(marks, marks[1:])]
        return us[DROPPED:], host_us[DROPPED:], got

    def fresh(self, x):
        counts, _, pairs, in_rank, _ = self.buffer.get_dispatch_layout(self.ids, EXPERTS)
        return self.buffer.dispatch(x, num_tokens_per_rank=counts, is_token_in_rank=in_rank, num_tokens_per_expert=pairs,
                                    topk_idx=self.ids, topk_weights=self.weights)

    def wrong(self, got, handle):
        """Elements that are wrong when received rows are combined as they came."""
        rows = got[0] if isinstance(got[0], self.torch.Tensor) else got[0][0].to(self.torch.bfloat16)
        return int((self.buffer.combine(rows, handle)[0].float() != self.sums).sum())

    def high_throughput(self):
        got, handle = self.dispatches("window")
        for memory, rows in (("window", got[0]), ("caller", got[0].clone())):
            us, host_us, (sums, *_) = self.timed(lambda rows=rows: self.buffer.combine(rows, handle))
            self.note(self.about("combine", "bf16", memory), us, host_us, int((sums.float() != self.sums).sum()))

    def about(self, op, dtype, memory):
        return {"kind": "ht", "op": op, "dtype": dtype, "memory": memory, "tokens": TOKENS, "hidden": HIDDEN, "topk": TOP_K,
                "experts": EXPERTS, "ranks": self.num_ranks, "sms": self.sms, "routing": "uniform"}

    def dispatches(self, memory):
        """Of both types, fresh and with a handle; what the last one of BF16 returned, and its handle."""
        for dtype, x in (("fp8", self.x8), ("bf16", self.x)):
            us, _, got = self.timed(lambda x=x: self.fresh(x))
            handle = got[4]
            self.note(self.about("dispatch", dtype, memory), us, [], self.wrong(got, handle))
            us, host_us, got = self.timed(lambda x=x, handle=handle: self.buffer.dispatch(x, handle=handle))
            self.note(self.about("dispatch_cached", dtype, memory), us, host_us, self.wrong(got, handle))
        return got, handle

    def ordinary(self, rounds):
        """Dispatches into tensors that peers cannot write: what a caller gets who has a view of the Buffer's memory."""
        self.buffer.get_local_buffer_tensor(self.torch.uint8)
        for _ in range(rounds):
            self.dispatches("caller")

    # ---- low latency

    def pair(self, x, ids, weights, fp8, hook, answers=None):
        """One pair; the combine of `answers`, or of what the dispatch gave."""
        buffer = self.buffer
        rows, _, handle, _, receive = buffer.low_latency_dispatch(x, ids, MAX_TOKENS, EXPERTS, use_fp8=fp8, return_recv_hook=hook)
        if hook:
            receive()
        if answers is None:
            answers = rows
            if fp8:
                scales = rows[1].repeat_interleave(128, dim=2)
                answers = (rows[0].float() * scales).to(self.torch.bfloat16)
        sums, _, receive = buffer.low_latency_combine(answers, ids, weights, handle, return_recv_hook=hook)
        if hook:
            receive()
        return sums

    def low_latency(self, rounds):
        torch = self.torch
        slab = torch.ones(EXPERTS // self.num_ranks, self.num_ranks * MAX_TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        for turn in range(WRAP_PAIRS):
            self.pair(self.x[:1], self.ids[:1], self.weights[:1], False, False, slab)
            if turn % PAIRS == 0:
                torch.cuda.synchronize()
        for tokens in DECODE:
            batch = self.x[:tokens], self.ids[:tokens], self.weights[:tokens]
            for fp8 in (True, False):
                about = {"kind": "ll", "op": "pair", "tokens": tokens, "hidden": HIDDEN, "topk": TOP_K, "experts": EXPERTS,
                         "ranks": self.num_ranks, "sms": 0, "routing": "uniform", "dtype": "fp8" if fp8 else "bf16",
                         "max_tokens": MAX_TOKENS}
                for hook in (False, True):
                    wrong = int((self.pair(*batch, fp8, hook) != batch[0]).sum())
                    self.align()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        for _ in range(PAIRS):
                            sums = self.pair(*batch, fp8, hook, slab)
                    for _ in range(rounds):
                        us, _, _ = self.timed(graph.replay)
                        wrong += int((sums != 1).sum())  # eight times an eighth
                        self.note(about | {"mode": "hook" if hook else "graph"}, [each / PAIRS for each in us], [], wrong)
                        wrong = 0
                    self.align()
                    del graph, sums

                def pairs(batch=batch, fp8=fp8):
                    for _ in range(PAIRS):
                        sums = self.pair(*batch, fp8, False, slab)
                    return sums

                for _ in range(rounds):
                    us, host_us, sums = self.timed(pairs)
                    self.note(about | {"mode": "eager"}, [each / PAIRS for each in us], [each / PAIRS for each in host_us],
                              int((sums != 1).sum()))


def start(rank, num_ranks, sms, rounds, path):
    """One process start, in each rank's process; the first one writes the lines."""
    bench = _Bench(rank, num_ranks, sms)
    for _ in range(rounds):
        bench.high_throughput()
    bench.low_latency(rounds)
    bench.ordinary(rounds)
    bench.align()
    bench.buffer.destroy()
    if rank == 0:
        pathlib.Path(path).write_text("".join(json.dumps(line) + "\n" for line in bench.lines.values()), encoding="utf-8")


# ---- Records

def record_of(figure, machine, command):
    about = figure.about
    record = dict(machine) | {field: about[field] for field in ("op", "kind", "dtype", "tokens", "hidden", "topk", "experts", "ranks")}
    record.update({"sms": about["sms"], "us_p50": rounded(figure.p50, 2), "us_p99": rounded(figure.p99, 2),
                   "graph": about.get("mode") in ("graph", "hook"), "routing": about["routing"]})
    for name in ("memory", "mode", "max_tokens"):
        if name in about:
            record[name] = about[name]
    host_us = [us for line in figure.starts for us in line["host_us"]]
    if host_us:
        record["host_us"] = rounded(median(host_us), 1)
    record.update({"iters": figure.iterations, "starts": len(figure.starts), "spread": rounded(spread(figure.medians)),
                   "wrong": figure.wrong, "api": "deep_ep"})
    bar = (gpu_bars.high_throughput if about["kind"] == "ht" else gpu_bars.pair)(about, machine["gpu"], machine["count"])
    if bar is not None and bar.peer_us:
        record["bar"] = {"yardstick": "best peer", "peer_us": bar.peer_us}
        record["pass"] = record["us_p50"] < bar.peer_us
    most = HOST_BARS_US[about["kind"]] if about["kind"] == "ht" or about["tokens"] == 1 else None
    if host_us and most:
        record.setdefault("bar", {})["host_us"] = most
        record["pass"] = record.get("pass", True) and record["host_us"] <= most
    return record | {"command": command}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=0, help="default: one per GPU")
    parser.add_argument("--sms", type=int, default=16, help="of high throughput")
    parser.add_argument("--starts", type=int, default=3, help="process starts (3 or more for a record)")
    parser.add_argument("--rounds", type=int, default=10, help=f"per start; {CALLS - DROPPED} timed calls each")
    parser.add_argument("--quick", action="store_true", help="one short start, nothing recorded: does it run?")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--commit", help="what was measured, where git cannot be asked")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.starts, arguments.rounds = 1, 1

    names, driver = gpus()
    num_ranks = arguments.ranks or len(names)
    if num_ranks > len(names):
        parser.error(f"--ranks {num_ranks}: this machine has {len(names)} GPUs, and each rank needs its own")
    import torch

    figures = {}
    for number in range(arguments.starts):
        began = time.monotonic()
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as out:
            ranks.run(num_ranks, start, arguments.sms, arguments.rounds, out.name, timeout_s=180)
            for text in pathlib.Path(out.name).read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                about = {name: value for name, value in line.items() if name not in ("us", "host_us", "wrong")}
                figures.setdefault(json.dumps(about, sort_keys=True), Figure(about)).add(line)
        print(f"start {number + 1}/{arguments.starts}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    commit = arguments.commit or revision()
    machine = base_record({"cpu": "", "cores": num_ranks, "kernel": driver}, commit) | {"gpu": names[0], "cuda": torch.version.cuda}
    command = re.sub(r" --(results|commit) \S+", "", " ".join(["./dev bench deep_ep", *sys.argv[1:]]))
    records = [record_of(figure, machine, command) for figure in figures.values()]
    form = "{:<16} {:<5} {:<8} {:>6} {:>8} {:>8} {:>7} {:>8}"
    print(form.format("op", "dtype", "memory", "tokens", "us", "p99", "peer", "host us"))
    for record in records:
        bar = record.get("bar", {})
        print(form.format(record["op"], record["dtype"], record.get("memory") or record["mode"], record["tokens"],
                          f"{record['us_p50']:.1f}", f"{record['us_p99']:.1f}", bar.get("peer_us", "-"),
                          f"{record['host_us']:.1f}" if "host_us" in record else "-"), verdict(record))
    wrong = sum(figure.wrong for figure in figures.values())
    path = None if arguments.quick else write(records, arguments.results, "python")
    print_end(records, commit, path, wrong)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
