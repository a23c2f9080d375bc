/* Closing an engine and the life of its memory, under sequentially consistent memory.
 *
 * N ranks. Each fetches a last row from every peer's window, then says its closing word to every peer, waits for every
 * peer's, and releases its memory. Its links hang up when it has gone; a link delivers what was said before it hangs up.
 *
 *   LIFE=1  every rank holds a mapping or a count of its own:     LIFE=0  the owner's release takes the window away from
 *           memory goes with the last holder                              everybody
 *   RING=0  closing words are messages over the links             RING=1  they lie in the peer's window, and a doorbell is
 *                                                                         rung there afterwards
 *   LATE=1  a rank may give up waiting (close_timeout) and leave
 *   DIES=1  one rank may be killed anywhere before it has gone
 *
 * Wrong variants: HANGUP_IS_DEATH  a hang-up is taken for a death though the closing word has come
 *                 LOOK_ONCE        the word is looked at before the hang-up, and not again after it
 *
 * Checked: nobody touches memory that has gone; a rank is called dead only if it was killed; every rank ends.
 */
#ifndef N
#define N 2
#endif
#ifndef LIFE
#define LIFE 1
#endif
#ifndef RING
#define RING 0
#endif
#ifndef LATE
#define LATE 0
#endif
#ifndef DIES
#define DIES 0
#endif

bool word[N*N];                /* word[to*N + from] */
byte holders[N];               /* of this rank's window */
bool gone[N], killed[N];
byte done, kills = DIES;

#define TOUCH(window) assert(holders[window] > 0)

proctype rank(byte me) {
  byte p;
  {
    p = 0; do :: p < N -> if :: p != me -> TOUCH(p) :: else fi; p++ :: else -> break od;   /* the last op */

    p = 0;
    do
    :: p < N ->
       if
       :: p != me ->
#if RING
          d_step { TOUCH(p); word[p*N+me] = true }
          TOUCH(p)
#else
          word[p*N+me] = true
#endif
       :: else
       fi;
       p++
    :: else -> break
    od;

    p = 0;
    do
    :: p < N ->
       if
       :: p == me
#ifdef LOOK_ONCE
       :: p != me ->
          if
          :: word[me*N+p]
          :: !word[me*N+p] -> if :: word[me*N+p] :: gone[p] -> assert(killed[p]) fi
          fi
#else
       :: p != me && word[me*N+p]
#ifdef HANGUP_IS_DEATH
       :: p != me && gone[p] -> assert(killed[p])
#else
       :: p != me && gone[p] -> if :: word[me*N+p] :: else -> assert(killed[p]) fi
#endif
#endif
#if LATE
       :: p != me && !word[me*N+p]
#endif
       fi;
       p++
    :: else -> break
    od
  } unless { killed[me] };

  /* what the kernel does for a killed process is what release does for a living one */
#if LIFE==0
  atomic { holders[me] = 0; gone[me] = true; done++ }
#else
  p = 0; do :: p < N -> holders[p]--; p++ :: else -> break od;
  atomic { gone[me] = true; done++ }
#endif
}

init {
  byte i = 0;
  atomic {
    do :: i < N -> holders[i] = (LIFE==0 -> 1 : N); i++ :: else -> break od;
    i = 0; do :: i < N -> run rank(i); i++ :: else -> break od
  };
#if DIES
  if :: atomic { !gone[0] -> killed[0] = true } :: skip fi;
#endif
  (done == N);
  i = 0; do :: i < N -> assert(holders[i] == 0); i++ :: else -> break od
}
