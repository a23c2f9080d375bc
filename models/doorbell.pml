/* The doorbell of src/protocol/doorbell.h: how a rank sleeps until one of its words has moved, under sequentially consistent memory.
 * (That read-modify-writes give this order on weaker memory is litmus doorbell-rmw of ptx_litmus.py.)
 *
 * S threads of one rank wait, each for K turns of its own word; S writers publish them. One doorbell serves the rank:
 * `sleepers` counts the registered, `bell` is the value that the kernel compares before it lets a thread sleep.
 *
 *   sleeper  register, note the bell, look at the word again, sleep while the bell is as noted, deregister, look, ...
 *   writer   publish the word, read sleepers by a read-modify-write; when somebody is registered: bell + 1, wake all
 *
 *   LIMIT=0  a sleep lasts until a wake-up: no lost wake-up may exist at all
 *   LIMIT=1  a sleep also ends by itself (1 ms in the code): whatever is lost costs time only
 *
 * Wrong variants, one macro each:
 *   NO_SECOND_LOOK  sleep at once after registering         EARLY_READ  the writer reads sleepers, then publishes
 *   NO_RING         wake without changing bell             LATE_NOTE   note bell after the second look
 *   WAKE_ONE        wake one thread, perhaps the wrong one
 *
 * Checked: every thread ends; in the end nobody is registered.
 */
#ifndef S
#define S 2
#endif
#ifndef K
#define K 2
#endif
#ifndef LIMIT
#define LIMIT 0
#endif

byte word[S];
byte sleepers, bell;
bool asleep[S];
byte done;

proctype waiter(byte me) {
  byte turn = 1, noted;
  do
  :: turn > K -> break
  :: else ->
     do
     :: word[me] >= turn -> break
     :: else ->                                       /* the spin is over: sleep */
        sleepers++;
#ifndef LATE_NOTE
        noted = bell;
#endif
        if
#ifndef NO_SECOND_LOOK
        :: word[me] >= turn -> skip
#endif
        :: else ->
#ifdef LATE_NOTE
           noted = bell;
#endif
           atomic { asleep[me] = (bell == noted) };  /* the kernel compares and queues in one step */
           if
           :: !asleep[me]
#if LIMIT
           :: asleep[me] -> asleep[me] = false
#endif
           fi
        fi;
        sleepers--
     od;
     turn++
  od;
  done++
}

proctype writer(byte me) {
  byte turn = 1, seen;
  do
  :: turn > K -> break
  :: else ->
#ifdef EARLY_READ
     seen = sleepers;
     word[me] = turn;
#else
     word[me] = turn;
     seen = sleepers;
#endif
     if
     :: seen > 0 ->
#ifndef NO_RING
        bell++;
#endif
#ifdef WAKE_ONE
        atomic { if :: asleep[0] -> asleep[0] = false :: asleep[S-1] -> asleep[S-1] = false :: else fi }
#else
        atomic { asleep[0] = false; asleep[S-1] = false }
#endif
     :: else
     fi;
     turn++
  od;
  done++
}

init {
  byte i = 0;
  atomic { do :: i < S -> run waiter(i); run writer(i); i++ :: else -> break od };
  (done == 2*S);
  assert(sleepers == 0)
}
