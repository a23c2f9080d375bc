// Counts exchanged before rows: words that carry value and epoch (memory model pattern G).
//
//   word    lives on     written by  read by      order    meaning
//   counts  destination  source      destination  relaxed  {epoch of the notify turn, value}; two slots by its parity
//
// Notify n+2 cannot overwrite unread counts of notify n, because notify n+1 ended only when all peers' counts n+1 were
// there, and a peer sends those after it has read n (model counts.pml; one slot fails).
#pragma once

#include <cstdint>

#include "protocol/platform.h"
#include "protocol/wait.h"
#include "protocol/word.h"

namespace anyep::protocol {

/// The slot of a board [2][sources][width] that `source` writes in turn `epoch`.
ANYEP_HD constexpr std::uint64_t count_slot(std::uint32_t epoch, std::uint64_t sources, std::uint64_t source,
                                            std::uint64_t width) {
  return ((epoch & 1u) * sources + source) * width;
}

/// Writer: one value. The word is its own flag.
ANYEP_HD inline void put_count(std::uint64_t& word, std::uint32_t epoch, std::uint32_t value) {
  Shared(word).store(make_count(epoch, value), kRelaxed);  // pattern G, litmus word-is-flag
}

/// Reader: waits for this turn's value. Compared for equality: two slots cannot be ahead.
[[nodiscard]] ANYEP_HD inline Ended get_count(const Waiter& w, const Who& who, std::uint64_t& word, std::uint32_t epoch,
                                              std::uint32_t& value) {
  value = 0;
  const auto there = [epoch, &value](std::uint64_t seen) {
    value = count_value(seen);
    return count_epoch(seen) == epoch;
  };
  return wait_until(w, who, word, make_count(epoch, 0), there, kRelaxed);
}

}  // namespace anyep::protocol
