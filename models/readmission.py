#!/usr/bin/env python3
"""How two ranks that mask each other agree to count each other in again: the words of src/host/group_masks.cc.

Exhaustive search over all interleavings of two ranks. A rank begins and ends turns in order; between turns its caller asks the
peer, or masks it, which takes back what was asked or agreed. Each rank's watcher reads the peer's words at any time, in the order
sent. Words: ask -> offer -> confirm -> done, or another offer. Off: the question is closed, said by whoever masks meanwhile.

Bad: alone     a rank counts the peer in in a turn in which the peer leaves it out, though no caller masked again
     deadlock  nobody can go on
     forgotten no word is under way, and a rank waits for one, or a caller's question has come to nothing that was not taken back
"""
from collections import deque
from typing import NamedTuple

from cases import run_cases

ASK, OFFER, CONFIRM, DONE, OFF = "ask", "offer", "confirm", "done", "off"
OUTSIDE, WAITING, INSIDE = 0, 1, 2


class Case(NamedTuple):
    want: str
    turns: int
    asks: int               # by each caller
    masks: int              # likewise
    unordered: bool = False  # a question is written down first and sent later: the watcher's words may overtake it
    no_off: bool = False     # who masks does not close the peer's question
    no_answer: bool = False  # an offer for a question that was taken back is not answered
    no_wish: bool = False    # a caller's question beside an open one of the peer's is forgotten

    def title(self):
        parts = [f"{self.turns} turns, each caller asks {self.asks} and masks {self.masks}"]
        parts += [text for said, text in (
            (self.unordered, "words out of order"), (self.no_off, "masks unsaid"),
            (self.no_answer, "stale offers unanswered"), (self.no_wish, "wishes forgotten")) if said]
        return ", ".join(parts)


class Rank(NamedTuple):
    turn: int = 0
    where: int = OUTSIDE
    masked: bool = True
    question: int = 0
    theirs: int = 0
    their_turn: int = 0
    agreed: int = 0
    settled: bool = False
    wanted: bool = False
    questions: int = 0      # asked so far
    unsent: tuple = ()
    counted: tuple = ()     # [turn] the peer was counted in
    asks: int = 0           # left to the caller
    masks: int = 0
    wish: bool = False      # the caller's last word was a question, and it knows of no mask since


class State(NamedTuple):
    ranks: tuple
    words: tuple = ((), ())  # [to] on their way


class Bad(Exception):
    pass


def not_begun(rank, at_least):
    return at_least if at_least > rank.turn else rank.turn + 2


class Search:
    def __init__(self, case):
        self.c = case

    def moves(self, s):
        for me in (0, 1):
            yield from self.moves_of(s, me)

    def moves_of(self, s, me):
        r, peer = s.ranks[me], s.ranks[1 - me]
        if s.words[me]:
            yield self.hear(s, me)
        if r.unsent:  # the caller's thread is about to send
            yield self.state(s, me, r._replace(unsent=()), r.unsent)
            return
        if r.where == OUTSIDE:
            if r.turn < self.c.turns:
                yield self.state(s, me, self.lift(r._replace(turn=r.turn + 1, where=WAITING)))
            if r.asks:
                yield self.ask(s, me)
            if r.masks:
                taken_back = r._replace(masked=True, question=0, theirs=0, their_turn=0, agreed=0, settled=False, wanted=False,
                                        masks=r.masks - 1, wish=False)
                closed = [] if self.c.no_off or not r.theirs else [(OFF, 0, r.theirs)]
                ranks = [peer._replace(wish=False)] * 2
                yield self.state(s._replace(ranks=tuple(ranks)), me, taken_back, *closed)
        elif r.where == INSIDE:
            counts = r.counted[-1]
            if not counts:
                yield self.end(s, me, r)
            elif len(peer.counted) >= r.turn:
                if peer.counted[r.turn - 1]:
                    yield self.end(s, me, r)
                elif self.c.masks == 0:
                    raise Bad("alone")
                else:  # at its limit
                    yield self.end(s, me, r._replace(masked=True))

    def lift(self, r):
        """The begin of a turn, or what goes on when a word has come that it waited for."""
        if r.where != WAITING:
            return r
        if r.agreed and r.turn >= r.agreed:
            if not r.settled:
                return r
            r = r._replace(agreed=0, settled=False, masked=False, wish=False)  # no question is open: it is settled
        return r._replace(where=INSIDE, counted=r.counted + (not r.masked,))

    def end(self, s, me, r):
        return self.answer(s, me, r._replace(where=OUTSIDE))

    def answer(self, s, me, r):
        if not r.their_turn or r.where != OUTSIDE:
            return self.state(s, me, r)
        turn = not_begun(r, r.their_turn + 1)
        return self.state(s, me, r._replace(masked=True, agreed=0, settled=False, their_turn=0), (OFFER, turn, r.theirs))

    def ask(self, s, me):
        r = s.ranks[me]
        r = r._replace(asks=r.asks - 1, wish=r.masked)
        if not r.masked or r.question or r.agreed:
            return self.state(s, me, r)
        if r.theirs:
            return self.state(s, me, r._replace(wanted=not self.c.no_wish))
        r, word = self.question(me, r)
        return self.state(s, me, r._replace(unsent=word)) if self.c.unordered else self.state(s, me, r, word)

    @staticmethod
    def question(me, r):
        """Its number says who asks."""
        r = r._replace(wanted=False, questions=r.questions + 1, question=2 * (r.questions + 1) + me)
        return r, (ASK, r.turn + 1, r.question)

    def hear(self, s, me):
        (kind, turn, about), *rest = s.words[me]
        words = list(s.words)
        words[me] = tuple(rest)
        s = s._replace(words=tuple(words))
        r = s.ranks[me]
        if kind == ASK:
            if r.question and me == 0:  # when both ask, the lower rank's question counts
                return s
            wanted = not self.c.no_wish and (r.wanted or r.question != 0)
            return self.answer(s, me, self.lift(r._replace(question=0, theirs=about, their_turn=turn, agreed=0, settled=False,
                                                           wanted=wanted)))
        if kind == OFFER:
            if r.question != about:
                return s if self.c.no_answer else self.state(s, me, r, (OFF, turn, about))
            agreed = not_begun(r, turn)
            return self.state(s, me, self.lift(r._replace(agreed=agreed)), (CONFIRM, agreed, about))
        if kind == CONFIRM:
            if r.theirs != about:
                return s
            possible = not_begun(r, turn)
            if possible != turn:
                return self.state(s, me, r._replace(settled=False, agreed=0), (OFFER, possible, about))
            return self.state(s, me, r._replace(settled=True, agreed=turn, theirs=0, wanted=False), (DONE, turn, about))
        if kind == DONE:
            if r.question != about or r.agreed != turn:
                return s
            return self.state(s, me, self.lift(r._replace(question=0, settled=True)))
        if r.question == about:
            return self.state(s, me, self.lift(r._replace(question=0, agreed=0, settled=False, wish=False)))
        if r.theirs == about:
            r = r._replace(theirs=0, their_turn=0)
            return self.state(s, me, *self.question(me, r)) if r.wanted else self.state(s, me, r)
        return s

    def state(self, s, me, rank, *said):
        ranks, words = list(s.ranks), list(s.words)
        ranks[me] = rank
        words[1 - me] += said
        return State(tuple(ranks), tuple(words))

    def check_quiet(self, s):
        if any(s.words) or any(r.unsent or r.where != OUTSIDE for r in s.ranks):
            return
        for r in s.ranks:
            if r.question or r.theirs or (r.agreed and not r.settled) or (r.wish and r.masked and not r.agreed):
                raise Bad("forgotten")

    def run(self):
        start = State((Rank(asks=self.c.asks, masks=self.c.masks),) * 2)
        seen, queue = {start}, deque([start])
        while queue:
            s = queue.popleft()
            try:
                self.check_quiet(s)
                after = list(self.moves(s))
            except Bad as bad:
                return str(bad), len(seen)
            if not after and any(r.turn < self.c.turns or r.where != OUTSIDE for r in s.ranks):
                return "deadlock", len(seen)
            for state in after:
                if state not in seen:
                    seen.add(state)
                    queue.append(state)
        return "ok", len(seen)


CASES = [
    Case("ok", 6, 1, 0), Case("ok", 4, 2, 0), Case("ok", 3, 1, 1), Case("ok", 2, 2, 1),
    Case("forgotten", 6, 1, 0, unordered=True),
    Case("forgotten", 4, 1, 1, no_off=True), Case("forgotten", 4, 1, 1, no_answer=True), Case("forgotten", 4, 1, 1, no_wish=True),
]


if __name__ == "__main__":
    raise SystemExit(run_cases("readmission", CASES, Search))
