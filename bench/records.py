"""What every benchmark of this folder shares: statistics over process starts, and the records in bench/results/.

METRICS.md has the formulas. A *line* is what one process start says of one figure: a dict with `us` (microseconds of the
slowest rank, one number per iteration), `wrong`, and what the figure is about.
"""
import datetime
import json
import math
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SHAPE_FIELDS = ("tokens", "hidden", "topk", "experts", "ranks")


def median(values):
    return statistics.median(values) if values else 0.0


def nearest_rank(values, percent):
    ordered = sorted(values)
    return ordered[max(1, math.ceil(percent / 100 * len(ordered))) - 1] if ordered else 0.0


def spread(values):
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


class Figure:
    """One figure over all process starts."""

    def __init__(self, first):
        self.about = first
        self.starts = []

    def add(self, line):
        self.starts.append(line)

    @property
    def medians(self):
        return [median(line["us"]) for line in self.starts]

    @property
    def p50(self):
        return median(self.medians)

    @property
    def pooled(self):
        return [us for line in self.starts for us in line["us"]]

    @property
    def p99(self):
        return nearest_rank(self.pooled, 99)

    @property
    def iterations(self):
        return sum(len(line["us"]) for line in self.starts)

    @property
    def wrong(self):
        return sum(line["wrong"] for line in self.starts)


def revision():
    def git(*words):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()
    commit = git("rev-parse", "HEAD") or "unknown"
    # Results that this run appends do not make the measured program another one.
    dirty = [line for line in git("status", "--porcelain").splitlines() if "bench/results/" not in line]
    return commit + ("+dirty" if dirty else "")


def rounded(value, digits=4):
    return None if value is None else round(value, digits)


def rates(figure, p50, ceiling):
    """(wire GB/s, logical GB/s, ratio, share); None where the figure moves no rows worth a rate."""
    about = figure.about
    if "row_bytes" not in about:
        return None, None, None, None
    wire = about["wire_rows"] * about["row_bytes"] / p50 * 1e-3
    logical = about["logical_rows"] * about["row_bytes"] / p50 * 1e-3
    return wire, logical, wire / ceiling if ceiling else None, logical / ceiling if ceiling else None


def this_machine():
    """What lines say of the machine, in the words of bench/support/machine.h. Ask before a rank is bound to a core."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "kernel": f"{platform.system()} {platform.release()}"}


def gpus():
    """Names of this machine's GPUs, and the driver's version. Ends the program with status 2 where there are none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which("nvidia-smi") else None
    if done is None or done.returncode != 0 or not done.stdout.strip():
        print("needs GPUs: nvidia-smi finds none", file=sys.stderr)
        sys.exit(2)
    lines = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [name for name, _ in lines], lines[0][1]


def base_record(about, commit):
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"date": today, "gpu": "cpu:" + about["cpu"], "count": about["cores"], "driver": about["kernel"],
            "cuda": None, "commit": commit}


def write(records, folder, topic):
    model = re.sub(r"[^a-z0-9]+", "-", records[0]["gpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{records[0]['date']}-{model}-x{records[0]['count']}-{topic}.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    return path


def verdict(record):
    if record.get("wrong"):
        return f"WRONG ({record['wrong']} elements)"
    return {True: "ok", False: "MISSED"}.get(record.get("pass"), "")


def print_end(records, commit, path, wrong):
    """The last lines of a run."""
    if path is not None:
        print(f"recorded: {os.path.relpath(path)}")
        if commit.endswith("+dirty"):
            print("the working tree differs from the commit: this record may not be quoted")
    met, missed = (sum(record.get("pass") is value for record in records) for value in (True, False))
    print(f"{met} bars met, {missed} missed, {wrong} wrong elements")
