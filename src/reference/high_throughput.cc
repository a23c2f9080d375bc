#include "reference/high_throughput.h"

#include "reference/views.h"

#include <cstring>

namespace anyep::reference {
namespace {

void append_choices(ReceivedRows& out, const Rows& in, std::int64_t token, const Route& at) {
  const Block block = experts_of(at.rank, at.num_ranks, at.num_experts);
  for (std::int64_t slot = 0; slot < in.experts.shape[1]; ++slot) {
    const std::int64_t expert = choice(in.experts, token, slot, at.num_experts);
    out.experts.push_back(block.holds(expert) ? expert - block.first : -1);
    if (!in.weights.given()) continue;
    float weight = 0;
    if (block.holds(expert)) std::memcpy(&weight, element(in.weights, token, slot), sizeof weight);
    out.weights.push_back(weight);
  }
}

void append_token(ReceivedRows& out, const Rows& in, std::int64_t token, const Route& at) {
  append_row(out.x, in.x, token);
  if (in.scales.given()) append_row(out.scales, in.scales, token);
  out.extra.resize(in.extra.size());
  for (std::size_t i = 0; i < in.extra.size(); ++i) append_row(out.extra[i], in.extra[i], token);
  if (in.experts.given()) append_choices(out, in, token, at);
  ++out.num_rows;
}

}  // namespace

std::vector<ReceivedRows> dispatch(std::span<const Route> routes, std::span<const Rows> in,
                                   std::span<const std::int64_t> out_rows) {
  std::vector<ReceivedRows> received(routes.size());
  for (std::size_t at = 0; at < routes.size(); ++at) {
    ReceivedRows& out = received[at];
    const std::int64_t room = out_rows.empty() ? routes[at].num_rows : out_rows[at];
    out.extra.resize(in[at].extra.size());
    for (std::size_t from = 0; from < routes.size(); ++from) {
      for (std::int64_t token = 0; token < routes[from].num_tokens; ++token) {
        const bool comes = routes[from].place_at(token, static_cast<int>(at)) >= 0;
        if (comes && out.num_rows < room) append_token(out, in[from], token, routes[at]);
      }
    }
    if (in[at].experts.given()) out.experts.resize(static_cast<std::size_t>(room * in[at].experts.shape[1]), -1);
  }
  return received;
}

namespace {

/// Element `column` of the answer for one token.
float sum_of(std::span<const Route> routes, std::span<const CombineInput> in, std::size_t rank, std::int64_t token,
             std::int64_t column) {
  const CombineInput& mine = in[rank];
  const DType dtype = mine.x.dtype;
  const float bias_0 = mine.bias[0].given() ? load(dtype, element(mine.bias[0], token, column)) : 0.0f;
  const float bias_1 = mine.bias[1].given() ? load(dtype, element(mine.bias[1], token, column)) : 0.0f;
  float sum = bias_0 + bias_1;
  for (std::size_t at = 0; at < routes.size(); ++at) {
    const std::int32_t row = routes[rank].place_at(token, static_cast<int>(at));
    if (row >= 0) sum += load(dtype, element(in[at].x, row, column));
  }
  return sum;
}

float sum_of_weights(std::span<const Route> routes, std::span<const CombineInput> in, std::size_t rank,
                     std::int64_t token, std::int64_t column) {
  float sum = 0;
  for (std::size_t at = 0; at < routes.size(); ++at) {
    const std::int32_t row = routes[rank].place_at(token, static_cast<int>(at));
    if (row >= 0) sum += load(DType::kF32, element(in[at].weights, row, column));
  }
  return sum;
}

}  // namespace

std::vector<CombinedRows> combine(std::span<const Route> routes, std::span<const CombineInput> in) {
  std::vector<CombinedRows> combined(routes.size());
  for (std::size_t rank = 0; rank < routes.size(); ++rank) {
    const DType dtype = in[rank].x.dtype;
    const std::int64_t hidden = in[rank].x.shape[1];
    CombinedRows& out = combined[rank];
    out.x.resize(static_cast<std::size_t>(routes[rank].num_tokens * hidden) * size_of(dtype));
    std::byte* at = out.x.data();
    for (std::int64_t token = 0; token < routes[rank].num_tokens; ++token) {
      for (std::int64_t column = 0; column < hidden; ++column, at += size_of(dtype)) {
        store(dtype, at, sum_of(routes, in, rank, token, column));
      }
      for (std::int64_t column = 0; in[rank].weights.given() && column < in[rank].weights.shape[1]; ++column) {
        out.weights.push_back(sum_of_weights(routes, in, rank, token, column));
      }
    }
  }
  return combined;
}

}  // namespace anyep::reference
