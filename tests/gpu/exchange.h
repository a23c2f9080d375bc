// A dispatch and combine of high throughput whose every byte follows from a few numbers, brought and checked without a host.
// Host and device run the same functions; Lanes is a warp, or one thread alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/bfloat16.h"
#include "core/routing.h"
#include "findings.h"

namespace anyep::test {

/// One exchange as one rank runs it; equal on every rank but for `rank`.
struct Exchange {
  static constexpr int kMaxRanks = 8, kMostTokens = 512;
  int rank = 0, num_ranks = 1, top_k = 1, num_experts = 1;
  int tokens[kMaxRanks] = {};
  int hidden = 8;          ///< BF16 elements, a multiple of 8
  std::uint32_t salt = 0;  ///< of this exchange
  int percent_unused = 0;  ///< of choices that are -1
};

/// One rank's tensors: ids [tokens, top_k], x and out [tokens, hidden], rows [received, hidden], the handle's arrays.
struct ExchangeMemory {
  std::int64_t* ids = nullptr;
  std::uint16_t *x = nullptr, *rows = nullptr, *out = nullptr;
  const std::int32_t *rows_until = nullptr, *source = nullptr;
  const std::uint32_t* replay = nullptr;  ///< [1] changes what every exchange brings
  Findings* findings = nullptr;
};

/// What one exchange brings in one replay.
struct ExchangeContents {
  const Exchange& e;
  std::uint32_t salt;

  ANYEP_HD ExchangeContents(const Exchange& of, std::uint32_t replay) : e(of), salt(mix(of.salt ^ mix(replay))) {}

  ANYEP_HD std::int64_t id(int rank, int token, int choice) const {
    const std::uint32_t random =
        mix(salt * 31u + mix(static_cast<std::uint32_t>(rank * 1000003 + token * 64 + choice)));
    if (static_cast<int>(random % 100) < e.percent_unused) return -1;
    return (random >> 8) % static_cast<std::uint32_t>(e.num_experts);
  }
  /// Bits of the ranks that a token goes to.
  ANYEP_HD std::uint32_t ranks_of(int rank, int token) const {
    std::uint32_t ranks = 0;
    for (int choice = 0; choice < e.top_k; ++choice) {
      const std::int64_t expert = id(rank, token, choice);
      if (expert >= 0) ranks |= 1u << core::rank_of_expert(e.num_experts, e.num_ranks, static_cast<int>(expert));
    }
    return ranks;
  }
  ANYEP_HD std::uint32_t seed_of(int rank, int token) const {
    return mix(salt ^ mix(static_cast<std::uint32_t>(rank) << 24 ^ static_cast<std::uint32_t>(token)));
  }
  /// Small integers: eight of them add up without rounding in BF16.
  ANYEP_HD static std::uint16_t x(std::uint32_t seed, int column) {
    const std::uint32_t random = mix(seed + static_cast<std::uint32_t>(column) * 0x9E3779B9u);
    return core::bf16_of_float(static_cast<float>(random % 32));
  }
};

/// The tokens of rank `from` that come here, ascending, into `tokens`, unless it is null. Returns their number. All lanes.
template <class Lanes>
ANYEP_HD int list_tokens(const Lanes& lanes, const ExchangeContents& contents, int from, std::int32_t* tokens) {
  const Exchange& e = contents.e;
  int count = 0;
  for (int first = 0; first < e.tokens[from]; first += Lanes::kCount) {
    const int token = first + lanes.index();
    const bool comes = token < e.tokens[from] && (contents.ranks_of(from, token) >> e.rank & 1u) != 0;
    const std::uint32_t all = lanes.ballot(comes);
    if (comes && tokens != nullptr) tokens[count + count_bits(all & lanes.below())] = token;
    count += count_bits(all);
  }
  return count;
}

/// A received row and where it says that it came from. All lanes.
template <class Lanes>
ANYEP_HD void check_row(const Lanes& lanes, const ExchangeContents& contents, const ExchangeMemory& memory, int from,
                        int row, int token) {
  const Exchange& e = contents.e;
  if (lanes.index() == 0) {
    find(*memory.findings, Field::kSource, e.salt, from, row, 0, static_cast<std::uint32_t>(memory.source[row]),
         static_cast<std::uint32_t>(token));
    add(memory.findings->rows, 1);
  }
  const std::uint32_t seed = contents.seed_of(from, token);
  const std::uint16_t* const got = memory.rows + static_cast<std::int64_t>(row) * e.hidden;
  for (int c = lanes.index(); c < e.hidden; c += Lanes::kCount) {
    find(*memory.findings, Field::kRow, e.salt, from, row, c, got[c], ExchangeContents::x(seed, c));
  }
}

/// A token's sum of what came back unchanged: as many times x as ranks host a choice of it. All lanes.
template <class Lanes>
ANYEP_HD void check_sum(const Lanes& lanes, const ExchangeContents& contents, const ExchangeMemory& memory, int token) {
  const Exchange& e = contents.e;
  const auto times = static_cast<float>(count_bits(contents.ranks_of(e.rank, token)));
  const std::uint32_t seed = contents.seed_of(e.rank, token);
  const std::uint16_t* const got = memory.out + static_cast<std::int64_t>(token) * e.hidden;
  if (lanes.index() == 0) add(memory.findings->tokens, 1);
  for (int c = lanes.index(); c < e.hidden; c += Lanes::kCount) {
    const float want = core::float_of_bf16(ExchangeContents::x(seed, c)) * times;
    find(*memory.findings, Field::kOut, e.salt, token, 0, c, got[c], core::bf16_of_float(want));
  }
}

}  // namespace anyep::test
