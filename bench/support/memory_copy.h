// The memory-copy ceiling: what one rank's core copies while every other rank does the same.
#pragma once

#include <cstdint>

#include "bench/support/buffer.h"

namespace anyep::bench {

/// Copies a source into a destination, both larger than the caches. Ranks call copy() at the same time; the ceiling is
/// that of the better method (METRICS.md).
class MemoryCopy {
 public:
  static constexpr int kNumMethods = 2;
  static const char* name(int method);  ///< "memcpy", "streaming"

  explicit MemoryCopy(std::int64_t bytes = std::int64_t{128} << 20);
  std::int64_t bytes() const { return bytes_; }
  /// Microseconds of one copy.
  double copy(int method);

 private:
  std::int64_t bytes_;
  Buffer from_, to_;
};

/// Microseconds on a clock that all ranks of a host share.
double now_us();

}  // namespace anyep::bench
