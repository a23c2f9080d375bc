// A barrier by one word per peer: tells who is missing. For clean and tests; ops need none.
//
//   word     lives on  written by  read by  order               meaning
//   barrier  reader    each peer   reader   release -> acquire  the peer has entered this many barriers
#pragma once

#include <cstdint>

#include "protocol/doorbell.h"
#include "protocol/wait.h"
#include "protocol/word.h"

namespace anyep::protocol {

/// Enters: the word at one peer, which lives there and only this rank writes.
inline void enter_barrier(std::uint64_t& word_at_peer, Doorbell& peer_bell, std::uint64_t mark) {
  Shared(word_at_peer).store(mark, kRelease);  // pattern A: what this rank did before is visible behind the barrier
  ring(peer_bell);
}

/// Waits until one peer has entered.
[[nodiscard]] inline Ended wait_barrier(const Waiter& w, const Who& who, std::uint64_t& word_of_peer,
                                        std::uint64_t mark) {
  return wait(w, who, word_of_peer, mark);
}

}  // namespace anyep::protocol
