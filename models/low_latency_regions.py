#!/usr/bin/env python3
"""How many regions per (source, destination) does low latency need, and does it need credit words?

Exhaustive search over all interleavings. Ranks send and receive K turns in order, at most F sent and not yet received (hooks).
A plain turn writes, for each peer, rows into region (epoch mod B) and then the arrived mark, in two steps. A turn with weights
(combine without a hook) first writes weights into the first part of the same region and the asked mark, waits for every peer's
asked mark, reads its weights, and only then writes its rows. A receive waits for each source's arrived mark, then reads rows;
a read takes two steps and must find the turn's own data in both.

Masks: a wait may end by masking the peer (a timeout, or a rank that stays silent for ever); a masked peer is neither written
to nor waited for, and its turns are not read. Readmission starts from a turn that neither has begun to send:
  agreed      between two ops of both ranks, and each masks the other until that turn
  inside      the same, while the other rank may be inside an op (wrong: it may still be reading)
  one-sided   the other rank goes on counting the asker in until that turn (wrong: it takes that turn for an earlier one)
  local       one rank just forgets its mask (wrong)

Bad: a read finds another turn than its own (overwritten), or nobody can go on (deadlock).
"""
from collections import deque
from typing import NamedTuple

from cases import run_cases

IDLE, SENDING, RECEIVING = 0, 1, 2
NEVER = 99


class Case(NamedTuple):
    want: str
    ranks: int
    ops: int
    regions: int
    in_flight: int
    credit: bool = False
    weights: str = ""       # which turns carry weights: one letter per turn, repeated; w = with weights
    masks: bool = False     # a wait may end by masking the peer
    silent: bool = False    # the last rank stops after any step and says nothing
    readmit: str = ""       # agreed, inside, one-sided, local
    last: int = NEVER       # epochs run to `last` and go on at `first`
    first: int = 4

    def title(self):
        parts = [f"{self.regions} regions, {self.in_flight} in flight, N{self.ranks} K{self.ops}"]
        parts += [text for said, text in (
            (self.credit, "credit"), (self.weights, f"turns {self.weights}"), (self.masks, "masks"),
            (self.silent, "a silent rank"), (self.readmit, f"{self.readmit} readmission"),
            (self.last != NEVER, f"epochs wrap to {self.first}")) if said]
        return ", ".join(parts)


class Rank(NamedTuple):
    sent: int = 0
    received: int = 0
    doing: int = IDLE
    step: int = 0
    reading: bool = False


class State(NamedTuple):
    ranks: tuple
    rows: tuple             # [to][from][region] turn whose rows lie there
    weights: tuple          # likewise
    arrived: tuple          # [to][from] last turn announced
    asked: tuple
    masked: tuple           # [by][peer] first turn in which the peer counts again
    silent: bool = False


def put(values, index, value):
    return values[:index] + (value,) + values[index + 1:]


class Search:
    def __init__(self, case):
        self.c = case
        n = case.ranks
        self.start = State((Rank(),) * n, (0,) * (n * n * case.regions), (0,) * (n * n * case.regions), (0,) * (n * n),
                           (0,) * (n * n), (0,) * (n * n))

    def region(self, to, source, turn):
        c = self.c
        epoch = turn if turn <= c.last else turn - c.last - 1 + c.first
        return (to * c.ranks + source) * c.regions + epoch % c.regions

    def program(self, me, turn):
        """The steps of a send, as (what, peer)."""
        c = self.c
        peers = [p for p in range(c.ranks) if p != me]
        weighted = c.weights and c.weights[(turn - 1) % len(c.weights)] == "w"
        ask = [(what, p) for p in peers for what in ("weights", "ask")] + [("read weights", p) for p in peers]
        return (ask if weighted else []) + [(what, p) for p in peers for what in ("rows", "arrive")]

    def moves(self, s):
        """Next states; None for a state in which a read went wrong."""
        for me in range(self.c.ranks):
            if s.silent and me == self.c.ranks - 1:
                continue
            yield from self.moves_of(s, me)
        if self.c.silent and not s.silent:
            yield s._replace(silent=True)
        if self.c.readmit:
            yield from self.readmissions(s)

    def moves_of(self, s, me):
        c, r = self.c, s.ranks[me]
        if r.doing == IDLE:
            if r.sent < c.ops and r.sent - r.received < c.in_flight:
                yield self.with_rank(s, me, r._replace(doing=SENDING, step=0))
            if r.received < r.sent:
                yield self.with_rank(s, me, r._replace(doing=RECEIVING, step=0))
        elif r.doing == SENDING:
            yield from self.send_step(s, me, r)
        else:
            yield from self.receive_step(s, me, r)

    def with_rank(self, s, me, rank):
        return s._replace(ranks=put(s.ranks, me, rank))

    def after(self, s, me, r, last):
        """s, with rank me one step further."""
        if not last:
            return self.with_rank(s, me, r._replace(step=r.step + 1, reading=False))
        if r.doing == SENDING:
            return self.with_rank(s, me, Rank(r.sent + 1, r.received))
        return self.with_rank(s, me, Rank(r.sent, r.received + 1))

    def send_step(self, s, me, r):
        c, turn = self.c, r.sent + 1
        program = self.program(me, turn)
        what, peer = program[r.step]
        last = r.step + 1 == len(program)
        if turn < s.masked[me * c.ranks + peer] and not r.reading:
            yield self.after(s, me, r, last)
            return
        there, word = self.region(peer, me, turn), peer * c.ranks + me
        if what in ("rows", "weights") and c.credit and turn > c.regions and s.ranks[peer].received < turn - c.regions:
            return
        if what == "weights":
            yield self.after(s._replace(weights=put(s.weights, there, turn)), me, r, last)
        elif what == "ask":
            yield self.after(s._replace(asked=put(s.asked, word, turn)), me, r, last)
        elif what == "rows":
            yield self.after(s._replace(rows=put(s.rows, there, turn)), me, r, last)
        elif what == "arrive":
            yield self.after(s._replace(arrived=put(s.arrived, word, turn)), me, r, last)
        else:
            yield from self.wait(s, me, r, peer, turn, s.asked, s.weights, last)

    def receive_step(self, s, me, r):
        c, turn = self.c, r.received + 1
        peers = [p for p in range(c.ranks) if p != me]
        peer, last = peers[r.step], r.step + 1 == len(peers)
        if turn < s.masked[me * c.ranks + peer] and not r.reading:
            yield self.after(s, me, r, last)
            return
        yield from self.wait(s, me, r, peer, turn, s.arrived, s.rows, last)

    def wait(self, s, me, r, peer, turn, marks, data, last):
        c, at = self.c, me * self.c.ranks + peer
        if r.reading or marks[at] >= turn:
            right = data[self.region(me, peer, turn)] == turn
            following = self.after(s, me, r, last) if r.reading else self.with_rank(s, me, r._replace(reading=True))
            yield following if right else None
        elif c.masks:
            yield self.after(s._replace(masked=put(s.masked, at, NEVER)), me, r, last)

    def readmissions(self, s):
        c = self.c
        for a in range(c.ranks):
            for b in range(c.ranks):
                ab, ba = a * c.ranks + b, b * c.ranks + a
                if a == b or s.masked[ab] != NEVER or s.ranks[a].doing != IDLE:
                    continue
                if c.readmit == "local":
                    yield s._replace(masked=put(s.masked, ab, 0))
                elif c.readmit != "agreed" or s.ranks[b].doing == IDLE:
                    turn = max(r.sent + 1 + (r.doing == SENDING) for r in (s.ranks[a], s.ranks[b]))
                    both = c.readmit != "one-sided" or s.masked[ba] == NEVER
                    masked = put(s.masked, ab, turn)
                    yield s._replace(masked=put(masked, ba, turn) if both else masked)

    def ended(self, s):
        ranks = s.ranks[:-1] if s.silent else s.ranks
        return all(r[:3] == (self.c.ops, self.c.ops, IDLE) for r in ranks)

    def run(self):
        seen, queue = {self.start}, deque([self.start])
        while queue:
            s = queue.popleft()
            stuck = True
            for state in self.moves(s):
                if state is None:
                    return "overwritten", len(seen)
                stuck = False
                if state not in seen:
                    seen.add(state)
                    queue.append(state)
            if stuck and not self.ended(s):
                return "deadlock", len(seen)
        return "ok", len(seen)


CASES = [
    Case("ok", 2, 8, 2, 1), Case("overwritten", 2, 6, 1, 1),
    Case("overwritten", 2, 8, 2, 2), Case("overwritten", 2, 8, 3, 2), Case("ok", 2, 8, 4, 2), Case("ok", 3, 5, 4, 2),
    Case("ok", 2, 8, 2, 2, credit=True),  # right too, but here a send waits for a slow peer's hook
    Case("overwritten", 2, 8, 4, 3),
    Case("ok", 2, 8, 4, 2, weights="-w"), Case("ok", 2, 8, 4, 2, weights="w"), Case("overwritten", 2, 8, 2, 2, weights="--w"),
    Case("ok", 2, 6, 4, 2, last=3, first=4), Case("overwritten", 2, 8, 4, 2, last=7, first=9),
    Case("deadlock", 2, 2, 4, 2, silent=True), Case("ok", 2, 6, 4, 2, masks=True, silent=True),
    Case("ok", 2, 6, 4, 2, masks=True, weights="-w"),
    Case("overwritten", 2, 6, 3, 2, masks=True),
    Case("ok", 2, 5, 4, 2, masks=True, readmit="agreed"), Case("overwritten", 2, 8, 4, 2, masks=True, readmit="inside"),
    Case("overwritten", 2, 6, 4, 2, masks=True, readmit="one-sided"), Case("overwritten", 2, 6, 4, 2, masks=True, readmit="local"),
]


if __name__ == "__main__":
    raise SystemExit(run_cases("regions", CASES, Search))
