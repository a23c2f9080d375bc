/* The handoff of src/protocol/handoff.h between N ranks, under sequentially consistent memory.
 *
 * One handoff per (source, destination, channel). A rank runs OPS operations of T turns each; both ends keep only
 * `sent` and `taken` from one op to the next, so every op is also the replay of the one before it.
 *
 *   PULL=0  the region lies at the destination: the source writes it            PULL=1  it lies at the source
 *   MOVES=0 the region is R fixed slots, used as a ring                         MOVES=1 rows lie elsewhere in every op and
 *                                                                               the grant says where; the caller reads or
 *                                                                               overwrites them between ops
 *   OFFERS  push: records that say, under arrived, how an op's turns are cut; written in the op's first turn, the record of
 *           turn mod OFFERS. A ring that is granted ahead for good needs R of them; 0 = none
 *   ROLES=0 one thread per rank (CPU ranks)                                     ROLES=1 sending and collecting run side by side
 *
 * Wrong variants, one macro each:
 *   EARLY_PUBLISH  arrived before the rows           SKIP_CREDIT    nobody waits for credit
 *   EARLY_CREDIT   credit before the rows are read   OFF_BY_ONE     credit for one region more than there is
 *   EQUAL          == instead of reached()           GRANT_LATE     grant written after the word that covers it
 *   FROM_ZERO      an op restarts its turns          NO_CAP         credit beyond the op that the grant belongs to
 *   LEAVE_EARLY    pull: the op ends with readers left              ALL_SENDS_FIRST one thread sends all turns, then collects
 *   CREDIT_CODE    credit says for which call it is: right where every op grants anew (push, MOVES=1), wrong where the
 *                  end of one op grants the first turns of the next, whose call nobody knows yet
 *   WRAP_TO        epochs end at 3 and go on at WRAP_TO: right for a multiple of R, wrong for 1
 *
 * Checked: rows read belong to the turn; rows lie where the op said; taken <= arrived <= credit <= taken + R;
 * the caller's rows are untouched between ops; every rank ends.
 */
#ifndef N
#define N 2
#endif
#ifndef C
#define C 1
#endif
#ifndef R
#define R 1
#endif
#ifndef T
#define T 2
#endif
#ifndef OPS
#define OPS 3
#endif
#ifndef PULL
#define PULL 0
#endif
#ifndef MOVES
#define MOVES 0
#endif
#ifndef OFFERS
#define OFFERS 0
#endif
#ifndef ROLES
#define ROLES 0
#endif

#if MOVES
#define CELLS (2*T)                                   /* two places, taken in turn from op to op */
#define CELL(i, turn, place) ((i)*CELLS + (place)*T + ((turn)-1)%T)
#else
#define CELLS R
#define CELL(i, turn, place) ((i)*CELLS + EPOCH(turn)%R)
#endif
#ifdef WRAP_TO
#define EPOCH(turn) ((turn) <= 3 -> (turn) : (turn)-4+WRAP_TO)
#else
#define EPOCH(turn) (turn)
#endif
#define PAIRS (N*N*C)
#define PAIR(source, destination, channel) (((source)*N + (destination))*C + (channel))

#ifdef EQUAL
#define REACHED(seen, expected) ((seen) == (expected))
#else
#define REACHED(seen, expected) ((seen) >= (expected))
#endif
#ifdef OFF_BY_ONE
#define AHEAD (R+1)
#else
#define AHEAD R
#endif

byte credit[PAIRS], credit_code[PAIRS], arrived[PAIRS], sent[PAIRS], taken[PAIRS], grant[PAIRS];
byte lo[PAIRS*CELLS], hi[PAIRS*CELLS];                /* a row, written in two steps */
#if OFFERS
byte offer[PAIRS*OFFERS];
#endif
byte sends[N], collects[N];                           /* ops that each role has ended */
byte done;

#define for_pairs(p, c, body) \
  p = 0; do :: p < N -> if :: p != me -> c = 0; do :: c < C -> body; c++ :: else -> break od :: else fi; p++ :: else -> break od

inline invariant(i) {
#if defined(SKIP_CREDIT) || defined(EARLY_CREDIT) || defined(OFF_BY_ONE)
  skip                                                /* the rows themselves must show these */
#else
  d_step { assert(taken[i] <= arrived[i] && arrived[i] <= credit[i] && credit[i] <= taken[i] + R) }
#endif
}

/* the last turn for which credit may be given in this op */
#if MOVES && !PULL && !defined(NO_CAP)
#define CAPPED(turn, op) ((turn) < (op)*T -> (turn) : (op)*T)
#else
#define CAPPED(turn, op) (turn)
#endif

inline open(i, op) {                                  /* push, rows that move: the op starts */
#if MOVES && !PULL
#ifdef GRANT_LATE
  credit[i] = CAPPED(taken[i] + AHEAD, op);
  grant[i] = (op)%2;
#else
  grant[i] = (op)%2;
  d_step { credit[i] = CAPPED(taken[i] + AHEAD, op); credit_code[i] = op }
#endif
#else
  skip
#endif
}

inline send(i, op, t) {
#ifdef FROM_ZERO
  turn = t;
#else
  turn = sent[i] + 1;
#endif
#ifndef SKIP_CREDIT
  (REACHED(credit[i], turn));
#endif
#ifdef CREDIT_CODE
  d_step { assert(credit[i] != turn || credit_code[i] == op) }   /* else: "the ranks are out of step" */
#endif
#if PULL
  place = (op)%2;
#else
  place = grant[i];
#endif
#ifdef EARLY_PUBLISH
  arrived[i] = turn;
#endif
  lo[CELL(i, turn, place)] = turn;
  hi[CELL(i, turn, place)] = turn;
#if PULL && !defined(GRANT_LATE)
  grant[i] = place;
#endif
#if OFFERS
  if :: t == 1 -> offer[i*OFFERS + turn%OFFERS] = op :: else fi;
#endif
  d_step { arrived[i] = turn; sent[i] = turn }
#if PULL && defined(GRANT_LATE)
  grant[i] = place;
#endif
  invariant(i);
}

inline collect(i, op, t) {
#ifdef FROM_ZERO
  turn = t;
#else
  turn = taken[i] + 1;
#endif
  (REACHED(arrived[i], turn));
#ifdef EARLY_CREDIT
  credit[i] = CAPPED(turn + AHEAD, op);
#endif
#if PULL
  place = grant[i];
#else
  place = (op)%2;
#endif
#if OFFERS
  assert(t != 1 || offer[i*OFFERS + turn%OFFERS] == op);
#endif
  assert(lo[CELL(i, turn, place)] == turn);
  assert(hi[CELL(i, turn, place)] == turn);
  /* one step: nobody else reads `taken` */
  d_step {
    taken[i] = turn;
    if :: CAPPED(turn + AHEAD, op) > credit[i] -> credit[i] = CAPPED(turn + AHEAD, op); credit_code[i] = op :: else fi
  }
  invariant(i);
}

/* the caller owns its rows again: in push it reads what was received, in pull it overwrites what it offered */
inline between_ops(op) {
#if MOVES && PULL
  for_pairs(p, c, i = PAIR(me, p, c);
#ifndef LEAVE_EARLY
    (REACHED(credit[i], sent[i] + R));
#endif
    turn = 1; do :: turn <= T -> lo[CELL(i, turn, (op)%2)] = 0; turn++ :: else -> break od)
#elif MOVES
  for_pairs(p, c, i = PAIR(p, me, c);
    turn = 1; do :: turn <= T -> assert(hi[CELL(i, turn, (op)%2)] == taken[i] - T + turn); turn++ :: else -> break od)
#else
  skip
#endif
}

proctype rank(byte me) {
  byte op = 1, t, p, c, i, turn, place;
  do
  :: op <= OPS ->
     for_pairs(p, c, i = PAIR(p, me, c); open(i, op));
#ifdef ALL_SENDS_FIRST
     t = 1; do :: t <= T -> for_pairs(p, c, i = PAIR(me, p, c); send(i, op, t)); t++ :: else -> break od;
     t = 1; do :: t <= T -> for_pairs(p, c, i = PAIR(p, me, c); collect(i, op, t)); t++ :: else -> break od;
#else
     t = 1;
     do
     :: t <= T ->
        for_pairs(p, c, i = PAIR(me, p, c); send(i, op, t));
        for_pairs(p, c, i = PAIR(p, me, c); collect(i, op, t));
        t++
     :: else -> break
     od;
#endif
     between_ops(op);
     op++
  :: else -> break
  od;
  done++
}

proctype sender(byte me) {
  byte op = 1, t, p, c, i, turn, place;
  do
  :: op <= OPS ->
     t = 1; do :: t <= T -> for_pairs(p, c, i = PAIR(me, p, c); send(i, op, t)); t++ :: else -> break od;
     sends[me] = op;
     (collects[me] >= op);                            /* the op has ended on this rank: the next may start */
#if PULL
     between_ops(op);
#endif
     op++
  :: else -> break
  od;
  done++
}

proctype collector(byte me) {
  byte op = 1, t, p, c, i, turn, place;
  do
  :: op <= OPS ->
     for_pairs(p, c, i = PAIR(p, me, c); open(i, op));
     t = 1; do :: t <= T -> for_pairs(p, c, i = PAIR(p, me, c); collect(i, op, t)); t++ :: else -> break od;
#if !PULL
     between_ops(op);
#endif
     collects[me] = op;
     (sends[me] >= op);
     op++
  :: else -> break
  od;
}

init {
  byte i = 0;
  atomic {
#if !MOVES || PULL
    do :: i < PAIRS -> credit[i] = R; i++ :: else -> break od;
#endif
    i = 0;
#if ROLES
    do :: i < N -> run sender(i); run collector(i); i++ :: else -> break od
#else
    do :: i < N -> run rank(i); i++ :: else -> break od
#endif
  };
  (done == N)
}
