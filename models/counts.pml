/* The counts of src/protocol/counts.h, under sequentially consistent memory.
 *
 * N ranks run K notify turns. In a turn every rank stores W words {epoch, value} at every peer and then reads the W words of
 * every peer, waiting for each until it carries this epoch. Nothing is cleaned and no credit is given: turn n+1 ends only
 * when every peer has sent n+1, which it does after it has read n.
 *
 *   SLOTS=2      by parity of the epoch                    SLOTS=1      wrong: a fast peer overwrites
 *   IN_FLIGHT=1  a turn is read before the next is sent    IN_FLIGHT=2  wrong: two turns sent and unread
 *   REACHED=1    wrong with one slot: a later epoch is taken for this one, and its value is another
 *   LAST, FIRST  epochs run to LAST and go on at FIRST: right for an even FIRST, wrong for 1
 *
 * Checked: the value read is the one of this turn; every rank ends.
 */
#ifndef N
#define N 2
#endif
#ifndef K
#define K 5
#endif
#ifndef W
#define W 2
#endif
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef IN_FLIGHT
#define IN_FLIGHT 1
#endif
#ifndef LAST
#define LAST 100
#endif
#ifndef FIRST
#define FIRST 2
#endif

#define EPOCH(turn) ((turn) <= LAST -> (turn) : (turn)-LAST-1+FIRST)
#define WORD(rank, turn, source, at) ((((rank)*SLOTS + EPOCH(turn)%SLOTS)*N + (source))*W + (at))
#ifdef REACHED
#define THERE(word, turn) (epoch[word] >= EPOCH(turn))
#else
#define THERE(word, turn) (epoch[word] == EPOCH(turn))
#endif

byte epoch[N*SLOTS*N*W], value[N*SLOTS*N*W];
byte done;

inline send(turn) {
  p = 0;
  do
  :: p < N ->
     if
     :: p != me ->
        at = 0;
        do
        :: at < W -> d_step { word = WORD(p, turn, me, at); epoch[word] = EPOCH(turn); value[word] = turn } at++
        :: else -> break
        od
     :: else
     fi;
     p++
  :: else -> break
  od
}

inline receive(turn) {
  p = 0;
  do
  :: p < N ->
     if
     :: p != me ->
        at = 0;
        do
        :: at < W -> word = WORD(me, turn, p, at); THERE(word, turn); assert(value[word] == turn); at++
        :: else -> break
        od
     :: else
     fi;
     p++
  :: else -> break
  od
}

proctype rank(byte me) {
  byte sent = 0, read = 0, p, at, word;
  do
  :: read == K -> break
  :: sent < K && sent - read < IN_FLIGHT -> sent++; send(sent)
  :: sent - read == IN_FLIGHT || (sent == K && read < K) -> read++; receive(read)
  od;
  done++
}

init {
  byte i = 0;
  atomic { do :: i < N -> run rank(i); i++ :: else -> break od };
  (done == N)
}
