// One random call of all ranks, and what must come out: an oracle in plain loops.
#pragma once

#include <anyep/types.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "core/bfloat16.h"
#include "core/routing.h"

namespace anyep::test {

enum class Routes { kUniform, kSparse, kHot, kDuplicates, kNone, kWild };

struct Case {
  std::uint64_t seed = 0;
  int num_ranks = 2, num_experts = 8, top_k = 2;
  std::vector<int> tokens;
  Routes routes = Routes::kUniform;
  DType dtype = DType::kBF16;
  int hidden = 64;
  int num_scales = 0, extra_elements = 0;
  bool wide_in = true, wide_out = true, by_columns = false, with_ids = true, given_ranks = false;
  int x_beside = 0, x_pad = 0;  ///< bytes: address and stride of x off their alignment
  int room = 0;                 ///< 0 exactly, 1 the worst case with marked rest, 2 too small
  int num_sms = 4, num_weights = 0, num_bias = 0;
  bool gather[8] = {};
  std::int64_t tokens_per_turn = INT64_MAX;

  int element_bytes() const { return dtype == DType::kF32 ? 4 : 2; }
  std::uint32_t row_bytes() const { return static_cast<std::uint32_t>(hidden * element_bytes()); }
};

/// Inputs of a rank, and what it must get.
struct RankCase {
  std::vector<std::int64_t> ids;                       ///< [tokens, top_k]
  std::vector<float> weights;                          ///< likewise
  std::vector<std::byte> x;                            ///< [tokens, row bytes]
  std::vector<std::uint32_t> scales;                   ///< [tokens, num_scales]
  std::vector<std::uint16_t> extra;                    ///< [tokens, extra_elements]
  std::vector<std::uint8_t> in_rank;                   ///< [tokens, ranks]
  std::vector<std::int32_t> place;                     ///< [tokens, ranks]
  std::vector<std::int32_t> from, source, rows_until;  ///< rows: source rank, token
  std::vector<std::int32_t> pairs;
  std::vector<std::byte> y, bias[2];  ///< input of combine: [rows, row bytes]; [tokens, row bytes]
  std::vector<float> y_weights;       ///< [rows, num_weights]
  std::uint64_t out_of_range = 0;
  int rows() const { return static_cast<int>(source.size()); }
};

inline std::vector<std::byte> random_elements(const Case& c, std::size_t count, std::mt19937_64& random) {
  std::vector<std::byte> bytes(count * static_cast<std::size_t>(c.element_bytes()));
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t bits = random();
    float value = static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-28f;
    if ((bits >> 40) % 97 == 0) value = -0.0f;
    if ((bits >> 40) % 1009 == 1) value = __builtin_nanf("");
    if ((bits >> 40) % 1009 == 2) value = 0x1p126f;
    if (c.dtype == DType::kF32) {
      std::memcpy(bytes.data() + i * 4, &value, 4);
    } else {
      const std::uint16_t half = c.dtype == DType::kBF16 ? core::bf16_of_float(value) : core::fp16_of_float(value);
      std::memcpy(bytes.data() + i * 2, &half, 2);
    }
  }
  return bytes;
}

inline std::int64_t random_id(const Case& c, int token, int choice, std::mt19937_64& random) {
  const auto experts = static_cast<std::uint64_t>(c.num_experts);
  switch (c.routes) {
    case Routes::kNone:
      return -1;
    case Routes::kSparse:
      return random() % 3 == 0 ? static_cast<std::int64_t>(random() % experts) : -1;
    case Routes::kHot:
      return choice % 2 == 0 ? 0 : static_cast<std::int64_t>(random() % experts);
    case Routes::kDuplicates:
      return static_cast<std::int64_t>((static_cast<std::uint64_t>(token) * 7 + 3) % experts);
    case Routes::kWild: {
      const std::uint64_t kind = random() % 8;
      if (kind == 0) return c.wide_in ? INT64_MAX : INT32_MAX;
      if (kind == 1) return static_cast<std::int64_t>(experts);
      if (kind == 2) return c.wide_in ? (std::int64_t{1} << 32) : INT32_MIN;
      return static_cast<std::int64_t>(random() % experts);
    }
    default:
      return static_cast<std::int64_t>(random() % experts);
  }
}

inline RankCase make_inputs(const Case& c, int rank) {
  std::mt19937_64 random(c.seed * 64 + static_cast<std::uint64_t>(rank));
  RankCase in;
  const auto tokens = static_cast<std::size_t>(c.tokens[static_cast<std::size_t>(rank)]);
  for (std::size_t token = 0; token < tokens; ++token) {
    std::vector<std::uint8_t> goes(static_cast<std::size_t>(c.num_ranks));
    for (int choice = 0; choice < c.top_k; ++choice) {
      const std::int64_t id = random_id(c, static_cast<int>(token), choice, random);
      in.ids.push_back(id);
      in.weights.push_back(static_cast<float>(random() % 1000) + 0.5f);
      if (id >= 0 && id < c.num_experts) {
        goes[static_cast<std::size_t>(core::rank_of_expert(c.num_experts, c.num_ranks, static_cast<int>(id)))] = 1;
      } else if (id != -1) {
        ++in.out_of_range;
      }
    }
    if (c.given_ranks) {
      for (std::uint8_t& go : goes) go = random() % 2 == 0 ? 0 : 3;
    }
    in.in_rank.insert(in.in_rank.end(), goes.begin(), goes.end());
  }
  in.x.resize(tokens * c.row_bytes());
  for (std::byte& byte : in.x) byte = static_cast<std::byte>(random());
  in.scales.resize(tokens * static_cast<std::size_t>(c.num_scales));
  for (std::uint32_t& scale : in.scales) scale = static_cast<std::uint32_t>(random());
  in.extra.resize(tokens * static_cast<std::size_t>(c.extra_elements));
  for (std::uint16_t& value : in.extra) value = static_cast<std::uint16_t>(random());
  for (int bias = 0; bias < c.num_bias; ++bias) {
    in.bias[bias] = random_elements(c, tokens * static_cast<std::size_t>(c.hidden), random);
  }
  return in;
}

/// All ranks' inputs and routes.
inline std::vector<RankCase> make_case(const Case& c) {
  std::vector<RankCase> all;
  for (int rank = 0; rank < c.num_ranks; ++rank) all.push_back(make_inputs(c, rank));
  for (int from = 0; from < c.num_ranks; ++from) {
    RankCase& sender = all[static_cast<std::size_t>(from)];
    sender.place.assign(sender.in_rank.size(), -1);
  }
  for (int at = 0; at < c.num_ranks; ++at) {
    RankCase& receiver = all[static_cast<std::size_t>(at)];
    const core::ExpertBlock block = core::expert_block(c.num_experts, c.num_ranks, at);
    receiver.pairs.assign(static_cast<std::size_t>(block.count), 0);
    for (int from = 0; from < c.num_ranks; ++from) {
      RankCase& sender = all[static_cast<std::size_t>(from)];
      for (int token = 0; token < c.tokens[static_cast<std::size_t>(from)]; ++token) {
        const auto index = static_cast<std::size_t>(token * c.num_ranks + at);
        if (sender.in_rank[index] == 0) continue;
        sender.place[index] = receiver.rows();
        receiver.from.push_back(from);
        receiver.source.push_back(token);
      }
      receiver.rows_until.push_back(receiver.rows());
      for (const std::int64_t id : sender.ids) {
        if (id >= block.first && id < block.first + block.count)
          ++receiver.pairs[static_cast<std::size_t>(id - block.first)];
      }
    }
    std::mt19937_64 random(c.seed * 64 + 32 + static_cast<std::uint64_t>(at));
    receiver.y = random_elements(c, static_cast<std::size_t>(receiver.rows() * c.hidden), random);
    for (int i = 0; i < receiver.rows() * c.num_weights; ++i) {
      receiver.y_weights.push_back(static_cast<float>(random() % 100000) * 0.37f);
    }
  }
  return all;
}

inline float load_element(const Case& c, const std::byte* row, int column) {
  if (c.dtype == DType::kF32) {
    float value;
    std::memcpy(&value, row + column * 4, 4);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, row + column * 2, 2);
  return c.dtype == DType::kBF16 ? core::float_of_bf16(half) : core::float_of_fp16(half);
}

inline void store_element(const Case& c, std::byte* row, int column, float value) {
  if (c.dtype == DType::kF32) {
    value = core::canonical(value);
    std::memcpy(row + column * 4, &value, 4);
    return;
  }
  const std::uint16_t half = c.dtype == DType::kBF16 ? core::bf16_of_float(value) : core::fp16_of_float(value);
  std::memcpy(row + column * 2, &half, 2);
}

/// What combine must give rank `home`: biases, then ranks ascending, in float32; one rounding.
inline std::vector<std::byte> sums_of(const Case& c, const std::vector<RankCase>& all, int home,
                                      std::vector<float>& weights) {
  const RankCase& mine = all[static_cast<std::size_t>(home)];
  const int tokens = c.tokens[static_cast<std::size_t>(home)];
  std::vector<std::byte> out(static_cast<std::size_t>(tokens) * c.row_bytes());
  for (int token = 0; token < tokens; ++token) {
    std::vector<float> sum(static_cast<std::size_t>(c.hidden)), weight(static_cast<std::size_t>(c.num_weights));
    const std::size_t at = static_cast<std::size_t>(token) * c.row_bytes();
    for (int column = 0; column < c.hidden; ++column) {
      const float first = c.num_bias > 0 ? load_element(c, mine.bias[0].data() + at, column) : 0.0f;
      const float second = c.num_bias > 1 ? load_element(c, mine.bias[1].data() + at, column) : 0.0f;
      sum[static_cast<std::size_t>(column)] = first + second;
    }
    for (int rank = 0; rank < c.num_ranks; ++rank) {
      const std::int32_t row = mine.place[static_cast<std::size_t>(token * c.num_ranks + rank)];
      if (row < 0) continue;
      const RankCase& expert = all[static_cast<std::size_t>(rank)];
      const std::byte* const y = expert.y.data() + static_cast<std::size_t>(row) * c.row_bytes();
      for (int column = 0; column < c.hidden; ++column)
        sum[static_cast<std::size_t>(column)] += load_element(c, y, column);
      for (int i = 0; i < c.num_weights; ++i) {
        weight[static_cast<std::size_t>(i)] += expert.y_weights[static_cast<std::size_t>(row * c.num_weights + i)];
      }
    }
    for (int column = 0; column < c.hidden; ++column)
      store_element(c, out.data() + at, column, sum[static_cast<std::size_t>(column)]);
    weights.insert(weights.end(), weight.begin(), weight.end());
  }
  return out;
}

}  // namespace anyep::test
