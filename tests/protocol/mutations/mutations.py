#!/usr/bin/env python3
"""The list of mistakes that the protocol tests catch; see ../run_mutations.sh.

A mistake is a few replacements in a copy of src/protocol. Each text to replace must occur exactly once: when the headers
change, this list changes with them. Mistakes of order are looked for by ThreadSanitizer, since x86 hides them."""
import argparse
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[3]
PROTOCOL = ROOT / "src" / "protocol"
STRESS = pathlib.Path(__file__).resolve().with_name("stress.cc")
SEEDS = range(1, 9)
WAIT_LIMIT_S, RUN_LIMIT_S = 3, 8           # of a mutant; unchanged headers get ten times as long
SCENARIOS = ["Limit", "Abort", "AbortAtAnyTime", "Gone", "PublishedThenGone", "Masked", "AnotherCall", "Announced",
             "AnotherGeneration", "Ahead", "Behind", "FirstRecordWins",
             "SecondLook", "RingBeforeSleep", "RingsAfterPublishing", "ring", "ring-of-one", "ring-side-by-side",
             "single-turns", "moving", "offered", "counts", "barrier", "regions", "sleepers", "pace"]


class Mutation(NamedTuple):
    name: str
    scenario: str
    changes: tuple          # (header, text, replacement), ...
    thread_sanitizer: bool = False


def plain(name, scenario, *changes):
    return Mutation(name, scenario, changes)


def order(name, scenario, *changes):
    return Mutation(name, scenario, changes, True)


ARRIVED = "Shared(*end_.arrived).store(make_mark(generation_, *end_.last, code_), kRelease);"
CREDIT = "Shared(*end_.credit).store(make_mark(generation_, until, code_), kRelease);"
LAST_LOOK = "(void)Shared(word).load(kAcquire);"
FIRST_LOOK = "if (there(Shared(word).load(order))) return Ended::kReached;"
WAIT_CREDIT = "return wait(w, who, *end_.credit, make_mark(generation_, turn(), code_));"
MUTATIONS = [
    # Order
    order("arrived is stored relaxed", "ring", ("handoff.h", ARRIVED, ARRIVED.replace("kRelease", "kRelaxed"))),
    order("credit is stored relaxed, ring", "ring-side-by-side", ("handoff.h", CREDIT, CREDIT.replace("kRelease", "kRelaxed"))),
    order("credit is stored relaxed, rows that move", "moving", ("handoff.h", CREDIT, CREDIT.replace("kRelease", "kRelaxed"))),
    order("a wait ends without an acquire", "ring", ("wait.h", LAST_LOOK, LAST_LOOK.replace("kAcquire", "kRelaxed"))),
    order("the first look of a wait is relaxed", "ring", ("wait.h", FIRST_LOOK, FIRST_LOOK.replace("(order)", "(kRelaxed)"))),
    order("a look without waiting is relaxed", "ring",
          ("wait.h", "return reached(Shared(word).load(kAcquire), expected);",
           "return reached(Shared(word).load(kRelaxed), expected);")),
    order("a barrier is entered relaxed", "barrier",
          ("barrier.h", "Shared(word_at_peer).store(mark, kRelease);", "Shared(word_at_peer).store(mark, kRelaxed);")),
    order("the fault record is announced relaxed", "FirstRecordWins",
          ("fault.h", "Shared(record.ready).store(1, kRelease);", "Shared(record.ready).store(1, kRelaxed);")),
    # Handoff
    plain("rows are published before they are written", "ring",
          ("handoff.h", WAIT_CREDIT,
           "const Ended ended = wait(w, who, *end_.credit, make_mark(generation_, turn(), code_));\n"
           "    Shared(*end_.arrived).store(make_mark(generation_, turn(), code_), kRelease);\n"
           "    return ended;")),
    plain("credit is skipped, ring", "ring-side-by-side",
          ("handoff.h", WAIT_CREDIT, "(void)w, (void)who;\n    return Ended::kReached;"),
          ("handoff.h", "bool has_credit() const { return is_reached(*end_.credit, make_mark(generation_, turn(), code_)); }",
           "bool has_credit() const { return true; }")),
    plain("credit is skipped, rows that move", "moving",
          ("handoff.h", WAIT_CREDIT, "(void)w, (void)who;\n    return Ended::kReached;")),
    plain("credit for one region too many", "ring-side-by-side",
          ("handoff.h", "Producer::advance(*end_.last, regions);", "Producer::advance(*end_.last, regions + 1);")),
    plain("credit for one region too few", "ring-of-one",
          ("handoff.h", "Producer::advance(*end_.last, regions);", "Producer::advance(*end_.last, regions - 1);")),
    plain("the producer leaves while a region is still read", "offered",
          ("handoff.h", "make_mark(generation_, advance(*end_.last, regions), code_)",
           "make_mark(generation_, advance(*end_.last, regions - 1), code_)")),
    plain("the producer does not count its turns", "ring", ("handoff.h", "    *end_.last = turn();\n    Shared", "    Shared")),
    plain("the consumer does not count its turns", "ring", ("handoff.h", "void take() { *end_.last = turn(); }", "void take() {}")),
    plain("the producer does not ring", "RingsAfterPublishing",
          ("handoff.h", "// pattern A, litmus mp-sys\n    ring(*end_.peer_bell);", "// pattern A, litmus mp-sys")),
    plain("the producer rings before it publishes", "RingsAfterPublishing",
          ("handoff.h", ARRIVED, "ring(*end_.peer_bell);\n    " + ARRIVED),
          ("handoff.h", "// pattern A, litmus mp-sys\n    ring(*end_.peer_bell);", "")),
    plain("who enters a barrier does not ring", "RingsAfterPublishing",
          ("barrier.h", "visible behind the barrier\n  ring(peer_bell);", "visible behind the barrier\n  (void)peer_bell;")),
    plain("the consumer rings before it gives credit", "RingsAfterPublishing",
          ("handoff.h", CREDIT + "\n    ring(*end_.peer_bell);", "ring(*end_.peer_bell);\n    " + CREDIT)),
    plain("the consumer does not ring", "RingsAfterPublishing",
          ("handoff.h", CREDIT + "\n    ring(*end_.peer_bell);", CREDIT)),
    # Words
    plain("marks are compared by ==", "ring",
          ("word.h", "not_before(epoch_of(seen), epoch_of(expected));", "epoch_of(seen) == epoch_of(expected);")),
    plain("epochs are compared without regard to the wrap", "ring",
          ("word.h", "return static_cast<std::int32_t>(epoch - wanted) >= 0;", "return epoch >= wanted;")),
    plain("the generation is ignored", "AnotherGeneration",
          ("word.h", "return generation_of(seen) == generation_of(expected) && epoch_of(seen) != 0 &&",
           "return epoch_of(seen) != 0 &&")),
    plain("epochs wrap to 1: slots by parity", "counts", ("word.h", "epoch + 1 == 0 ? 4 :", "epoch + 1 == 0 ? 1 :")),
    plain("epochs wrap to 1: a ring of two", "ring-side-by-side", ("word.h", "epoch + 1 == 0 ? 4 :", "epoch + 1 == 0 ? 1 :")),
    plain("epochs wrap to 1: four regions", "regions", ("word.h", "epoch + 1 == 0 ? 4 :", "epoch + 1 == 0 ? 1 :")),
    # The wait
    plain("the abort word is not looked at", "Abort",
          ("wait.h", "  if (Shared(*w.abort).load(kRelaxed) != 0) return Ended::kAborted;\n", "")),
    plain("a wait that failed reports success", "Abort",
          ("wait.h", "give_up(w, who, expected, seen, ended);\n      break;",
           "give_up(w, who, expected, seen, ended);\n      ended = Ended::kReached;\n      break;")),
    plain("the clock is not looked at", "Limit",
          ("wait.h", "return now_ns() - w.start_ns > w.limit_ns ? Ended::kTimeout : Ended::kReached;", "return Ended::kReached;")),
    plain("a sleep has no limit", "Abort",
          ("doorbell.h", "FUTEX_WAIT, bell, &limit, nullptr, 0", "FUTEX_WAIT, bell, nullptr, nullptr, 0")),
    plain("a peer that is gone is not noticed", "Gone",
          ("wait.h", "  if (w.gone != nullptr && Shared(w.gone[who.peer])", "  if (false && Shared(w.gone[who.peer])")),
    plain("what a peer published before it left does not count", "PublishedThenGone",
          ("wait.h", "if (ended != Ended::kAborted && there(", "if (false && there(")),
    plain("a masked peer is waited for", "Masked",
          ("wait.h", "  if (w.masked != nullptr && Shared(", "  if (false && Shared(")),
    plain("a word of another call is accepted", "AnotherCall",
          ("wait.h", "return contradicts(last, expected) ? give_up(w, who, expected, last, Ended::kMismatch) : Ended::kReached;",
           "return contradicts(last, last) ? give_up(w, who, expected, last, Ended::kMismatch) : Ended::kReached;")),
    plain("announcements are not looked at", "Announced", ("wait.h", "if (w.announced != nullptr) {", "if (false) {")),
    plain("a second failure overwrites the record", "FirstRecordWins",
          ("fault.h", "  if (!Shared(record.claimed).claim(0, 1, kRelaxed)) return;\n",
           "  (void)Shared(record.claimed).claim(0, 1, kRelaxed);\n")),
    # Doorbell
    plain("no second look before sleeping", "SecondLook", ("doorbell.h", "if (!is_there()) {", "if (true) {")),
    plain("a sleeper does not register", "sleepers",
          ("doorbell.h", "Shared(doorbell.sleepers).fetch_add(1, kSequential);", "Shared(doorbell.sleepers).fetch_add(0, kSequential);"),
          ("doorbell.h", "fetch_add(~std::uint32_t{0}, kSequential)", "fetch_add(0u, kSequential)")),
    plain("a sleeper stays registered", "ring", ("doorbell.h", "fetch_add(~std::uint32_t{0}, kSequential)", "fetch_add(0u, kSequential)")),
    plain("the bell does not move", "RingBeforeSleep", ("doorbell.h", "Shared(doorbell.bell).fetch_add(1, kRelaxed);", "")),
    plain("nobody is woken", "sleepers", ("doorbell.h", "FUTEX_WAKE, INT32_MAX", "FUTEX_WAKE, 0")),
    plain("one sleeper is woken, perhaps the wrong one", "sleepers", ("doorbell.h", "FUTEX_WAKE, INT32_MAX", "FUTEX_WAKE, 1")),
    # Counts
    plain("one slot of counts", "counts", ("counts.h", "((epoch & 1u) * sources", "((epoch & 0u) * sources")),
    plain("any count is taken for this turn's", "counts",
          ("counts.h", "return count_epoch(seen) == epoch;", "return count_epoch(seen) != 0;")),
    plain("counts are not waited for", "counts", ("counts.h", "return count_epoch(seen) == epoch;", "return seen == seen;")),
]


def build(folder, thread_sanitizer):
    """Compiles the stress program against folder/protocol. Returns the compiler's complaints, empty when there are none."""
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++20", "-O1", "-w", "-pthread"] + (["-g1", "-fsanitize=thread"] if thread_sanitizer else [])
    paths = [f"-I{folder}", f"-I{ROOT / 'src'}", f"-I{ROOT / 'include'}", f"-I{ROOT / 'tests'}"]
    command = [*compiler, *flags, *paths, str(STRESS), "-o", str(folder / "stress")]
    return subprocess.run(command, capture_output=True, text=True).stderr


def play(folder, scenario, seed, thread_sanitizer, patience=1):
    """What caught it, or an empty text."""
    command = [str(folder / "stress"), scenario, str(seed), str(WAIT_LIMIT_S * patience)]
    if thread_sanitizer and shutil.which("setarch"):
        # Its shadow memory needs the address space laid out as the compilers of 2022 expect it.
        command = ["setarch", platform.machine(), "-R", *command]
    environment = dict(os.environ, TSAN_OPTIONS="halt_on_error=1 exitcode=66")
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S * patience, env=environment)
    except subprocess.TimeoutExpired:
        return f"did not end within {RUN_LIMIT_S * patience} s"
    if run.returncode == 0:
        return ""
    if run.returncode == 66:
        return next((line.removeprefix("WARNING: ") for line in run.stderr.splitlines() if "ThreadSanitizer" in line), "ThreadSanitizer")
    return run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit status {run.returncode}"


def check_mutation(mutation, work):
    folder = pathlib.Path(tempfile.mkdtemp(dir=work))
    shutil.copytree(PROTOCOL, folder / "protocol")
    for header, text, replacement in mutation.changes:
        path = folder / "protocol" / header
        source = path.read_text()
        if source.count(text) != 1:
            return False, f"{header} holds {source.count(text)} times: {text.strip()}"
        path.write_text(source.replace(text, replacement))
    complaints = build(folder, mutation.thread_sanitizer)
    if complaints:
        return False, "does not compile:\n" + complaints
    for seed in SEEDS:
        caught = play(folder, mutation.scenario, seed, mutation.thread_sanitizer)
        if caught:
            shutil.rmtree(folder)
            return True, f"{mutation.scenario}, seed {seed}: {caught}"
    shutil.rmtree(folder)
    return False, f"not caught by {mutation.scenario}, seeds {SEEDS.start} to {SEEDS.stop - 1}"


def check_unchanged(thread_sanitizer, work):
    """The headers as they are must pass what catches the mistakes."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=work))
    shutil.copytree(PROTOCOL, folder / "protocol")
    complaints = build(folder, thread_sanitizer)
    if complaints:
        return False, "does not compile:\n" + complaints
    for scenario in SCENARIOS:
        fault = play(folder, scenario, 1, thread_sanitizer, patience=10)
        if fault:
            return False, f"{scenario}, seed 1: {fault}"
    return True, "every scenario holds"


def main():
    parser = argparse.ArgumentParser(description="plants mistakes in the protocol headers and looks whether they are caught")
    parser.add_argument("names", nargs="*", help="only mistakes whose name holds one of these texts")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.names or any(name in m.name for name in args.names)]
    jobs = [(f"unchanged headers{' under ThreadSanitizer' if tsan else ''}", lambda work, tsan=tsan: check_unchanged(tsan, work))
            for tsan in (False, True)]
    jobs += [(m.name, lambda work, m=m: check_mutation(m, work)) for m in chosen]
    passed = 0
    workers = min(os.cpu_count() or 1, 4) + 2  # some mistakes just hang
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(max_workers=workers) as pool:
        for (name, _), (good, how) in zip(jobs, pool.map(lambda job: job[1](work), jobs)):
            passed += good
            print(f"{'pass' if good else 'FAIL'}  {name:<52} {how}", flush=True)
    print(f"{passed} passed, {len(jobs) - passed} failed")
    return passed != len(jobs)


if __name__ == "__main__":
    sys.exit(main())
