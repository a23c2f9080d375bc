// The 64-bit mark and how marks compare.
//
//   mark    generation (16) | epoch (32) | code (16: 4 of kind, 12 of the digest of the call)
//   count   epoch (32) | value (32)
//
// A word has one writer, is stored whole, only moves forward and is never reset. Epoch 0 is never used: fresh memory is
// zero.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace anyep::protocol {

/// What a mark's code says about the call: 4 bits of kind, 12 bits of the digest of its shape and wire format.
ANYEP_HD constexpr std::uint16_t make_code(unsigned kind, std::uint64_t digest) {
  const std::uint64_t folded = digest ^ digest >> 12 ^ digest >> 24 ^ digest >> 36 ^ digest >> 48 ^ digest >> 60;
  return static_cast<std::uint16_t>((kind & 0xFu) << 12 | (folded & 0xFFFu));
}
ANYEP_HD constexpr unsigned kind_of(std::uint16_t code) {
  return code >> 12;
}

ANYEP_HD constexpr std::uint64_t make_mark(std::uint16_t generation, std::uint32_t epoch, std::uint16_t code) {
  return std::uint64_t{generation} << 48 | std::uint64_t{epoch} << 16 | code;
}
ANYEP_HD constexpr std::uint16_t generation_of(std::uint64_t mark) {
  return static_cast<std::uint16_t>(mark >> 48);
}
ANYEP_HD constexpr std::uint32_t epoch_of(std::uint64_t mark) {
  return static_cast<std::uint32_t>(mark >> 16);
}
ANYEP_HD constexpr std::uint16_t code_of(std::uint64_t mark) {
  return static_cast<std::uint16_t>(mark);
}

/// The epoch after `epoch`. Wraps to 4: past 0, which fresh memory holds, and so that epochs modulo 2 and 4 (slots of
/// counts, low-latency regions) go on in order.
ANYEP_HD constexpr std::uint32_t next_epoch(std::uint32_t epoch) {
  return epoch + 1 == 0 ? 4 : epoch + 1;
}

/// The epoch before `epoch`: the inverse of next_epoch().
ANYEP_HD constexpr std::uint32_t previous_epoch(std::uint32_t epoch) {
  return epoch == 4 ? 0xFFFF'FFFFu : epoch - 1;
}

/// Where every sequence starts: each engine passes the wrap after a thousand turns, so a fault there cannot hide.
inline constexpr std::uint32_t kFirstEpoch = 0xFFFF'FFFFu - 999;

/// Wrap-safe: is `epoch` at or after `wanted`?
ANYEP_HD constexpr bool not_before(std::uint32_t epoch, std::uint32_t wanted) {
  return static_cast<std::int32_t>(epoch - wanted) >= 0;
}

/// Same generation and not before. Never compared by ==: a fast peer may be ahead.
ANYEP_HD constexpr bool reached(std::uint64_t seen, std::uint64_t expected) {
  return generation_of(seen) == generation_of(expected) && epoch_of(seen) != 0 &&
         not_before(epoch_of(seen), epoch_of(expected));
}

/// The same epoch of the same generation, but of another call: the ranks are out of step.
ANYEP_HD constexpr bool contradicts(std::uint64_t seen, std::uint64_t expected) {
  return generation_of(seen) == generation_of(expected) && epoch_of(seen) == epoch_of(expected) &&
         code_of(seen) != code_of(expected);
}

ANYEP_HD constexpr std::uint64_t make_count(std::uint32_t epoch, std::uint32_t value) {
  return std::uint64_t{epoch} << 32 | value;
}
ANYEP_HD constexpr std::uint32_t count_epoch(std::uint64_t word) {
  return static_cast<std::uint32_t>(word >> 32);
}
ANYEP_HD constexpr std::uint32_t count_value(std::uint64_t word) {
  return static_cast<std::uint32_t>(word);
}

/// Adds to a digest (FNV-1a, 64 bits: enough to tell honest calls apart, no defence against malice).
ANYEP_HD constexpr std::uint64_t digest(std::uint64_t seed, std::uint64_t value) {
  for (int byte = 0; byte < 8; ++byte) seed = (seed ^ (value >> (8 * byte) & 0xFFu)) * 0x100000001B3ull;
  return seed;
}
inline constexpr std::uint64_t kDigestSeed = 0xCBF29CE484222325ull;

}  // namespace anyep::protocol
