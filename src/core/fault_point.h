// Named points at which tests kill, stop, delay or interrupt a rank. Only builds with ANYEP_FAULTS=1 have them.
//
// A fault is `phase:rank:sequence:action`; rank and sequence may be `*` (any); several are separated by commas:
//   ANYEP_FAULT=dispatch.mid_send:2:17:kill
//   phase   <op>.before_send .mid_send .after_flag .in_recv, create.connect .exchange .map .barrier, between, close
//   action  kill (SIGKILL to this process), stop (SIGSTOP), throw (std::runtime_error), exit (_exit(3)),
//           delay=<milliseconds>
// Each fires once per process, delay every time.
#pragma once

#include <cstdint>
#include <string_view>

namespace anyep::core {

#if defined(ANYEP_FAULTS) && ANYEP_FAULTS
inline constexpr bool kFaultPoints = true;
/// The caller's thread has reached `phase` of op number `sequence` as `rank`.
void fault_point(const char* phase, int rank, std::uint64_t sequence);
/// Called on every thread that reaches a point, before the faults there; null = none.
using FaultHook = void (*)(const char* phase, int rank, std::uint64_t sequence);
void set_fault_hook(FaultHook hook) noexcept;
#else
inline constexpr bool kFaultPoints = false;
inline void fault_point(const char*, int, std::uint64_t) noexcept {}
#endif

/// Replaces the faults of this process, those of ANYEP_FAULT included; empty = none.
/// @throws Error kArgument: the text does not parse; kUnsupported: this build has no fault points.
void set_fault(std::string_view faults);

}  // namespace anyep::core
