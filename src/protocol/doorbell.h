// The doorbell: how a CPU rank sleeps while it waits for a word, and how a writer wakes it.
//
//   word      lives on     written by        read by          order                         meaning
//   sleepers  the sleeper  sleeper, +1 / -1  every publisher  sequentially consistent RMW   threads that may sleep here
//   bell      the sleeper  every publisher   sleeper (futex)  relaxed; the kernel orders it  moves when somebody rang
//
// Memory model pattern H, as read-modify-writes so that ThreadSanitizer sees the order: a sleeper registers, looks at
// its word again and only then sleeps; a publisher stores its word, then reads the register by a read-modify-write. One
// of the two sees the other, so no wake-up is lost; a sleep lasts at most 1 ms all the same.
#pragma once

#include <cstdint>

#include "protocol/platform.h"

#if !defined(__CUDA_ARCH__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace anyep::protocol {

struct Doorbell {
  alignas(64) std::uint32_t sleepers;
  alignas(64) std::uint32_t bell;
};

/// After publishing: wakes the rank that owns the doorbell when one of its threads may sleep.
inline void ring(Doorbell& doorbell) {
#if !defined(__CUDA_ARCH__)
  if (Shared(doorbell.sleepers).fetch_add(0, kSequential) == 0) return;  // pattern H, model doorbell.pml
  Shared(doorbell.bell).fetch_add(1, kRelaxed);
  syscall(SYS_futex, &doorbell.bell, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

/// Sleeps until the bell rings, at most `limit_ns`, unless `is_there()` holds once this thread is registered.
template <class IsThere>
void sleep_unless(Doorbell& doorbell, std::uint64_t limit_ns, IsThere&& is_there) {
#if !defined(__CUDA_ARCH__)
  // Noted before registering: a bell that moves afterwards ends the sleep at once (litmus doorbell-note-first).
  const std::uint32_t bell = Shared(doorbell.bell).load(kRelaxed);
  Shared(doorbell.sleepers).fetch_add(1, kSequential);  // pattern H: registered before the second look
  if (!is_there()) {
    timespec limit{};
    limit.tv_sec = static_cast<time_t>(limit_ns / 1'000'000'000u);
    limit.tv_nsec = static_cast<long>(limit_ns % 1'000'000'000u);
    syscall(SYS_futex, &doorbell.bell, FUTEX_WAIT, bell, &limit, nullptr, 0);
  }
  Shared(doorbell.sleepers).fetch_add(~std::uint32_t{0}, kSequential);
#endif
}

}  // namespace anyep::protocol
