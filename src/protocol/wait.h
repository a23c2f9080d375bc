// The one wait. Only this file loops on words that other ranks write.
//
// CPU ranks spin, then yield, then block on the rank's doorbell. After the spin every poll looks at the abort word, at
// the peer's announcement of its op, at whether the peer is gone or masked, and at the clock.
#pragma once

#include <cstdint>

#include "protocol/doorbell.h"
#include "protocol/fault.h"
#include "protocol/platform.h"
#include "protocol/word.h"

namespace anyep::protocol {

/// What every wait of one op looks at besides its word. Lives as long as the op.
struct Waiter {
  std::uint64_t* abort = nullptr;  ///< own rank's abort word; nonzero = leave
  std::uint32_t* left =
      nullptr;  ///< GPU: set by the first thread of this rank that gives up; nullptr = one thread a rank
  Doorbell* doorbell = nullptr;  ///< own rank's; CPU only
  FaultRecord* record = nullptr;
  std::uint32_t op = 0;                ///< which op it is, for who reads a record that several share
  std::uint64_t start_ns = 0;          ///< of the op
  std::uint64_t limit_ns = 0;          ///< of the op, from start_ns
  std::uint64_t* announced = nullptr;  ///< [ranks * stride] mark of the op each peer is in; nullptr = not looked at
  std::uint64_t announced_stride = 0;  ///< in words
  std::uint64_t announcement = 0;      ///< the mark that this op announced
  std::uint32_t* gone = nullptr;       ///< [ranks] 1 = the peer's process is known to be dead; nullptr = not looked at
  std::uint32_t* masked = nullptr;     ///< [ranks] 1 = masked; nullptr = this op knows no masks
  std::uint64_t* waited_ns = nullptr;  ///< [ranks] time waited for each peer is added; nullptr = not counted
};

/// Spins before the first yield: about 10 us of polling on a 3 GHz core, the order of a peer's op start.
inline constexpr unsigned kSpinPolls = 400;
/// Yields before the first sleep. A yield without a competitor costs about 0.3 us.
inline constexpr unsigned kYieldPolls = 200;
/// The longest sleep: what a lost wake-up could cost.
inline constexpr std::uint64_t kSleepNs = 1'000'000;
/// On the GPU the first polls acquire: most waits are short, and an acquire at the end would cost them a round trip. Later
/// ones do not: each empties the L1 of an SM that others work on.
inline constexpr unsigned kAcquiringPolls = 16;
/// On the GPU abort word and clock are looked at this often.
inline constexpr unsigned kPollsPerCheck = 1000;

/// Leaves a record and says how the wait ended.
ANYEP_HD inline Ended give_up(const Waiter& w, const Who& who, std::uint64_t expected, std::uint64_t seen,
                              Ended ended) {
  const std::uint64_t elapsed_ns = now_ns() - w.start_ns;
  if (w.left == nullptr) {
    leave_record(*w.record, w.op, ended, who, expected, seen, elapsed_ns, w.limit_ns);
  } else if (Shared(*w.left).claim(0, 1, kRelaxed)) {  // in the GPU's own memory: few can swap words of the host's
    w.record->claimed = 1;
    fill_record(*w.record, w.op, ended, who, expected, seen, elapsed_ns, w.limit_ns);
  }
  return ended;
}

/// The looks besides the word itself; kReached = go on waiting.
ANYEP_HD inline Ended look_around(const Waiter& w, const Who& who) {
  if (w.masked != nullptr && Shared(w.masked[who.peer]).load(kRelaxed) != 0) return Ended::kMasked;
  if (w.left != nullptr && Shared(*w.left).load(kRelaxed) != 0) return Ended::kAborted;
  if (Shared(*w.abort).load(kRelaxed) != 0) return Ended::kAborted;
  if (w.gone != nullptr && Shared(w.gone[who.peer]).load(kAcquire) != 0) return Ended::kPeerGone;
  if (w.announced != nullptr) {
    const std::uint64_t peer_op =
        Shared(w.announced[static_cast<std::uint64_t>(who.peer) * w.announced_stride]).load(kRelaxed);
    if (contradicts(peer_op, w.announcement)) return Ended::kMismatch;
  }
  return now_ns() - w.start_ns > w.limit_ns ? Ended::kTimeout : Ended::kReached;
}

/// Polls until `there` holds for the word. `there` is asked with relaxed values; one acquire ends the wait, unless `order`
/// is kRelaxed: then nothing lies behind the word (pattern G).
template <class There>
ANYEP_HD Ended wait_until(const Waiter& w, const Who& who, std::uint64_t& word, std::uint64_t expected, There&& there,
                          Order order = kAcquire) {
  if (there(Shared(word).load(order))) return Ended::kReached;
  const std::uint64_t from_ns = w.waited_ns != nullptr ? now_ns() : 0;
  Ended ended = Ended::kReached;
  for (unsigned polls = 1;; ++polls) {
#if defined(__CUDA_ARCH__)
    const bool acquires = polls < kAcquiringPolls || order == kRelaxed;
#else
    const bool acquires = order == kRelaxed;
#endif
    const std::uint64_t seen = Shared(word).load(acquires ? order : kRelaxed);
    if (there(seen)) {
      if (!acquires) (void)Shared(word).load(kAcquire);  // pattern B', litmus mp-poll-acquire
      break;
    }
#if defined(__CUDA_ARCH__)
    if (polls % kPollsPerCheck == 0) ended = look_around(w, who);
#else
    if (polls > kSpinPolls || polls % 64 == 0) ended = look_around(w, who);
#endif
    if (ended == Ended::kMasked) break;
    if (ended != Ended::kReached) {
      // A peer may publish and then leave: what has landed counts.
      if (ended != Ended::kAborted && there(Shared(word).load(order))) {
        ended = Ended::kReached;
        break;
      }
      give_up(w, who, expected, seen, ended);
      break;
    }
#if defined(__CUDA_ARCH__)
    relax();
#else
    if (polls <= kSpinPolls) {
      relax();
    } else if (polls <= kSpinPolls + kYieldPolls) {
      yield();
    } else {
      sleep_unless(*w.doorbell, kSleepNs, [&] { return there(Shared(word).load(kSequential)); });
    }
#endif
  }
  if (w.waited_ns != nullptr) w.waited_ns[who.peer] += now_ns() - from_ns;
  return ended;
}

/// Polls until the mark has reached `expected`. A mark of the same epoch with another code is a mismatch.
[[nodiscard]] ANYEP_HD inline Ended wait(const Waiter& w, const Who& who, std::uint64_t& word, std::uint64_t expected) {
  std::uint64_t last = 0;
  const Ended ended = wait_until(w, who, word, expected, [expected, &last](std::uint64_t seen) {
    last = seen;
    return reached(seen, expected);
  });
  if (ended != Ended::kReached) return ended;
  return contradicts(last, expected) ? give_up(w, who, expected, last, Ended::kMismatch) : Ended::kReached;
}

/// Has the mark been reached? Never waits.
[[nodiscard]] ANYEP_HD inline bool is_reached(std::uint64_t& word, std::uint64_t expected) {
  return reached(Shared(word).load(kAcquire), expected);
}

}  // namespace anyep::protocol
