// What one rank tells the others about itself, and what this process may use.
#pragma once

#include <anyep/topology.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

namespace anyep::core {

/// The bytes that discover() gathers. Its size and the places of magic and version never change; kVersion changes with
/// the rest of it, with what create() exchanges and with the words and layouts that ranks share.
struct Introduction {
  static constexpr std::uint64_t kMagic = 0x3144495045594e41;  // "ANYEPID1"
  static constexpr std::uint32_t kVersion = 1;

  std::uint64_t magic = kMagic;
  std::uint32_t version = kVersion;
  std::int32_t rank = 0;       ///< the rank that this process claims
  std::int32_t num_ranks = 0;  ///< the size of the group as this process sees it
  std::int32_t cores = 1;
  std::int64_t pid = 0;
  std::uint64_t host = 0;
  char library[36] = {};  ///< anyep::version(), cut, zeros to the end
  std::uint32_t page_bytes = 4096;
  std::uint64_t checksum = 0;  ///< digest of everything before it

  std::string_view library_text() const;
  std::uint64_t expected_checksum() const;
};
static_assert(sizeof(Introduction) == 88 && offsetof(Introduction, checksum) == 80);
static_assert(std::is_trivially_copyable_v<Introduction> && std::endian::native == std::endian::little);

/// What this process says of itself, checksum included.
Introduction introduce_self(int rank, int num_ranks);

/// Refuses what cannot form a group; the same data gives the same verdict on every rank.
/// @throws Error kCorrupt, kMismatch, with `rank` as the reporting rank.
void check_introductions(std::span<const Introduction> all, int rank);

/// Digest of boot id and of the mount and process namespaces: equal for processes that can pass each other descriptors
/// and watch each other's death.
std::uint64_t host_digest();

/// Processors that this process may be scheduled on.
int usable_cores() noexcept;

/// FNV-1a, 64 bits: to compare, not to authenticate.
std::uint64_t digest(std::string_view bytes) noexcept;

/// @throws Error kArgument for a group size outside 1..kMaxRanks or a rank outside the group.
void check_rank(std::string_view op, int rank, int num_ranks);

}  // namespace anyep::core
