#!/usr/bin/env python3
"""Decides small litmus tests of the PTX memory model by brute force.

A test is a handful of threads with a few operations each, and one bad outcome. The checker enumerates every
reads-from choice, every order of the sequentially consistent fences and every per-location coherence order, drops the
executions that break an axiom, and says whether the bad outcome survives ("ALLOWED") or not ("forbidden").

The axioms are transcribed from the PTX ISA, chapter "Memory Consistency Model": moral strength, release and acquire
patterns, observation order, base causality and causality order; then the axioms of coherence, Fence-SC, atomicity and
causality. A location is one naturally aligned scalar of at most 64 bits.

Not modelled: proxies (bulk copies, texture, aliases, multicast), cluster scope, mixed sizes, dependencies,
two weak writes that race with each other (coherence is taken as total per location), hardware.

    ptx_litmus.py              run all tests; exit status 0 if every verdict is as expected
    ptx_litmus.py --list       names only
    ptx_litmus.py NAME...      run these
"""
import argparse
import itertools
import sys

SCOPES = {"cta": 0, "gpu": 1, "sys": 2}


class Event:
    """One operation: W write, R read, U read-modify-write, F fence, B bar.sync."""

    def __init__(self, kind, loc=None, value=None, sem="weak", scope=None, reg=None, barrier=None):
        self.kind, self.loc, self.value, self.sem, self.scope, self.reg, self.barrier = kind, loc, value, sem, scope, reg, barrier
        self.init = False
        self.thread = self.gpu = self.cta = self.position = self.index = None


def st(loc, value, sem="weak", scope=None):
    return Event("W", loc, value, sem, scope)


def ld(reg, loc, sem="weak", scope=None):
    return Event("R", loc, None, sem, scope, reg)


def red(loc, add, sem="relaxed", scope="sys"):
    """Reduction: adds, returns nothing; its read forms no acquire pattern."""
    return Event("U", loc, add, sem, scope)


def atom(reg, loc, add, sem="relaxed", scope="sys"):
    """Atomic add that returns the old value."""
    return Event("U", loc, add, sem, scope, reg)


def fence(sem="acq_rel", scope="sys"):
    return Event("F", None, None, sem, scope)


def bar(number=0):
    """bar.sync (or __syncwarp) among the threads of one CTA."""
    return Event("B", barrier=number)


def closure(rows):
    """Transitive closure of a relation given as one bit mask per event."""
    for k in range(len(rows)):
        for i in range(len(rows)):
            if rows[i] >> k & 1:
                rows[i] |= rows[k]
    return rows


def bits(mask):
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def allowed(threads, bad):
    """threads: list of (gpu, cta, [events]); bad(registers) -> bool. True if a bad outcome is possible."""
    events = []
    for number, (gpu, cta, program) in enumerate(threads):
        for position, e in enumerate(program):
            e.thread, e.gpu, e.cta, e.position = number, gpu, (gpu, cta), position
            events.append(e)
    locations = sorted({e.loc for e in events if e.loc})
    inits = []
    for loc in locations:
        w = Event("W", loc, 0, "relaxed", "sys")
        w.init, w.thread, w.position = True, -1, -1
        inits.append(w)
    every = inits + events
    n = len(every)
    for i, e in enumerate(every):
        e.index = i

    writes = [e for e in every if e.kind in "WU"]
    reads = [e for e in events if e.kind in "RU"]
    fences = [e for e in events if e.kind == "F"]
    sc_fences = [f for f in fences if f.sem == "sc"]

    def program_order(a, b):
        return (a.init and not b.init) or (a.thread == b.thread and a.position < b.position)

    def strong(e):
        return e.kind == "F" or (e.kind in "WRU" and e.sem != "weak")

    def covers(a, b):
        """The scope of a includes the thread of b."""
        if a.init or b.init:
            return True
        s = SCOPES[a.scope]
        return s == 2 or (s == 1 and a.gpu == b.gpu) or (s == 0 and a.cta == b.cta)

    def morally_strong(a, b):
        if a is b or (a.loc and b.loc and a.loc != b.loc):
            return False
        return a.thread == b.thread or (strong(a) and strong(b) and covers(a, b) and covers(b, a))

    def releases(e):
        return e.kind in "WU" and e.sem in ("release", "acq_rel")

    def acquires(e):
        return e.kind in "RU" and e.sem in ("acquire", "acq_rel")

    # A release pattern is (its first operation, the write); an acquire pattern is (the read, its last operation).
    release_patterns, acquire_patterns = [], []
    for w in writes:
        if w.init or not strong(w):
            continue
        if releases(w):
            release_patterns.append((w, w))
        release_patterns += [(r, w) for r in writes if releases(r) and r is not w and r.loc == w.loc and program_order(r, w)]
        release_patterns += [(f, w) for f in fences if program_order(f, w)]
    for r in reads:
        if not strong(r):
            continue
        if acquires(r):
            acquire_patterns.append((r, r))
        if r.kind == "U" and r.reg is None:
            continue
        acquire_patterns += [(r, a) for a in reads if acquires(a) and a is not r and a.loc == r.loc and program_order(r, a)]
        acquire_patterns += [(r, f) for f in fences if program_order(r, f)]

    order = [0] * n  # program order and barriers: the part of base causality that every execution shares
    for a in every:
        for b in every:
            same_barrier = a.kind == b.kind == "B" and a is not b and a.cta == b.cta and a.barrier == b.barrier
            if program_order(a, b) or same_barrier:
                order[a.index] |= 1 << b.index

    def value_of(w, source):
        return w.value if w.kind == "W" else w.value + value_of(source[w.index], source)

    def well_founded(source):
        for r in reads:
            seen, w = set(), r
            while w.kind == "U":
                if w.index in seen:
                    return False
                seen.add(w.index)
                w = source[w.index]
        return True

    for choice in itertools.product(*[[w for w in writes if w.loc == r.loc and w is not r] for r in reads]):
        source = {r.index: w for r, w in zip(reads, choice)}
        if not well_founded(source):
            continue
        if not bad({r.reg: value_of(source[r.index], source) for r in reads if r.reg}):
            continue

        observed = [0] * n
        for r in reads:
            if morally_strong(source[r.index], r):
                observed[source[r.index].index] |= 1 << r.index
        changed = True
        while changed:  # through read-modify-writes
            changed = False
            for i in range(n):
                for z in reads:
                    if z.kind == "U" and observed[i] >> z.index & 1 and observed[i] | observed[z.index] != observed[i]:
                        observed[i] |= observed[z.index]
                        changed = True

        for sc_order in itertools.permutations(sc_fences):
            base = list(order)
            for i, a in enumerate(sc_order):
                for b in sc_order[i + 1:]:
                    if morally_strong(a, b):
                        base[a.index] |= 1 << b.index
            for first, w in release_patterns:
                for r, last in acquire_patterns:
                    if observed[w.index] >> r.index & 1 and morally_strong(first, last):
                        base[first.index] |= 1 << last.index
            base = closure(base)
            if any(base[f.index] >> f.index & 1 for f in fences):  # Fence-SC contradicts causality
                continue
            cause = list(base)
            for i in range(n):
                for k in bits(observed[i]):
                    cause[i] |= base[k]
            if some_coherence_order(locations, inits, writes, reads, source, cause, morally_strong):
                return True
    return False


def some_coherence_order(locations, inits, writes, reads, source, cause, morally_strong):
    """Is there a coherence order that satisfies the axioms of coherence, causality and atomicity?"""

    def causes(a, b):
        return cause[a.index] >> b.index & 1

    orders = [itertools.permutations([w for w in writes if w.loc == loc and not w.init]) for loc in locations]
    for choice in itertools.product(*orders):
        place = {w.index: 0 for w in inits}
        for row in choice:
            place.update({w.index: i + 1 for i, w in enumerate(row)})

        def legal():
            for a in writes:
                for b in writes:
                    if a is not b and a.loc == b.loc and causes(a, b) and place[a.index] >= place[b.index]:
                        return False
            for r in reads:
                w = source[r.index]
                if causes(r, w):
                    return False
                for later in writes:
                    if later is not r and later.loc == r.loc and place[later.index] > place[w.index] and causes(later, r):
                        return False
                if r.kind == "U" and morally_strong(r, w) and place[r.index] != place[w.index] + 1:
                    return False
            return True

        if legal():
            return True
    return False


TESTS = {}


def test(name, expected, text, threads, bad):
    assert name not in TESTS and expected in ("ALLOWED", "forbidden")
    TESTS[name] = (expected, text, threads, bad)


def stale(r):
    return r["f"] == 1 and r["x"] == 0


ACQ, REL, RLX, GPU, SYS = "acquire", "release", "relaxed", "gpu", "sys"
SEND = lambda: [st("x", 1), st("f", 1, REL, SYS)]

# Message passing between GPUs (0 sends, 1 receives); the host counts as one more GPU.
test("mp-sys", "forbidden", "weak data; st.release.sys flag || ld.acquire.sys flag; weak read",
     [(0, 0, SEND()), (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], stale)
test("mp-gpu-scope", "ALLOWED", "the same at .gpu scope",
     [(0, 0, [st("x", 1), st("f", 1, REL, GPU)]), (1, 0, [ld("f", "f", ACQ, GPU), ld("x", "x")])], stale)
test("mp-scope-mismatch", "ALLOWED", "release.sys answered by acquire.gpu",
     [(0, 0, SEND()), (1, 0, [ld("f", "f", ACQ, GPU), ld("x", "x")])], stale)
test("mp-cta-release", "forbidden", "other threads of the CTA write, bar.sync, one thread releases",
     [(0, 0, [st("x", 1), bar()]), (0, 0, [bar(), st("f", 1, REL, SYS)]), (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], stale)
test("mp-cta-release-no-bar", "ALLOWED", "the same without the bar.sync",
     [(0, 0, [st("x", 1)]), (0, 0, [st("f", 1, REL, SYS)]), (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], stale)
test("mp-cta-acquire", "forbidden", "one thread acquires, bar.sync, other threads of its CTA read",
     [(0, 0, SEND()), (1, 0, [ld("f", "f", ACQ, SYS), bar()]), (1, 0, [bar(), ld("x", "x")])], stale)
test("mp-poll-fence", "forbidden", "relaxed (or volatile) poll, then fence.acq_rel.sys",
     [(0, 0, SEND()), (1, 0, [ld("f", "f", RLX, SYS), fence(), ld("x", "x")])], stale)
test("mp-poll-acquire", "forbidden", "relaxed poll, then one ld.acquire.sys of the same word",
     [(0, 0, SEND()), (1, 0, [ld("p", "f", RLX, SYS), ld("f", "f", ACQ, SYS), ld("x", "x")])], lambda r: r["p"] == 1 and r["x"] == 0)
test("mp-poll-acquire-later", "forbidden", "the same when the acquire already reads a later writer's value",
     [(0, 0, SEND()), (2, 0, [ld("q", "f", RLX, SYS), st("f", 2, RLX, SYS)]), (1, 0, [ld("p", "f", RLX, SYS), ld("f", "f", ACQ, SYS), ld("x", "x")])],
     lambda r: r["q"] == 1 and r["p"] == 1 and r["f"] == 2 and r["x"] == 0)
test("mp-poll-no-fence", "ALLOWED", "relaxed (or volatile) poll and no fence",
     [(0, 0, SEND()), (1, 0, [ld("f", "f", RLX, SYS), ld("x", "x")])], stale)
test("mp-poll-bar-only", "ALLOWED", "relaxed poll, bar.sync, other threads read: bar.sync acquires nothing from a peer",
     [(0, 0, SEND()), (1, 0, [ld("f", "f", RLX, SYS), bar()]), (1, 0, [bar(), ld("x", "x")])], stale)
test("mp-fence-flag", "forbidden", "fence.acq_rel.sys; st.relaxed.sys flag",
     [(0, 0, [st("x", 1), fence(), st("f", 1, RLX, SYS)]), (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], stale)
test("mp-fence-gpu-scope", "ALLOWED", "fence.acq_rel.gpu before a .sys flag",
     [(0, 0, [st("x", 1), fence("acq_rel", GPU), st("f", 1, RLX, SYS)]), (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], stale)
test("mp-weak-flag", "ALLOWED", "fence.acq_rel.sys, but the flag is a plain store",
     [(0, 0, [st("x", 1), fence(), st("f", 1)]), (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], stale)

# Two hops: a counter among the CTAs of the sender, then one flag to the peer.
test("two-hop", "forbidden", "release.gpu / acquire.gpu among CTAs, then release.sys to the peer",
     [(0, 0, [st("x", 1), red("h", 1, REL, GPU)]), (0, 1, [ld("h", "h", ACQ, GPU), st("f", 1, REL, SYS)]),
      (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], lambda r: r["h"] == 1 and stale(r))
test("two-hop-relaxed", "ALLOWED", "first hop relaxed (a plain atomicAdd)",
     [(0, 0, [st("x", 1), red("h", 1, RLX, GPU)]), (0, 1, [ld("h", "h", ACQ, GPU), st("f", 1, REL, SYS)]),
      (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x")])], lambda r: r["h"] == 1 and stale(r))
test("last-arriver", "forbidden", "every CTA does atom.acq_rel.gpu; the last one releases to the peer",
     [(0, 0, [st("x", 1), atom("a", "h", 1, "acq_rel", GPU)]), (0, 1, [st("y", 1), atom("b", "h", 1, "acq_rel", GPU), st("f", 1, REL, SYS)]),
      (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x"), ld("y", "y")])], lambda r: r["b"] == 1 and r["f"] == 1 and (r["x"] == 0 or r["y"] == 0))
test("last-arriver-relaxed", "ALLOWED", "the same with atom.relaxed.gpu",
     [(0, 0, [st("x", 1), atom("a", "h", 1, RLX, GPU)]), (0, 1, [st("y", 1), atom("b", "h", 1, RLX, GPU), st("f", 1, REL, SYS)]),
      (1, 0, [ld("f", "f", ACQ, SYS), ld("x", "x"), ld("y", "y")])], lambda r: r["b"] == 1 and r["f"] == 1 and (r["x"] == 0 or r["y"] == 0))
test("relay-sys", "forbidden", "GPU 1 acquires from GPU 0 and releases to GPU 2, which reads GPU 0's data",
     [(0, 0, SEND()), (1, 0, [ld("g", "f", ACQ, SYS), st("k", 1, REL, SYS)]), (2, 0, [ld("k", "k", ACQ, SYS), ld("x", "x")])],
     lambda r: r["g"] == 1 and r["k"] == 1 and r["x"] == 0)

# Counters that several GPUs add to.
test("counter-release", "forbidden", "two GPUs red.release.sys +1, receiver acquires the sum 2",
     [(0, 0, [st("x", 1), red("c", 1, REL, SYS)]), (2, 0, [st("y", 1), red("c", 1, REL, SYS)]),
      (1, 0, [ld("c", "c", ACQ, SYS), ld("x", "x"), ld("y", "y")])], lambda r: r["c"] == 2 and (r["x"] == 0 or r["y"] == 0))
test("counter-relaxed", "ALLOWED", "the same with red.relaxed",
     [(0, 0, [st("x", 1), red("c", 1, RLX, SYS)]), (1, 0, [ld("c", "c", ACQ, SYS), ld("x", "x")])], lambda r: r["c"] == 1 and r["x"] == 0)
test("atom-unique", "forbidden", "two GPUs atom.relaxed.sys +1 and both get 0",
     [(0, 0, [atom("a", "c", 1)]), (1, 0, [atom("b", "c", 1)])], lambda r: r["a"] == 0 and r["b"] == 0)
test("atom-then-fence", "forbidden", "atom.relaxed reads the flag, fence.acq_rel.sys, weak read",
     [(0, 0, SEND()), (1, 0, [atom("f", "f", 0, RLX, SYS), fence(), ld("x", "x")])], stale)
test("red-then-fence", "ALLOWED", "red touches the flag word, fence: a red acquires nothing",
     [(0, 0, SEND()), (1, 0, [red("f", 1, RLX, SYS), fence(), ld("x", "x")]), (2, 0, [ld("v", "f", RLX, SYS), ld("w", "f", RLX, SYS)])],
     lambda r: r["v"] == 1 and r["w"] == 2 and r["x"] == 0)

# Slot reuse: the reader frees a slot, the writer fills it again.
test("slot-reuse", "forbidden", "reader reads, st.release.sys ack; writer ld.acquire.sys ack, overwrites",
     [(1, 0, [ld("x", "x"), st("a", 1, REL, SYS)]), (0, 0, [ld("a", "a", ACQ, SYS), st("x", 2)])], lambda r: r["a"] == 1 and r["x"] == 2)
test("slot-reuse-relaxed", "ALLOWED", "the same with a relaxed ack",
     [(1, 0, [ld("x", "x"), st("a", 1, RLX, SYS)]), (0, 0, [ld("a", "a", RLX, SYS), st("x", 2)])], lambda r: r["a"] == 1 and r["x"] == 2)
test("slot-reuse-cta", "forbidden", "whole CTAs: reads, bar.sync, one ack || one acquire, bar.sync, overwrite",
     [(1, 0, [ld("x", "x"), bar()]), (1, 0, [bar(), st("a", 1, REL, SYS)]), (0, 0, [ld("a", "a", ACQ, SYS), bar()]), (0, 0, [bar(), st("x", 2)])],
     lambda r: r["a"] == 1 and r["x"] == 2)
test("slot-reuse-no-bar", "ALLOWED", "the ack does not wait for the other readers of the CTA",
     [(1, 0, [ld("x", "x")]), (1, 0, [st("a", 1, REL, SYS)]), (0, 0, [ld("a", "a", ACQ, SYS), st("x", 2)])], lambda r: r["a"] == 1 and r["x"] == 2)

test("write-order", "forbidden", "a write ordered behind another by a flag is never seen to be undone by it",
     [(0, 0, [st("x", 1, RLX, SYS), st("f", 1, REL, SYS)]), (1, 0, [ld("f", "f", ACQ, SYS), st("x", 2, RLX, SYS)]),
      (2, 0, [ld("r1", "x", RLX, SYS), ld("r2", "x", RLX, SYS)])], lambda r: r["f"] == 1 and r["r1"] == 2 and r["r2"] == 1)

# Data that carries its own flag.
test("word-is-flag", "forbidden", "a 64-bit strong scalar: seen new, then old",
     [(0, 0, [st("x", 1, RLX, SYS)]), (1, 0, [ld("r1", "x", RLX, SYS), ld("r2", "x", RLX, SYS)])], lambda r: r["r1"] == 1 and r["r2"] == 0)
test("word-is-flag-vector", "ALLOWED", "a 16-byte vector as two halves: second half old though the first is new",
     [(0, 0, [st("lo", 1, RLX, SYS), st("hi", 1, RLX, SYS)]), (1, 0, [ld("lo", "lo", RLX, SYS), ld("hi", "hi", RLX, SYS)])],
     lambda r: r["lo"] == 1 and r["hi"] == 0)

# Two-way checks ("I stop" against "are you stopping?").
test("two-way-acq-rel", "ALLOWED", "store my word, read yours, release and acquire only: both miss the other",
     [(0, 0, [st("a", 1, REL, SYS), ld("r1", "b", ACQ, SYS)]), (1, 0, [st("b", 1, REL, SYS), ld("r2", "a", ACQ, SYS)])],
     lambda r: r["r1"] == 0 and r["r2"] == 0)
test("two-way-sc", "forbidden", "the same with fence.sc.sys between",
     [(0, 0, [st("a", 1, RLX, SYS), fence("sc"), ld("r1", "b", RLX, SYS)]), (1, 0, [st("b", 1, RLX, SYS), fence("sc"), ld("r2", "a", RLX, SYS)])],
     lambda r: r["r1"] == 0 and r["r2"] == 0)


# The doorbell: a sleeper registers, notes the bell, looks at its word again; a writer publishes, then reads the register, then rings.
def missed(r):
    return r["word"] == 0 and r["register"] == 0


def slept(r):
    return r["word"] == 0 and r["register"] == 1 and r["bell"] == 1


ENTER, PEEK = lambda sem: atom("own", "s", 1, sem, SYS), lambda sem: atom("register", "s", 0, sem, SYS)
test("doorbell-rmw", "forbidden", "both sides use atom.acq_rel on the register: one of them sees the other",
     [(0, 0, [ENTER("acq_rel"), ld("word", "x", RLX, SYS)]), (1, 0, [st("x", 1, REL, SYS), PEEK("acq_rel")])], missed)
test("doorbell-rmw-relaxed", "ALLOWED", "the same with atom.relaxed",
     [(0, 0, [ENTER(RLX), ld("word", "x", ACQ, SYS)]), (1, 0, [st("x", 1, REL, SYS), PEEK(RLX)])], missed)
test("doorbell-load", "ALLOWED", "the writer reads the register by a load",
     [(0, 0, [ENTER("acq_rel"), ld("word", "x", ACQ, SYS)]), (1, 0, [st("x", 1, REL, SYS), ld("register", "s", ACQ, SYS)])], missed)
test("doorbell-note-first", "forbidden", "the bell is noted before registering: a ring already noted comes with its word",
     [(0, 0, [ld("bell", "b", RLX, SYS), ENTER("acq_rel"), ld("word", "x", RLX, SYS)]),
      (1, 0, [st("x", 1, REL, SYS), PEEK("acq_rel"), red("b", 1, RLX, SYS)])], slept)
test("doorbell-note-relaxed", "ALLOWED", "noted after registering, relaxed: the ring is noted, its word not yet seen",
     [(0, 0, [ENTER("acq_rel"), ld("bell", "b", RLX, SYS), ld("word", "x", RLX, SYS)]),
      (1, 0, [st("x", 1, REL, SYS), PEEK("acq_rel"), red("b", 1, RLX, SYS)])], slept)
test("doorbell-note-acquire", "forbidden", "noted after registering by an acquire of a release",
     [(0, 0, [ENTER("acq_rel"), ld("bell", "b", ACQ, SYS), ld("word", "x", RLX, SYS)]),
      (1, 0, [st("x", 1, REL, SYS), PEEK("acq_rel"), red("b", 1, REL, SYS)])], slept)


def main():
    parser = argparse.ArgumentParser(description="PTX litmus tests, generic proxy")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    parser.add_argument("names", nargs="*", help="tests to run (all)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in TESTS]
    if unknown:
        parser.error("no such test: " + ", ".join(unknown))
    if args.list:
        print("\n".join(TESTS))
        return 0
    wrong = 0
    for name in args.names or TESTS:
        expected, text, threads, bad = TESTS[name]
        verdict = "ALLOWED" if allowed(threads, bad) else "forbidden"
        wrong += verdict != expected
        print(f"{'pass' if verdict == expected else 'FAIL'}  {verdict:<9}  {name:<22} {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
