#include "support/payload.h"

#include <algorithm>
#include <cstring>

namespace anyep::test {
namespace {

std::uint64_t scramble(std::uint64_t x) {  // the finaliser of SplitMix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// Sign, exponent and mantissa of a value below 2^highest from 32 random bits.
std::uint32_t finite_bits(DType dtype, std::uint32_t random, std::uint32_t highest) {
  const std::uint32_t sign = random >> 31;
  const std::uint32_t step = (random >> 28) & 7u;  // exponent above the least one
  if ((random & 0xffu) == 0) return 0;
  switch (dtype) {
    case DType::kBF16:
      return (sign << 15) | ((119u + highest + step) << 7) | ((random >> 8) & 0x7fu);
    case DType::kF16:
      return (sign << 15) | ((7u + highest + step) << 10) | ((random >> 8) & 0x3ffu);
    default:
      return (sign << 31) | ((119u + highest + step) << 23) | ((random * 0x9e3779b1u) >> 9);
  }
}

}  // namespace

std::uint64_t mix(std::uint64_t seed, std::uint64_t a, std::uint64_t b, std::uint64_t c) {
  return scramble(scramble(scramble(scramble(seed) ^ a) ^ b) ^ c);
}

void fill_row(std::span<std::byte> row, Fill fill, DType dtype, std::uint64_t key) {
  const std::size_t width = fill == Fill::kBits ? 8 : size_of(dtype);
  const std::uint32_t highest = fill == Fill::kFinite ? 1 : 0;
  for (std::size_t at = 0, index = 0; at < row.size(); at += width, ++index) {
    const std::uint64_t random = scramble(key + index * 0x9e3779b97f4a7c15u);
    const std::uint64_t bits =
        fill == Fill::kBits ? random : finite_bits(dtype, static_cast<std::uint32_t>(random >> 32), highest);
    std::memcpy(row.data() + at, &bits, std::min(width, row.size() - at));  // little endian
  }
}

float weight_of(std::uint64_t key, std::uint64_t slot) {
  return static_cast<float>((mix(key, slot) >> 40) + 1) * 0x1p-24f;
}

}  // namespace anyep::test
