#!/usr/bin/env python3
"""Makes the README's table of GPU ranks from records: bench/gpu_table.py [--check] [FILES...]

Without files, the last record of every figure in bench/results/. The text between the two marks of README.md is replaced; --check
says by its exit status whether that would change anything.
"""
import argparse
import json
import pathlib
import re
import sys

import gpu_bars
from records import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- gpu table: bench/gpu_table.py -->", "<!-- end of gpu table -->"
HIGH = (("dispatch", "bf16", "window", "dispatch BF16"), ("dispatch_ahead", "bf16", "window", "dispatch BF16, rows made ahead"),
        ("dispatch_cached", "bf16", "window", "dispatch BF16, cached handle"),
        ("dispatch", "fp8", "window", "dispatch FP8"), ("dispatch_ahead", "fp8", "window", "dispatch FP8, rows made ahead"),
        ("dispatch_cached", "fp8", "window", "dispatch FP8, cached handle"),
        ("combine", "bf16", "caller", "combine, any tensor"), ("combine", "bf16", "window", "combine, library memory"))
PAIR_TOKENS = (1, 8, 32, 64, 128, 256, 512)
SMS, TOKENS, HIDDEN, TOPK, EXPERTS = 16, 4096, 7168, 8, 256


def read(paths):
    """The last record of every figure, GPU ranks only, right results only."""
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("gpu", "cpu:").startswith("cpu:") or record.get("wrong") or not record.get("us_p50"):
                continue
            if record["op"] in ("pattern", "ceiling", "agreement") or record.get("beside") or record.get("api") != "c++":
                continue
            if (record["hidden"], record["topk"], record["experts"]) != (HIDDEN, TOPK, EXPERTS):
                continue
            if not record["routing"].startswith("uniform"):
                continue
            key = tuple(record.get(name) for name in ("gpu", "count", "ranks", "op", "dtype", "memory", "mode", "tokens", "sms"))
            found[key] = record
    return list(found.values())


def command_of(record):
    """As a reader would type it: without what only says where files lie."""
    return re.sub(r" --(results|yardsticks|commit|seconds) \S+", "", record["command"])


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def cell(record, yard):
    if record is None:
        return "-"
    against = record.get(yard)
    return number(record["us_p50"]) + (f" ({record['us_p50'] / against:.2f})" if against else "")


def pick(records, **fields):
    found = [record for record in records if all(record.get(name) == value for name, value in fields.items())]
    return found[-1] if found else None


def peer(record):
    """Of the best peer; today's knowledge, which may be more than the record's."""
    if record is None:
        return "-"
    bar = (gpu_bars.high_throughput if record["kind"] == "ht" else gpu_bars.pair)(record, record["gpu"], record["count"])
    return number(bar.peer_us) if bar is not None and bar.peer_us else "-"


def table(groups, rows, corner=""):
    """Markdown: `rows` are (title, cells); `groups` the titles of the columns."""
    lines = [f"| {corner} | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    return lines + ["| " + title + " | " + " | ".join(cells) + " |" for title, cells in rows]


HIGH_TITLE = (f"Whole operations of the C++ API, {TOKENS} tokens per rank, hidden {HIDDEN}, top-{TOPK} of {EXPERTS}, uniform routing, "
              f"{SMS} SMs: us of the slowest rank, median; in brackets, over the same traffic without any protocol, by at most as many SMs "
              "in the same run. Beside it: the best of DeepEP V1 and V2 at any number of SMs, measured on GPUs of that kind, not in this "
              "run.")
DECODE_TITLE = ("Decode, dispatch + combine in a replayed graph, us per pair, FP8 / BF16 dispatch; in brackets, over two steps that push as "
                "many rows and do nothing else. Beside it: DeepEP, FP8.")


def high_lines(names, mine, shown):
    found = [[pick(of, kind="ht", tokens=TOKENS, sms=SMS, op=op, dtype=dtype, memory=memory) for of in mine]
             for op, dtype, memory, _ in HIGH]
    shown += [record for row in found for record in row if record]
    rows = [(title, [text for record in row for text in (cell(record, "pattern_us"), peer(record))])
            for (_, _, _, title), row in zip(HIGH, found) if any(row)]
    return table(names, rows) + [""] if rows else []


def decode_lines(names, mine, shown):
    rows = []
    for tokens in PAIR_TOKENS:
        both = [[pick(of, kind="ll", op="pair", mode="graph", tokens=tokens, dtype=dtype) for dtype in ("fp8", "bf16")] for of in mine]
        found = [record for pair in both for record in pair if record]
        shown += found
        if found:
            rows.append((f"{tokens}", [text for pair in both
                                       for text in (" / ".join(cell(one, "steps_us") for one in pair), peer(pair[0]))]))
    return table(names, rows, "tokens per rank") + [""] if rows else []


def text_of(records):
    """A table of each kind for every number of ranks and GPUs; in it a column for every kind of GPU."""
    if not records:
        return "Not measured yet."
    lines, shown = [], []
    for title, kind, lines_of in ((HIGH_TITLE, "ht", high_lines), (DECODE_TITLE, "ll", decode_lines)):
        tables, of_kind = [], [record for record in records if record["kind"] == kind]
        for count, ranks in sorted({(record["count"], record["ranks"]) for record in of_kind}):
            gpus = sorted({record["gpu"] for record in of_kind if (record["count"], record["ranks"]) == (count, ranks)})
            mine = [[record for record in of_kind if (record["gpu"], record["count"], record["ranks"]) == (gpu, count, ranks)]
                    for gpu in gpus]
            names = []
            for gpu, of in zip(gpus, mine):
                names += [f"{ranks} ranks on {count} x {gpu.removeprefix('NVIDIA ')}, {max(record['date'] for record in of)}",
                          "DeepEP there"]
            tables += lines_of(names, mine, shown)
        lines += [title, "", *tables] if tables else []
    runs = sorted({(record["date"], record["commit"][:10] + ("+dirty" if record["commit"].endswith("+dirty") else ""),
                    f"driver {record['driver']}", f"CUDA {record['cuda']}", command_of(record)) for record in shown})
    lines += ["Measured: " + "; ".join(f"{date}, {commit}, {driver}, {cuda}, `{command}`" for date, commit, driver, cuda, command in runs)
              + ". Records with p99, spread and host times: [bench/results/](bench/results/); formulas: "
              "[bench/METRICS.md](bench/METRICS.md)."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", action="store_true", help="to standard output, README.md stays")
    arguments = parser.parse_args()
    text = text_of(read(arguments.files or sorted(RESULTS.glob("*.jsonl"))))
    if arguments.print:
        print(text)
        return
    old = README.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        sys.exit(f"README.md lacks the marks {BEGIN} and {END}")
    head, rest = old.split(BEGIN, 1)
    new = head + BEGIN + "\n" + text + "\n" + END + rest.split(END, 1)[1]
    if arguments.check:
        sys.exit(new != old)
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
