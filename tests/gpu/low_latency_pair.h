// A low-latency pair whose every byte follows from a few numbers, so that a GPU can bring it and check it without a host: what is
// sent, what must arrive (src/reference says how), what experts answer, what must come back.
//
// Host and device run the same functions; Lanes is a warp, or one thread alone.
#pragma once

#include <anyep/config.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/bfloat16.h"
#include "core/fp8.h"
#include "core/routing.h"
#include "findings.h"

namespace anyep::test {

/// One pair as one rank runs it; equal on every rank but for `rank`.
struct PairCall {
  static constexpr int kMaxRanks = 8, kMostRows = 1024, kMostTopK = 32;
  int rank = 0, num_ranks = 1;
  int num_experts = 1, top_k = 1, hidden = 8, max_tokens = 1;
  int tokens[kMaxRanks] = {};
  Wire wire = Wire::kBF16;
  bool round_scale = false, wide_ids = true;
  int percent_unused = 0, percent_repeated = 0;  ///< of choices: -1, or some id out of range; the token's first again
  int percent_late = 0;                          ///< of the places where some rank may be late
  std::uint32_t salt = 0;

  ANYEP_HD int rows_per_expert() const { return num_ranks * max_tokens; }
  ANYEP_HD core::ExpertBlock experts_of(int at) const { return core::expert_block(num_experts, num_ranks, at); }
};

/// One rank's tensors of a pair, as the calls take them: scales [local_experts, columns, rows], the rest dense.
struct PairMemory {
  std::uint16_t* x = nullptr;
  void* ids = nullptr;
  float* weights = nullptr;
  std::byte* slab = nullptr;
  std::uint32_t* scales = nullptr;
  std::int32_t *counts = nullptr, *source = nullptr;
  std::int64_t* range = nullptr;
  std::uint16_t *answers = nullptr, *out = nullptr;
  const std::uint32_t* replay = nullptr;  ///< [1] changes what every pair brings
  Findings* findings = nullptr;
};

/// Four BF16 numbers, exponents from `least` on over eight powers of two.
struct Quad {
  std::uint16_t at[4];
};
ANYEP_HD inline Quad random_quad(std::uint32_t seed, int column, std::uint32_t least) {
  const std::uint32_t first = mix(seed + static_cast<std::uint32_t>(column / 4) * 0x9E3779B9u);
  const std::uint32_t both[2] = {first, mix(first ^ 0x85ebca6bu)};
  Quad quad;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t bits = both[i / 2] >> (i % 2 * 16);
    quad.at[i] = static_cast<std::uint16_t>((bits & 0x8000u) | (least + (bits >> 7 & 7u)) << 7 | (bits & 0x7Fu));
  }
  return quad;
}

/// What one pair brings in one replay.
struct Contents {
  const PairCall& call;
  std::uint32_t salt;

  ANYEP_HD Contents(const PairCall& of, std::uint32_t replay) : call(of), salt(mix(of.salt ^ mix(replay))) {}

  ANYEP_HD std::uint32_t seed_of(std::uint32_t kind, int rank, int token) const {
    return mix(salt + kind * 0xC2B2AE35u +
               mix(static_cast<std::uint32_t>(rank) << 24 ^ static_cast<std::uint32_t>(token)));
  }
  /// As the caller brings it.
  ANYEP_HD std::int64_t id(int rank, int token, int choice) const {
    const std::uint32_t seed = seed_of(1, rank, token);
    std::uint32_t random = mix(seed + static_cast<std::uint32_t>(choice));
    if (static_cast<int>(random % 100) < call.percent_unused) {
      return random % 7 != 0 ? -1 : random % 2 == 0 ? call.num_experts + 5 : -9;
    }
    if (static_cast<int>(random / 100 % 100) < call.percent_repeated) random = mix(seed);
    return (random >> 8) % static_cast<std::uint32_t>(call.num_experts);
  }
  /// As it counts.
  ANYEP_HD int expert(int rank, int token, int choice) const {
    const std::int64_t value = id(rank, token, choice);
    return value >= 0 && value < call.num_experts ? static_cast<int>(value) : -1;
  }
  ANYEP_HD bool chooses(int rank, int token, int expert_wanted) const {
    for (int choice = 0; choice < call.top_k; ++choice) {
      if (expert(rank, token, choice) == expert_wanted) return true;
    }
    return false;
  }
  ANYEP_HD float weight(int rank, int token, int choice) const {
    return static_cast<float>(mix(seed_of(2, rank, token) + static_cast<std::uint32_t>(choice)) % 1000) * 0.001f;
  }
  /// Columns `column` to `column` + 3; some blocks of 128 are all zero.
  ANYEP_HD Quad x(int rank, int token, int column) const {
    const std::uint32_t seed = seed_of(3, rank, token);
    const std::uint32_t block = mix(seed ^ static_cast<std::uint32_t>(column / 128) * 0x27D4EB2Fu);
    if (block % 64 == 0) return Quad{};
    return random_quad(seed, column, 112 + block % 16);
  }
  ANYEP_HD Quad answer(int expert_at, int rank, int token, int column) const {
    return random_quad(mix(seed_of(4, rank, token) + static_cast<std::uint32_t>(expert_at)), column, 121);
  }
  /// Nanoseconds by which this rank is late at a place; mostly 0.
  ANYEP_HD std::uint32_t late_ns(std::uint32_t place) const {
    const std::uint32_t random = mix(salt + place * 0x165667B1u);
    if (static_cast<int>(random % 100) >= call.percent_late) return 0;
    if ((random >> 8) % static_cast<std::uint32_t>(call.num_ranks) != static_cast<std::uint32_t>(call.rank)) return 0;
    return mix(random) % 100'000;
  }
};

/// A row that an expert gets: (source rank, token), packed.
ANYEP_HD inline std::int32_t pack_origin(int from, int token) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(from) << 16 | static_cast<std::uint32_t>(token));
}
ANYEP_HD inline int rank_of_origin(std::int32_t origin) {
  return origin >> 16;
}
ANYEP_HD inline int token_of_origin(std::int32_t origin) {
  return origin & 0xFFFF;
}

/// The rows of local expert `local` in the order of the contract go into origins; `range(from, begin, count)` for each source.
/// Returns their number. All lanes.
template <class Lanes, class Range>
ANYEP_HD int list_rows(const Lanes& lanes, const Contents& contents, int local, std::int32_t* origins, Range&& range) {
  const PairCall& call = contents.call;
  const int expert = call.experts_of(call.rank).first + local;
  int count = 0;
  for (int from = 0; from < call.num_ranks; ++from) {
    const int begin = count;
    for (int first = 0; first < call.tokens[from]; first += Lanes::kCount) {
      const int token = first + lanes.index();
      const bool chosen = token < call.tokens[from] && contents.chooses(from, token, expert);
      const std::uint32_t all = lanes.ballot(chosen);
      if (chosen) origins[count + count_bits(all & lanes.below())] = pack_origin(from, token);
      count += count_bits(all);
    }
    range(from, begin, count - begin);
  }
  return count;
}

/// Counts and ranges of one expert. All lanes; the last one's findings count.
ANYEP_HD inline void check_range(const PairCall& call, const PairMemory& memory, int local, int from, int begin,
                                 int count) {
  const auto got = static_cast<unsigned long long>(memory.range[local * call.num_ranks + from]);
  const unsigned long long want = static_cast<unsigned long long>(begin) << 32 | static_cast<unsigned>(count);
  find(*memory.findings, Field::kRange, call.salt, local, from, 0, got, want);
}

/// The bits of a row's scale word that a block has: all of a float, one byte of four exponents.
ANYEP_HD inline std::uint32_t scale_bits(const PairCall& call, float stored, int block) {
  if (call.wire == Wire::kFP8) return core::bits_of(stored);
  return static_cast<std::uint32_t>(core::ue8m0_of_scale(stored)) << (8 * (block % 4));
}

/// Compares what lies in `row` of an expert's slab with what `origin` brought, overwrites it, so that the next pair cannot
/// pass with it, and puts the expert's answer beside it. All lanes.
template <class Lanes>
ANYEP_HD void check_row(const Lanes& lanes, const Contents& contents, const PairMemory& memory, int local, int row,
                        std::int32_t origin) {
  const PairCall& call = contents.call;
  const int from = rank_of_origin(origin), token = token_of_origin(origin);
  const int expert = call.experts_of(call.rank).first + local, rows = call.rows_per_expert();
  const std::int64_t index = static_cast<std::int64_t>(local) * rows + row;
  const bool fp8 = call.wire != Wire::kBF16;
  Findings& findings = *memory.findings;
  if (lanes.index() == 0) {
    find(findings, Field::kSource, call.salt, local, row, 0, static_cast<std::uint32_t>(memory.source[index]),
         static_cast<std::uint32_t>(token));
    add(findings.rows, 1);
  }
  const int blocks = static_cast<int>(core::num_fp8_scales(call.hidden));
  const int blocks_of_scale = call.wire == Wire::kUE8M0 ? 4 : 1,
            columns = (blocks + blocks_of_scale - 1) / blocks_of_scale;
  std::uint32_t scale_word = 0;
  for (int block = 0; block < blocks; ++block) {
    const int begin = block * 128, end = begin + 128 < call.hidden ? begin + 128 : call.hidden;
    std::uint32_t amax = 0;
    for (int c = begin + 4 * lanes.index(); fp8 && c < end; c += 4 * Lanes::kCount) {
      const Quad x = contents.x(from, token, c);
      for (const std::uint16_t value : x.at) amax = amax > (value & 0x7FFFu) ? amax : value & 0x7FFFu;
    }
    core::Fp8Scale scale{};
    if (fp8) {
      const bool powers = call.wire == Wire::kUE8M0 || call.round_scale;
      scale = core::fp8_scale(core::float_of_bf16(static_cast<std::uint16_t>(lanes.largest(amax))),
                              powers ? core::ScaleRule::kPowerOfTwo : core::ScaleRule::kExact);
      scale_word |= scale_bits(call, scale.stored, block);
    }
    for (int c = begin + 4 * lanes.index(); c < end; c += 4 * Lanes::kCount) {
      const Quad x = contents.x(from, token, c);
      unsigned long long want = 0;
      if (fp8) {
        for (int i = 0; i < 4; ++i) {
          want |= static_cast<unsigned long long>(core::e4m3_of_float(core::float_of_bf16(x.at[i]) * scale.multiplier))
                  << (8 * i);
        }
        auto& got = *reinterpret_cast<std::uint32_t*>(memory.slab + index * call.hidden + c);
        find(findings, Field::kRow, call.salt, local, row, c, got, want);
        got = 0xFFFF'FFFFu;
      } else {
        for (int i = 0; i < 4; ++i) want |= static_cast<unsigned long long>(x.at[i]) << (16 * i);
        auto& got = *reinterpret_cast<unsigned long long*>(memory.slab + 2 * (index * call.hidden + c));
        find(findings, Field::kRow, call.salt, local, row, c, got, want);
        got = ~0ull;
      }
      const Quad answer = contents.answer(expert, from, token, c);
      for (int i = 0; i < 4; ++i) memory.answers[index * call.hidden + c + i] = answer.at[i];
    }
    if (fp8 && ((block + 1) % blocks_of_scale == 0 || block + 1 == blocks)) {
      const int column = block / blocks_of_scale;
      std::uint32_t& got = memory.scales[(static_cast<std::int64_t>(local) * columns + column) * rows + row];
      if (lanes.index() == 0) {
        find(findings, Field::kScale, call.salt, local, row, column, got, scale_word);
        got = 0xFFFF'FFFFu;
      }
      scale_word = 0;
    }
  }
}

/// Compares a token's sum: FP32 inside a rank in the order of the choices, rounded, ranks ascending (specification 10.3).
/// All lanes.
template <class Lanes>
ANYEP_HD void check_token(const Lanes& lanes, const Contents& contents, const PairMemory& memory, int token) {
  const PairCall& call = contents.call;
  int expert[PairCall::kMostTopK], host[PairCall::kMostTopK];
  float weight[PairCall::kMostTopK];
  for (int choice = 0; choice < call.top_k; ++choice) {
    expert[choice] = contents.expert(call.rank, token, choice);
    host[choice] = expert[choice] < 0 ? -1 : core::rank_of_expert(call.num_experts, call.num_ranks, expert[choice]);
    weight[choice] = contents.weight(call.rank, token, choice);
  }
  if (lanes.index() == 0) add(memory.findings->tokens, 1);
  for (int c = 4 * lanes.index(); c < call.hidden; c += 4 * Lanes::kCount) {
    float total[4] = {};
    for (int at = 0; at < call.num_ranks; ++at) {
      float part[4] = {};
      bool hosts = false;
      for (int choice = 0; choice < call.top_k; ++choice) {
        if (host[choice] != at) continue;
        hosts = true;
        const Quad answer = contents.answer(expert[choice], call.rank, token, c);
        for (int i = 0; i < 4; ++i) part[i] = fmaf(weight[choice], core::float_of_bf16(answer.at[i]), part[i]);
      }
      for (int i = 0; hosts && i < 4; ++i) total[i] += core::float_of_bf16(core::bf16_of_float(part[i]));
    }
    for (int i = 0; i < 4; ++i) {
      const std::uint16_t got = memory.out[static_cast<std::int64_t>(token) * call.hidden + c + i];
      find(*memory.findings, Field::kOut, call.salt, token, 0, c + i, got, core::bf16_of_float(total[i]));
    }
  }
}

}  // namespace anyep::test
