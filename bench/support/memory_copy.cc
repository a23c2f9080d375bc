#include "bench/support/memory_copy.h"

#include <chrono>
#include <cstddef>
#include <cstring>

#include "cpu/simd/kernels.h"

namespace anyep::bench {

double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const char* MemoryCopy::name(int method) {
  return method == 0 ? "memcpy" : "streaming";
}

MemoryCopy::MemoryCopy(std::int64_t bytes)
    : bytes_(bytes), from_(static_cast<std::size_t>(bytes)), to_(static_cast<std::size_t>(bytes)) {
  // Pages of equal bytes can be merged or kept in caches of memory controllers: random data.
  std::uint64_t state = 1;
  for (std::size_t i = 0; i < from_.size() / sizeof(std::uint64_t); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    from_.as<std::uint64_t>()[i] = state;
  }
}

double MemoryCopy::copy(int method) {
  const double start = now_us();
  if (method == 0) {
    std::memcpy(to_.data(), from_.data(), to_.size());
  } else {
    cpu::simd::kernels().stream(to_.data(), from_.data(), to_.size());
    cpu::simd::stream_fence();
  }
  return now_us() - start;
}

}  // namespace anyep::bench
