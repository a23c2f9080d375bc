#!/usr/bin/env python3
"""Runs the models; see run.sh.

Verdicts of spin: ok = all states visited, no fault; assertion = a checked property fails; deadlock = nobody can go on."""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent
SEARCHES = ["low_latency_regions.py", "readmission.py", "ptx_litmus.py", "ptx_litmus_mutants.py"]

# expected verdict, title, model, macros
MODELS = [
    # Handoff. Two regions are one ahead; with one thread per rank the peer's turn hides some faults, so those run by roles.
    ("ok", "handoff: push, one region", "handoff", "N=2 R=1"),
    ("ok", "handoff: push, ring of two, three turns", "handoff", "R=2 T=3 OPS=2"),
    ("ok", "handoff: push, ring of two, sending and collecting side by side", "handoff", "R=2 ROLES=1"),
    ("ok", "handoff: push, ring of two, N3", "handoff", "N=3 R=2 OPS=2"),
    ("ok", "handoff: push, two channels, ring of two", "handoff", "C=2 R=2"),
    ("ok", "handoff: push, three channels", "handoff", "C=3"),
    ("ok", "handoff: push, rows that move from op to op", "handoff", "MOVES=1 CREDIT_CODE"),
    ("ok", "handoff: the same, N3", "handoff", "N=3 MOVES=1 OPS=2"),
    ("ok", "handoff: the same, side by side", "handoff", "MOVES=1 ROLES=1"),
    ("ok", "handoff: push, rows that move, two turns ahead inside the op", "handoff", "MOVES=1 R=2 T=3"),
    ("ok", "handoff: pull, ring of one", "handoff", "PULL=1"),
    ("ok", "handoff: pull, ring of two, N3", "handoff", "PULL=1 R=2 N=3 OPS=2"),
    ("ok", "handoff: pull, caller's rows", "handoff", "PULL=1 MOVES=1"),
    ("ok", "handoff: pull, caller's rows, side by side", "handoff", "PULL=1 MOVES=1 ROLES=1"),
    ("ok", "handoff: ring of two, an offer record per region, ops of one turn", "handoff", "R=2 OFFERS=2 T=1 ROLES=1"),
    ("ok", "handoff: ring of two, an offer record per region, ops of two turns", "handoff", "R=2 OFFERS=2 ROLES=1"),
    ("ok", "handoff: rows that move, one offer record", "handoff", "MOVES=1 OFFERS=1 T=1 ROLES=1"),
    ("ok", "handoff: epochs wrap to a multiple of the ring", "handoff", "R=2 ROLES=1 WRAP_TO=2"),
    ("assertion", "handoff: arrived before the rows, push", "handoff", "EARLY_PUBLISH"),
    ("assertion", "handoff: arrived before the rows, pull", "handoff", "EARLY_PUBLISH PULL=1"),
    ("assertion", "handoff: arrived before the rows, ring of two", "handoff", "EARLY_PUBLISH R=2 ROLES=1"),
    ("assertion", "handoff: skipped credit, one region", "handoff", "SKIP_CREDIT"),
    ("assertion", "handoff: skipped credit, ring of two", "handoff", "SKIP_CREDIT R=2 ROLES=1"),
    ("assertion", "handoff: skipped credit, rows that move", "handoff", "SKIP_CREDIT MOVES=1 T=1"),
    ("assertion", "handoff: skipped credit, pull", "handoff", "SKIP_CREDIT PULL=1"),
    ("assertion", "handoff: credit for one region too many", "handoff", "OFF_BY_ONE"),
    ("assertion", "handoff: the same, ring of two", "handoff", "OFF_BY_ONE R=2 ROLES=1"),
    ("assertion", "handoff: credit before the rows are read", "handoff", "EARLY_CREDIT"),
    ("assertion", "handoff: the same, pull", "handoff", "EARLY_CREDIT PULL=1"),
    ("deadlock", "handoff: compared by ==, ring of two", "handoff", "EQUAL R=2"),
    ("deadlock", "handoff: the same, side by side", "handoff", "EQUAL R=2 ROLES=1"),
    ("assertion", "handoff: grant after the credit that covers it", "handoff", "GRANT_LATE MOVES=1"),
    ("assertion", "handoff: offer after the mark that covers it", "handoff", "GRANT_LATE MOVES=1 PULL=1"),
    ("assertion", "handoff: a replay that starts from turn one", "handoff", "FROM_ZERO"),
    ("assertion", "handoff: credit beyond the op that the grant belongs to", "handoff", "NO_CAP MOVES=1"),
    ("assertion", "handoff: the same, ring of two, one turn per op", "handoff", "NO_CAP MOVES=1 R=2 T=1"),
    ("assertion", "handoff: pull, the op ends with readers left", "handoff", "LEAVE_EARLY PULL=1 MOVES=1"),
    ("deadlock", "handoff: one thread sends every turn, then collects", "handoff", "ALL_SENDS_FIRST"),
    ("deadlock", "handoff: the same, ring of two, three turns", "handoff", "ALL_SENDS_FIRST R=2 T=3"),
    ("assertion", "handoff: ring of two, one offer record, ops of one turn", "handoff", "R=2 OFFERS=1 T=1"),
    ("assertion", "handoff: a ring's credit carries the code of the call", "handoff", "CREDIT_CODE"),
    ("assertion", "handoff: the same, pull", "handoff", "CREDIT_CODE PULL=1"),
    ("assertion", "handoff: epochs wrap to 1, ring of two", "handoff", "R=2 ROLES=1 WRAP_TO=1"),
    # Doorbell
    ("ok", "doorbell: no wake-up is lost, one thread", "doorbell", "S=1 K=4"),
    ("ok", "doorbell: no wake-up is lost, two threads", "doorbell", "S=2"),
    ("ok", "doorbell: with the limit on a sleep", "doorbell", "LIMIT=1"),
    ("deadlock", "doorbell: no second look", "doorbell", "NO_SECOND_LOOK"),
    ("ok", "doorbell: no second look, caught by the limit", "doorbell", "NO_SECOND_LOOK LIMIT=1"),
    ("deadlock", "doorbell: the writer reads the register before it publishes", "doorbell", "EARLY_READ"),
    ("deadlock", "doorbell: a wake that does not move the bell", "doorbell", "NO_RING"),
    ("deadlock", "doorbell: the bell is noted after the second look", "doorbell", "LATE_NOTE"),
    ("deadlock", "doorbell: one thread is woken, perhaps the wrong one", "doorbell", "WAKE_ONE"),
    # Counts
    ("ok", "counts: two slots by parity", "counts", "K=6"),
    ("ok", "counts: the same, N3", "counts", "N=3 K=3"),
    ("ok", "counts: epochs wrap to an even one", "counts", "LAST=3 FIRST=20"),
    ("deadlock", "counts: one slot", "counts", "SLOTS=1"),
    ("assertion", "counts: one slot, a later epoch accepted", "counts", "SLOTS=1 REACHED"),
    ("deadlock", "counts: two turns sent and unread", "counts", "IN_FLIGHT=2"),
    ("deadlock", "counts: epochs wrap from odd to odd", "counts", "LAST=3 FIRST=21"),
    # Close and memory
    ("ok", "close: every rank holds mappings of its own, N3", "close", "N=3"),
    ("ok", "close: the same, and ranks that do not wait to the end", "close", "N=3 LATE=1"),
    ("ok", "close: the same, and a rank is killed", "close", "N=3 DIES=1"),
    ("ok", "close: words in windows, doorbell after them, mappings of its own", "close", "N=3 RING=1"),
    ("ok", "close: the owner frees after all closing words, nothing follows a word", "close", "N=3 LIFE=0"),
    ("assertion", "close: the owner frees, and a doorbell is rung after the word", "close", "LIFE=0 RING=1"),
    ("assertion", "close: the owner frees, and does not wait to the end", "close", "LIFE=0 LATE=1"),
    ("assertion", "close: the owner frees because it is killed", "close", "LIFE=0 DIES=1"),
    ("assertion", "close: every hang-up is called a death", "close", "HANGUP_IS_DEATH"),
    ("assertion", "close: the word is not looked at again after the hang-up", "close", "LOOK_ONCE"),
    # Words without credit, masks, barriers, agreement
    ("ok", "flags: round number, two buffers, nothing cleaned, N3 K6", "low_latency_flags", "N=3 K=6 B=2 CLEAN=0"),
    ("deadlock", "flags: round number compared by ==, one buffer", "low_latency_flags", "N=3 K=4 B=1 CLEAN=0"),
    ("ok", "flags: binary, next buffer cleaned before the sends, N3 K4", "low_latency_flags", "N=3 K=4 B=2 CLEAN=1"),
    ("deadlock", "flags: binary, next buffer cleaned after the sends", "low_latency_flags", "N=3 K=4 B=2 CLEAN=2"),
    ("assertion", "flags: binary, one buffer", "low_latency_flags", "N=3 K=4 B=1 CLEAN=1"),
    ("ok", "masks: data stays right behind local timeouts, N3 K2", "local_masks", "N=3 K=2 FLAGS=0 CHECK=1"),
    ("assertion", "masks: do all ranks hold the same masks?", "local_masks", "N=3 K=2 FLAGS=0 CHECK=2"),
    ("assertion", "masks: local readmission, round-number flags", "local_masks", "N=3 K=4 FLAGS=0 CHECK=1 READMIT=1"),
    ("assertion", "masks: local readmission, binary flags", "local_masks", "N=3 K=4 FLAGS=1 CHECK=1 READMIT=1"),
    ("ok", "sum barrier, N3 K6: right, but names nobody", "sum_barrier", "N=3 K=6"),
    ("ok", "agreement: union, echo, keep listening, N3, 2 crashes", "agreement", "N=3 MAXF=2"),
    ("ok", "agreement: the same, N4, 2 crashes", "agreement", "N=4 MAXF=2"),
    ("assertion", "agreement: leave at the first commit", "agreement", "N=3 MAXF=2 SERVE=0"),
    ("assertion", "agreement: generation numbered by a local counter, N4", "agreement", "N=4 MAXF=2 LABEL=1"),
    ("ok", "agreement: one false suspicion, the excluded rank stops, N3", "agreement", "N=3 MAXF=1 FALSE=1"),
    ("assertion", "agreement: two false suspicions, nobody killed, N3", "agreement", "N=3 MAXF=2 FALSE=1"),
]

LONG_MODELS = [
    ("ok", "handoff: two channels, ring of two, side by side", "handoff", "C=2 R=2 ROLES=1"),
    ("ok", "handoff: push, ring of two, three turns, side by side", "handoff", "R=2 T=3 ROLES=1"),
    ("ok", "handoff: pull, caller's rows, N3, two channels", "handoff", "N=3 C=2 PULL=1 MOVES=1 OPS=2"),
    ("ok", "doorbell: no wake-up is lost, two threads, three turns", "doorbell", "S=2 K=3"),
    ("ok", "flags: round number, two buffers, N4 K3", "low_latency_flags", "N=4 K=3 B=2 CLEAN=0"),
    ("ok", "sum barrier, N4 K5", "sum_barrier", "N=4 K=5"),
    ("ok", "agreement: union, echo, keep listening, N4, 3 crashes", "agreement", "N=4 MAXF=3"),
    ("ok", "masks: data stays right, round-number flags, N3 K3", "local_masks", "N=3 K=3 FLAGS=0 CHECK=1"),
    ("ok", "masks: data stays right, binary flags, N3 K3", "local_masks", "N=3 K=3 FLAGS=1 CHECK=1"),
]


def verdict_of(output):
    fault = re.search(r"^pan:\d+: (assertion violated|invalid end state)", output, re.M)
    if fault:
        return "assertion" if fault[1].startswith("assertion") else "deadlock"
    if re.search(r"search not completed|max search depth too small|out of memory", output):
        return "incomplete"
    return "ok" if "errors: 0" in output else "unknown"


def check(model, work):
    """(passed, line) of one row of the table."""
    want, title, name, macros = model
    folder = pathlib.Path(tempfile.mkdtemp(dir=work))
    shutil.copy(HERE / f"{name}.pml", folder)
    # Ranks that listen for ever have no end state, and partial order reduction hides their interleavings.
    listens = name == "agreement"
    compiler = ["gcc", "-O1", "-w", "-DSAFETY", "-DCOLLAPSE"] + (["-DNOREDUCE"] if listens else [])
    steps = [["spin", "-a", *(f"-D{m}" for m in macros.split()), f"{name}.pml"], [*compiler, "-o", "pan", "pan.c"],
             ["./pan", *(["-E"] if listens else []), "-m400000", "-w22"]]
    output = ""
    for step in steps:
        run = subprocess.run(step, cwd=folder, capture_output=True, text=True)
        output = run.stdout + run.stderr
        if run.returncode != 0:
            got = f"{step[0]} failed"
            break
    else:
        got = verdict_of(output)
    shutil.rmtree(folder)
    states = re.search(r"^ *([0-9.e+]+) states, stored", output, re.M)
    word = "pass" if got == want else f"FAIL (want {want})"
    note = "" if got in ("ok", "assertion", "deadlock") else "\n  " + output.strip().replace("\n", "\n  ")
    return got == want, f"{word:<5} {got:<10} {states[1] if states else '-':>9} states  {title}{note}"


def main():
    parser = argparse.ArgumentParser(description="runs every protocol model")
    parser.add_argument("--full", action="store_true", help="the long models too")
    args = parser.parse_args()
    passed = failed = 0
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 4)) as pool:
        searches = [pool.submit(subprocess.run, [sys.executable, HERE / name], capture_output=True, text=True)
                    for name in SEARCHES]
        for good, line in pool.map(lambda model: check(model, work), MODELS + (LONG_MODELS if args.full else [])):
            print(line, flush=True)
            passed, failed = passed + good, failed + (not good)
        for name, search in zip(SEARCHES, searches):
            run = search.result()
            print(run.stdout, end="")
            words = [line[:4] for line in run.stdout.splitlines()]
            bad = words.count("FAIL")
            if run.returncode != 0 and bad == 0:
                print(f"FAIL  {name} ended with {run.returncode}\n{run.stderr}")
                bad = 1
            passed, failed = passed + words.count("pass"), failed + bad
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
