// The record that a failed wait leaves. The first one wins: of an op on CPU ranks, of an engine on GPUs. Nothing traps.
#pragma once

#include <cstdint>

#include "protocol/platform.h"

namespace anyep::protocol {

/// How a wait ended. kTooMany is no wait: `seen` exceeds `expected`, the most that the op can hold.
enum class Ended : std::uint32_t { kReached = 0, kTimeout, kAborted, kMismatch, kPeerGone, kMasked, kTooMany };

/// For whom a wait is, for messages and masks.
struct Who {
  std::int32_t peer;    ///< the rank that should write the word
  std::uint32_t phase;  ///< Phase of the op
};

/// Fixed size, in memory that the host can read while a kernel runs.
struct FaultRecord {
  std::uint32_t claimed;  ///< 0 = empty; claimed by compare-and-swap
  std::uint32_t ready;    ///< 1 = the fields below are whole
  std::uint32_t ended;    ///< Ended
  std::int32_t peer;
  std::uint32_t phase;
  std::uint32_t op;  ///< Waiter::op of the op whose wait it was
  std::uint64_t expected;
  std::uint64_t seen;
  std::uint64_t elapsed_ns;
  std::uint64_t limit_ns;
};

/// Fills a record that this thread has claimed.
ANYEP_HD inline void fill_record(FaultRecord& record, std::uint32_t op, Ended ended, const Who& who,
                                 std::uint64_t expected, std::uint64_t seen, std::uint64_t elapsed_ns,
                                 std::uint64_t limit_ns) {
  record.op = op;
  record.ended = static_cast<std::uint32_t>(ended);
  record.peer = who.peer;
  record.phase = who.phase;
  record.expected = expected;
  record.seen = seen;
  record.elapsed_ns = elapsed_ns;
  record.limit_ns = limit_ns;
  Shared(record.ready).store(1, kRelease);  // pattern Q: the reader acquires `ready` before the fields
}

/// Fills the record unless somebody else has.
ANYEP_HD inline void leave_record(FaultRecord& record, std::uint32_t op, Ended ended, const Who& who,
                                  std::uint64_t expected, std::uint64_t seen, std::uint64_t elapsed_ns,
                                  std::uint64_t limit_ns) {
  if (!Shared(record.claimed).claim(0, 1, kRelaxed)) return;
  fill_record(record, op, ended, who, expected, seen, elapsed_ns, limit_ns);
}

}  // namespace anyep::protocol
