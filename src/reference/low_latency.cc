#include "reference/low_latency.h"

#include "core/bfloat16.h"
#include "core/fp8.h"
#include "core/logfmt.h"
#include "reference/views.h"

#include <cmath>
#include <cstring>

namespace anyep::reference {
namespace {

bool chooses(const Routing& routing, std::int64_t token, std::int64_t expert, int num_experts) {
  for (std::int64_t slot = 0; slot < routing.experts.shape[1]; ++slot) {
    if (choice(routing.experts, token, slot, num_experts) == expert) return true;
  }
  return false;
}

std::size_t x_bytes(Wire wire) {
  return wire == Wire::kBF16 ? 2 : 1;
}

/// Writes one token's row, as it is or cast, with its scales, to row `row` of expert `expert`.
void put_row(Slabs& out, int expert, std::int64_t row, const std::byte* x, std::int64_t hidden, const CastRule& rule) {
  const std::int64_t at = expert * out.rows_per_expert + row;
  const auto width = static_cast<std::size_t>(hidden) * x_bytes(rule.wire);
  std::byte* const to = out.x.data() + static_cast<std::size_t>(at) * width;
  if (rule.wire == Wire::kBF16) {
    std::memcpy(to, x, width);
    return;
  }
  const std::int64_t columns = scale_columns(rule.wire, hidden);
  std::vector<std::uint16_t> values(static_cast<std::size_t>(hidden));
  std::memcpy(values.data(), x, values.size() * 2);
  std::vector<std::uint32_t> scales(static_cast<std::size_t>(columns));
  core::Fp8Cast cast{values.data(), hidden, reinterpret_cast<std::uint8_t*>(to), scales.data()};
  cast.rule = rule.round_scale ? core::ScaleRule::kPowerOfTwo : core::ScaleRule::kExact;
  cast.form = rule.wire == Wire::kUE8M0 ? core::ScaleForm::kUE8M0 : core::ScaleForm::kF32;
  core::cast_fp8_row(cast);
  for (std::int64_t column = 0; column < columns; ++column) {
    const std::int64_t index = (expert * columns + column) * out.rows_per_expert + row;
    std::memcpy(out.scales.data() + index * 4, &scales[static_cast<std::size_t>(column)], 4);
  }
}

Slabs empty_slabs(const Shape& shape, int num_ranks, int local_experts, Wire wire) {
  Slabs out;
  out.local_experts = local_experts;
  out.rows_per_expert = num_ranks * shape.max_tokens;
  const auto rows = static_cast<std::size_t>(local_experts * out.rows_per_expert);
  out.x.resize(rows * static_cast<std::size_t>(shape.hidden) * x_bytes(wire));
  out.scales.resize(rows * static_cast<std::size_t>(scale_columns(wire, shape.hidden)) * 4);
  out.counts.assign(static_cast<std::size_t>(local_experts), 0);
  out.source.assign(rows, 0);
  out.range.assign(static_cast<std::size_t>(local_experts * num_ranks), 0);
  return out;
}

}  // namespace

std::int64_t scale_columns(Wire wire, std::int64_t hidden) {
  switch (wire) {
    case Wire::kFP8:
      return (hidden + 127) / 128;
    case Wire::kUE8M0:
      return (hidden + 511) / 512;
    default:
      return 0;
  }
}

std::vector<Slabs> low_latency_dispatch(const Shape& shape, std::span<const TensorView> x,
                                        std::span<const Routing> routing, const CastRule& cast) {
  const int num_ranks = static_cast<int>(routing.size());
  std::vector<Slabs> slabs;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const Block block = experts_of(rank, num_ranks, shape.num_experts);
    Slabs& out = slabs.emplace_back(empty_slabs(shape, num_ranks, block.count, cast.wire));
    for (int expert = 0; expert < block.count; ++expert) {
      std::int32_t& count = out.counts[static_cast<std::size_t>(expert)];
      for (std::size_t from = 0; from < routing.size(); ++from) {
        const std::int32_t begin = count;
        for (std::int64_t token = 0; token < x[from].shape[0]; ++token) {
          if (!chooses(routing[from], token, block.first + expert, shape.num_experts)) continue;
          put_row(out, expert, count, element(x[from], token, 0), shape.hidden, cast);
          out.source[static_cast<std::size_t>(expert * out.rows_per_expert + count)] = static_cast<std::int32_t>(token);
          ++count;
        }
        out.range[static_cast<std::size_t>(expert * num_ranks) + from] =
            (static_cast<std::int64_t>(begin) << 32) | (count - begin);
      }
    }
  }
  return slabs;
}

namespace {

/// One combine: what all ranks bring.
struct Sum {
  const Shape& shape;
  std::span<const ExpertSlabs> in;
  std::span<const Routing> routing;
  const SumRule& rule;

  int num_ranks() const { return static_cast<int>(routing.size()); }
  Block block(int rank) const { return experts_of(rank, num_ranks(), shape.num_experts); }
};

/// The row that local expert `expert` of rank `at` holds for a token; null when dispatch brought none.
const std::byte* row_of(const ExpertSlabs& slabs, int expert, std::size_t from, std::int64_t token) {
  const std::int64_t range = *(slabs.range.as<std::int64_t>() + expert * slabs.range.strides[0] +
                               static_cast<std::int64_t>(from) * slabs.range.strides[1]);
  const std::int64_t begin = range >> 32;
  const std::int64_t end = begin + (range & 0xffffffff);
  for (std::int64_t row = begin; row < end; ++row) {
    if (slabs.source.as<std::int32_t>()[expert * slabs.source.strides[0] + row * slabs.source.strides[1]] == token) {
      return slabs.x.as<std::byte>() + 2 * (expert * slabs.x.strides[0] + row * slabs.x.strides[1]);
    }
  }
  return nullptr;
}

/// A row as it arrives at the source.
std::vector<float> arrived(const std::byte* row, const Sum& sum) {
  const std::int64_t hidden = sum.shape.hidden;
  std::vector<std::uint16_t> values(static_cast<std::size_t>(hidden));
  std::memcpy(values.data(), row, values.size() * 2);
  std::vector<float> floats(values.size());
  if (sum.rule.wire == Wire::kLogFMT) {
    std::vector<std::uint8_t> coded(static_cast<std::size_t>(core::logfmt_max_bytes(hidden)));
    core::logfmt_encode(values.data(), hidden, coded.data());
    core::logfmt_decode(coded.data(), hidden, floats.data());
  } else {
    for (std::size_t i = 0; i < values.size(); ++i) floats[i] = core::float_of_bf16(values[i]);
  }
  return floats;
}

/// The rank that hosts the expert of one choice; -1 for an unused one.
int host_of(const Sum& sum, std::size_t rank, std::int64_t token, std::int64_t slot) {
  const std::int64_t expert = choice(sum.routing[rank].experts, token, slot, sum.shape.num_experts);
  for (int at = 0; at < sum.num_ranks(); ++at) {
    if (sum.block(at).holds(expert)) return at;
  }
  return -1;
}

/// acc = fma(weight, row, acc) for one choice, hosted by `at`.
void add_choice(std::vector<float>& acc, const Sum& sum, std::size_t rank, std::int64_t token, std::int64_t slot,
                int at) {
  const Routing& routing = sum.routing[rank];
  const std::int64_t expert = choice(routing.experts, token, slot, sum.shape.num_experts);
  const int local = static_cast<int>(expert) - sum.block(at).first;
  const std::byte* row = row_of(sum.in[static_cast<std::size_t>(at)], local, rank, token);
  if (row == nullptr) return;
  const float weight = load(DType::kF32, element(routing.weights, token, slot));
  const std::vector<float> values = arrived(row, sum);
  for (std::size_t i = 0; i < acc.size(); ++i) acc[i] = std::fma(weight, values[i], acc[i]);
}

float rounded(float value) {
  return core::float_of_bf16(core::bf16_of_float(value));
}

/// One token's answer before its last rounding.
std::vector<float> sum_of(const Sum& sum, std::size_t rank, std::int64_t token) {
  const std::int64_t top_k = sum.routing[rank].experts.shape[1];
  std::vector<float> total(static_cast<std::size_t>(sum.shape.hidden), 0.0f);
  if (sum.rule.exact) {
    for (std::int64_t slot = 0; slot < top_k; ++slot) {
      const int at = host_of(sum, rank, token, slot);
      if (at >= 0) add_choice(total, sum, rank, token, slot, at);
    }
    return total;
  }
  for (int at = 0; at < sum.num_ranks(); ++at) {
    bool hosts = false;
    std::vector<float> part(total.size(), 0.0f);
    for (std::int64_t slot = 0; slot < top_k; ++slot) {
      if (host_of(sum, rank, token, slot) != at) continue;
      hosts = true;
      add_choice(part, sum, rank, token, slot, at);
    }
    for (std::size_t i = 0; hosts && i < total.size(); ++i) total[i] += rounded(part[i]);
  }
  return total;
}

}  // namespace

std::vector<std::vector<std::byte>> low_latency_combine(const Shape& shape, std::span<const ExpertSlabs> in,
                                                        std::span<const Routing> routing, const SumRule& rule) {
  const Sum sum{shape, in, routing, rule};
  std::vector<std::vector<std::byte>> combined(routing.size());
  for (std::size_t rank = 0; rank < routing.size(); ++rank) {
    const std::int64_t tokens = routing[rank].experts.shape[0];
    combined[rank].resize(static_cast<std::size_t>(tokens * shape.hidden) * 2);
    std::byte* at = combined[rank].data();
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (const float value : sum_of(sum, rank, token)) {
        store(DType::kBF16, at, value);
        at += 2;
      }
    }
  }
  return combined;
}

}  // namespace anyep::reference
