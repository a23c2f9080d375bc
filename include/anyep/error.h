// The only exception of the library. what() says what happened, the value, what is allowed and what to do.
#pragma once

#include <anyep/types.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace anyep {

/// One code per class of caller's reaction.
enum class ErrorCode : std::uint8_t {
  kArgument,     ///< a value, shape, type, stride or handle is wrong: fix the call
  kUnsupported,  ///< valid, but this build, group or topology lacks it
  kCapacity,     ///< more tokens, rows or bytes than agreed: need, have
  kMismatch,     ///< ranks disagree on budget, version, op, shape or order
  kState,        ///< not legal now: closed, failed, overlapping, out of order
  kTimeout,      ///< a limit expired: peers, expected, seen
  kPeerDead,     ///< a peer's process is gone
  kAborted,      ///< a peer said that it leaves, and why
  kDevice,       ///< CUDA failed in this process
  kResource,     ///< the operating system refused memory, descriptors, threads: need, have
  kTransport,    ///< a network link failed
  kCorrupt,      ///< a word, header or count that no correct peer can have written
  kInternal,     ///< an invariant of ours is broken
};

/// "kArgument", "kTimeout", ...
ANYEP_API const char* name_of(ErrorCode code) noexcept;

struct ANYEP_API Error : std::runtime_error {
  Error(ErrorCode code, const std::string& text);
  ~Error() override;
  Error(const Error&) = default;

  ErrorCode code;
  int rank = -1;           ///< the rank that reports, -1 where there is none
  std::vector<int> peers;  ///< failed, missing or suspected, ascending
  std::string op;          ///< "create", "route", "dispatch", "combine", "low_latency_dispatch", ...
  std::string phase;       ///< "before_send", "mid_send", "in_recv", ...
  std::uint64_t generation = 0, sequence = 0, expected = 0, seen = 0, elapsed_ns = 0, limit_ns = 0;
  std::string argument, got, allowed;  ///< of kArgument
  std::uint64_t need = 0, have = 0;    ///< of kCapacity and kResource
};

}  // namespace anyep
