// What can be learnt about another process of this host.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>

#include "bootstrap/unique_fd.h"

namespace anyep::bootstrap {

/// A process descriptor, close-on-exec. Empty where there is none; errno then says why (ESRCH: no such process).
UniqueFd open_process(pid_t pid) noexcept;

/// Has the process of this descriptor ended (reaped or not) within `wait`?
bool has_exited(int pidfd, std::chrono::milliseconds wait = {}) noexcept;

/// When a process was started, in clock ticks since boot: with the pid it names a process for good. 0 = not known.
std::uint64_t start_ticks(pid_t pid) noexcept;

/// Number of this process's pid namespace: pids mean the same where it is the same. 0 = not known.
std::uint64_t pid_namespace() noexcept;

/// A process as others remember it.
struct ProcessId {
  pid_t pid = 0;
  std::uint64_t start_ticks = 0;
  static ProcessId of_this_process() noexcept;
};

enum class Life : std::uint8_t { kAlive, kDead, kUnknown };

/// Opens `which` and makes sure that its pid was not given to another process since. kAlive leaves the descriptor in
/// `pidfd`; kUnknown where the system does not tell.
Life look_up(const ProcessId& which, UniqueFd& pidfd) noexcept;

}  // namespace anyep::bootstrap
