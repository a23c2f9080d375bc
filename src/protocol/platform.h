// What differs between GPU and CPU: atomics at system scope, the clock, how to relax in a poll loop. ANYEP_EMULATION is the GPU's
// code on emulated GPUs (tests/emulation), whose clock is declared before anything else.
#pragma once

#include <cstdint>

#include "core/hd.h"

#if defined(__CUDACC__) && !defined(ANYEP_EMULATION)
#include <cuda/atomic>
#else
#include <atomic>
#endif

#if !defined(__CUDA_ARCH__)
#include <sched.h>
#include <time.h>
#endif

namespace anyep::protocol {

#if defined(__CUDACC__) && !defined(ANYEP_EMULATION)
template <class T>
using SharedRef = ::cuda::atomic_ref<T, ::cuda::thread_scope_system>;
using Order = ::cuda::std::memory_order;
inline constexpr Order kRelaxed = ::cuda::std::memory_order_relaxed;
inline constexpr Order kAcquire = ::cuda::std::memory_order_acquire;
inline constexpr Order kRelease = ::cuda::std::memory_order_release;
inline constexpr Order kSequential = ::cuda::std::memory_order_seq_cst;
#else
template <class T>
using SharedRef = std::atomic_ref<T>;
using Order = std::memory_order;
inline constexpr Order kRelaxed = std::memory_order_relaxed;
inline constexpr Order kAcquire = std::memory_order_acquire;
inline constexpr Order kRelease = std::memory_order_release;
inline constexpr Order kSequential = std::memory_order_seq_cst;
#endif

/// Loads and stores of a word that other ranks see. The order is always spelled out at the call.
template <class T>
class Shared {
 public:
  ANYEP_HD explicit Shared(T& word) : word_(word) {}
  ANYEP_HD T load(Order order) const { return SharedRef<T>(word_).load(order); }
  ANYEP_HD void store(T value, Order order) const { SharedRef<T>(word_).store(value, order); }
  ANYEP_HD T fetch_add(T value, Order order) const { return SharedRef<T>(word_).fetch_add(value, order); }
  /// True when the word held `expected` and now holds `desired`.
  ANYEP_HD bool claim(T expected, T desired, Order order) const {
    return SharedRef<T>(word_).compare_exchange_strong(expected, desired, order, kRelaxed);
  }

 private:
  T& word_;
};

/// Nanoseconds of a clock that never goes back: %globaltimer on the GPU (cycle counters change speed), CLOCK_MONOTONIC
/// here.
ANYEP_HD inline std::uint64_t now_ns() {
#if defined(ANYEP_EMULATION)
  return emulation::clock_ns();
#elif defined(__CUDA_ARCH__)
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
#else
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<std::uint64_t>(now.tv_nsec);
#endif
}

/// Tells the processor that this is a poll loop.
ANYEP_HD inline void relax() {
#if defined(__CUDA_ARCH__)
  // A poll that reaches L2 is slow enough; sleeping in polls was measured to gain nothing.
#elif defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

/// Lets another thread of this processor run.
inline void yield() {
#if !defined(__CUDA_ARCH__)
  sched_yield();
#endif
}

}  // namespace anyep::protocol
