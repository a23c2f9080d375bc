// One run of one op on one CPU rank: announced to the peers, bounded in time, with one way to fail.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "host/group.h"
#include "protocol/wait.h"

namespace anyep::host {

/// Where in an op a rank is. Names in phase_name().
enum Phase : std::uint32_t { kBeforeSend, kMidSend, kAfterFlag, kInReceive };
const char* phase_name(std::uint32_t phase);

class OpRun {
 public:
  /// Describes and announces the call, unless `resumes` (the receive half of a low-latency op).
  /// kRightBehind: the call before it has just been announced and is running too.
  enum class Start { kAnnounce, kRightBehind, kResume };
  OpRun(Group& group, const backend::Call& call, Start start = Start::kAnnounce, std::uint64_t start_ns = 0);

  Group& group;
  const backend::Call& call;
  const std::uint16_t code;  ///< kind and digest of the call
  protocol::Waiter waiter;

  /// Throws what went wrong, unless the wait reached its word.
  void must(protocol::Ended ended, const protocol::Who& who) {
    if (ended != protocol::Ended::kReached) [[unlikely]] {
      fail(ended, who);
    }
  }
  /// Throws what a device's wait has left behind.
  [[noreturn]] void fail_with(const protocol::FaultRecord& record);
  /// After a wait that passed its limit and was answered by a mask: the op goes on with an empty record and a new
  /// limit.
  void forget_fault();
  /// A named point for faults; before the first send also where a failed group is noticed.
  void at(Phase phase);
  /// The plain record under a mark must name this call. @throws Error kMismatch
  void check_record(int peer, std::uint32_t record_call, std::uint32_t record_code);
  /// After the last wait: every peer must have been in this call, and none may have left it.
  void finish();
  /// Has the peer thrown out of this call? Ordered after everything that this rank has read from the peer's memory
  /// before: the peer may use that memory anew once it has thrown.
  bool has_left(int peer) const;
  /// Did a wait end because the peer does nothing more? With masks the op goes on without it.
  bool is_silent(protocol::Ended ended, int peer) const {
    return ended == protocol::Ended::kTimeout || ended == protocol::Ended::kPeerGone ||
           (ended == protocol::Ended::kMismatch && has_left(peer));
  }
  /// Throws if it has.
  void must_not_have_left(int peer, Phase phase) {
    if (has_left(peer)) [[unlikely]] {
      left(peer, phase);
    }
  }
  /// The ranks' data contradict each other. @throws Error kMismatch
  [[noreturn]] void disagree(int peer, const char* what);
  [[noreturn]] void corrupt(int peer, const char* what, std::uint64_t expected, std::uint64_t seen);

 private:
  [[noreturn]] void fail(protocol::Ended ended, const protocol::Who& who);
  [[noreturn]] void mismatch(int peer, std::uint32_t phase);
  [[noreturn]] void left(int peer, std::uint32_t phase);
  [[noreturn]] void gone(int peer, std::uint32_t phase);
  [[noreturn]] void timed_out(const protocol::Who& who);
  [[noreturn]] void too_many(const protocol::Who& who);
  /// The group fails with this error, peers see that this rank has left the call, and it is thrown.
  [[noreturn]] void leave_with(const Error& error);
  /// Leaves because the group has failed already.
  [[noreturn]] void leave(std::uint32_t phase);
  void announce(std::uint64_t mark) const;
  Error named(ErrorCode code, std::uint32_t phase, const std::string& text) const;
  /// The group's first error, with what this op was doing.
  Error aborted(std::uint32_t phase) const;
  std::vector<int> not_yet_here(int at_least) const;
  /// Peers that are in another call at this place of the sequence.
  std::vector<int> in_other_calls() const;

  const bool announced_;
  protocol::FaultRecord record_{};
};

}  // namespace anyep::host
