// Copies of rows.
#pragma once

#include "cpu/simd/vector.h"

#include <cstddef>
#include <cstdint>

namespace anyep::cpu::simd::ANYEP_SIMD_ISA {

inline constexpr std::size_t kStep = 4 * kLine;  ///< bytes of one round of a loop

/// 64 bytes through registers.
struct Line {
  Bytes at[kLine / kWidth];
};

ANYEP_INLINE Line load_line(const std::byte* from) {
  Line line;
#pragma GCC unroll 4
  for (int i = 0; i < static_cast<int>(kLine) / kWidth; ++i) line.at[i] = load<Bytes>(from + i * kWidth);
  return line;
}

template <bool kStream>
ANYEP_INLINE void store_line(std::byte* to, const Line& line) {
#pragma GCC unroll 4
  for (int i = 0; i < static_cast<int>(kLine) / kWidth; ++i) {
    if constexpr (kStream) {
      store_streaming(to + i * kWidth, line.at[i]);
    } else {
      store(to + i * kWidth, line.at[i]);
    }
  }
}

/// One to four lines' bytes: lines from either end, which meet or overlap.
ANYEP_INLINE void copy_few_lines(std::byte* to, const std::byte* from, std::size_t bytes) {
  const Line first = load_line(from);
  const Line last = load_line(from + bytes - kLine);
  if (bytes > 2 * kLine) {
    const Line second = load_line(from + kLine);
    const Line third = load_line(from + bytes - 2 * kLine);
    store_line<false>(to + kLine, second);
    store_line<false>(to + bytes - 2 * kLine, third);
  }
  store_line<false>(to, first);
  store_line<false>(to + bytes - kLine, last);
}

/// Lines of `to` from `at` on, which is aligned, while whole ones are left; returns where it stopped.
template <bool kStream>
ANYEP_INLINE std::size_t copy_lines(std::byte* to, const std::byte* from, std::size_t at, std::size_t bytes) {
  for (; at + kStep <= bytes; at += kStep) {
    const Line a = load_line(from + at);
    const Line b = load_line(from + at + kLine);
    const Line c = load_line(from + at + 2 * kLine);
    const Line d = load_line(from + at + 3 * kLine);
    store_line<kStream>(to + at, a);
    store_line<kStream>(to + at + kLine, b);
    store_line<kStream>(to + at + 2 * kLine, c);
    store_line<kStream>(to + at + 3 * kLine, d);
  }
  for (; at + kLine <= bytes; at += kLine) store_line<kStream>(to + at, load_line(from + at));
  return at;
}

/// The pieces that are no line; also no bytes from nowhere.
ANYEP_INLINE void copy_less(std::byte* to, const std::byte* from, std::size_t bytes) {
  if (bytes > 0) __builtin_memcpy(to, from, bytes);
}

/// Lines go to aligned addresses; a whole, unaligned line each covers the two ends.
inline void copy(void* dst, const void* src, std::size_t bytes) {
  auto* const to = static_cast<std::byte*>(dst);
  const auto* const from = static_cast<const std::byte*>(src);
  if (bytes < kLine) {
    copy_less(to, from, bytes);
    return;
  }
  if (bytes <= 4 * kLine) {
    copy_few_lines(to, from, bytes);
    return;
  }
  store_line<false>(to, load_line(from));
  copy_lines<false>(to, from, kLine - reinterpret_cast<std::uintptr_t>(to) % kLine, bytes);
  store_line<false>(to + bytes - kLine, load_line(from + bytes - kLine));
}

/// No ordinary store touches a line that is streamed: it would fetch that line.
inline void stream(void* dst, const void* src, std::size_t bytes) {
  auto* const to = static_cast<std::byte*>(dst);
  const auto* const from = static_cast<const std::byte*>(src);
  const std::size_t beside = reinterpret_cast<std::uintptr_t>(to) % kLine;
  const std::size_t head = beside == 0 ? 0 : kLine - beside;
  if (bytes < head + kLine) {
    copy_less(to, from, bytes);
    return;
  }
  copy_less(to, from, head);
  const std::size_t at = copy_lines<true>(to, from, head, bytes);
  copy_less(to + at, from + at, bytes - at);
}

}  // namespace anyep::cpu::simd::ANYEP_SIMD_ISA
