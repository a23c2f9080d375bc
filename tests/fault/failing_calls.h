// System calls of this executable that fail on demand: its own definitions stand before the C library's.
#pragma once

#include <string>
#include <vector>

namespace anyep::test {

/// Sanitizers that wrap the same functions make it impossible to stand before them.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kCallsCanFail = false;
#else
inline constexpr bool kCallsCanFail = true;
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kNewCanFail = false;
#else
inline constexpr bool kNewCanFail = true;
#endif

/// Names of the calls that can fail: "open", "mmap", ..., "new" for memory.
std::vector<std::string> failing_calls();

/// On this thread only: the n-th call (from 1) of that name fails, once, with the errno that is usual for it.
void fail_call(const std::string& name, int nth);
/// Ends it. Has the call been made to fail?
bool stop_failing();

}  // namespace anyep::test
