#include "support/inputs.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "reference/routing.h"

namespace anyep::test {

std::byte* Tensors::add(std::size_t bytes, std::size_t misaligned) {
  return memory_.emplace_back(bytes, misaligned).data();
}

TensorView Tensors::add(DType dtype, const Extents& shape, std::size_t misaligned) {
  TensorView view = TensorView::dense(nullptr, dtype, shape);
  view.data = add(static_cast<std::size_t>(view.num_elements()) * size_of(dtype), misaligned);
  return view;
}

void Tensors::seal() {
  for (Guarded& each : memory_) each.seal();
}

std::string Tensors::damage() const {
  for (const Guarded& each : memory_) {
    if (const std::string what = each.damage(); !what.empty()) return what;
  }
  return {};
}

std::uint64_t row_key(std::uint64_t step_key, Part part, int index, int rank, std::int64_t row) {
  const auto which = static_cast<std::uint64_t>(part) * 16 + static_cast<std::uint64_t>(index);
  return mix(step_key, which, static_cast<std::uint64_t>(rank), static_cast<std::uint64_t>(row));
}

std::vector<std::byte> row_bytes(std::size_t bytes, Fill fill, DType dtype, std::uint64_t key) {
  std::vector<std::byte> row(bytes);
  fill_row(row, fill, dtype, key);
  return row;
}

bool other_ranks(std::uint64_t step_key, int rank, std::int64_t token, int at) {
  return mix(step_key, 77, static_cast<std::uint64_t>(rank * 64 + at), static_cast<std::uint64_t>(token)) % 3 == 0;
}

std::int64_t scale_token(const DispatchStep& step, std::int64_t token) {
  return step.scale_strides == Strides::kBroadcast ? 0 : token;
}

namespace {

TensorView id_tensor(Tensors& tensors, const Choices& choices, Ids ids, int rank) {
  const std::int64_t tokens = choices.num_tokens(rank);
  const DType dtype = ids == Ids::kInt32 ? DType::kI32 : DType::kI64;
  const TensorView view = tensors.add(dtype, {tokens, choices.top_k});
  for (std::int64_t i = 0; i < tokens * choices.top_k; ++i) {
    const std::int64_t id = choices.ids[static_cast<std::size_t>(rank)][static_cast<std::size_t>(i)];
    if (ids == Ids::kInt32)
      view.as<std::int32_t>()[i] = static_cast<std::int32_t>(id);
    else
      view.as<std::int64_t>()[i] = id;
  }
  return view;
}

/// Rows of `view`, dense: row i from its key.
void fill_rows(const TensorView& view, Fill fill, std::uint64_t step_key, Part part, int index, int rank) {
  const std::size_t bytes = static_cast<std::size_t>(view.shape[1]) * size_of(view.dtype);
  for (std::int64_t row = 0; row < view.shape[0]; ++row) {
    fill_row({view.as<std::byte>() + static_cast<std::size_t>(row) * bytes, bytes}, fill, view.dtype,
             row_key(step_key, part, index, rank, row));
  }
}

TensorView scale_tensor(Tensors& tensors, const DispatchStep& step, std::uint64_t step_key, int rank,
                        std::int64_t tokens) {
  constexpr std::int64_t kGap = 3;
  const std::int64_t columns = step.num_scales;
  TensorView view = TensorView::dense(nullptr, step.scale_type, {tokens, columns});
  if (step.scale_strides == Strides::kColumns) view.strides = {1, tokens};
  if (step.scale_strides == Strides::kPadded) view.strides = {columns + kGap, 1};
  if (step.scale_strides == Strides::kBroadcast) view.strides = {0, 1};
  view.data = tensors.add(static_cast<std::size_t>((tokens + 1) * (columns + kGap)) * 4);
  for (std::int64_t token = 0; token < tokens; ++token) {
    const auto row = row_bytes(static_cast<std::size_t>(columns) * 4, Fill::kBits, step.scale_type,
                               row_key(step_key, Part::kScales, 0, rank, scale_token(step, token)));
    for (std::int64_t column = 0; column < columns; ++column) {
      std::memcpy(view.as<std::byte>() + 4 * (token * view.strides[0] + column * view.strides[1]),
                  row.data() + 4 * column, 4);
    }
  }
  return view;
}

}  // namespace

Routing routing_input(Tensors& tensors, const Scenario& scenario, int route_step, int rank) {
  using Given = RouteStep::Given;
  const auto& step = scenario.step<RouteStep>(route_step);
  const Choices& choices = step.choices;
  const std::int64_t tokens = choices.num_tokens(rank);
  Routing routing;
  if (step.given != Given::kOnlyRanks) routing.experts = id_tensor(tensors, choices, step.ids, rank);
  if (step.given == Given::kAll) {
    const Layout layout = reference::layout(scenario.num_ranks, choices.num_experts, routing);
    routing.ranks = tensors.add(DType::kBool, {tokens, scenario.num_ranks});
    std::copy(layout.token_in_rank.begin(), layout.token_in_rank.end(), routing.ranks.as<std::uint8_t>());
    routing.pairs_per_expert = tensors.add(DType::kI32, {choices.num_experts});
    std::copy(layout.pairs_per_expert.begin(), layout.pairs_per_expert.end(),
              routing.pairs_per_expert.as<std::int32_t>());
  }
  if (step.given == Given::kOtherRanks || step.given == Given::kOnlyRanks) {
    routing.ranks = tensors.add(DType::kBool, {tokens, scenario.num_ranks});
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (int at = 0; at < scenario.num_ranks; ++at) {
        routing.ranks.as<bool>()[token * scenario.num_ranks + at] =
            other_ranks(scenario.key(route_step), rank, token, at);
      }
    }
  }
  return routing;
}

Routing low_latency_routing(Tensors& tensors, const Scenario& scenario, int dispatch_step, int rank) {
  const auto& step = scenario.step<LowLatencyDispatchStep>(dispatch_step);
  const Choices& choices = step.choices;
  Routing routing;
  routing.experts = id_tensor(tensors, choices, step.ids, rank);
  routing.weights = tensors.add(DType::kF32, {choices.num_tokens(rank), choices.top_k});
  for (std::int64_t token = 0; token < choices.num_tokens(rank); ++token) {
    const std::uint64_t key = row_key(scenario.key(dispatch_step), Part::kWeights, 0, rank, token);
    for (int slot = 0; slot < choices.top_k; ++slot) {
      routing.weights.as<float>()[token * choices.top_k + slot] = weight_of(key, static_cast<std::uint64_t>(slot));
    }
  }
  return routing;
}

Rows dispatch_input(Tensors& tensors, const Scenario& scenario, int index, int rank) {
  const auto& step = scenario.step<DispatchStep>(index);
  const RouteStep& route = scenario.route_of(step.handle);
  const std::int64_t tokens = route.choices.num_tokens(rank);
  const std::uint64_t key = scenario.key(index);
  Rows rows;
  rows.x = tensors.add(step.dtype, {tokens, step.hidden}, step.misaligned);
  fill_rows(rows.x, step.fill, key, Part::kX, 0, rank);
  if (step.num_scales > 0) rows.scales = scale_tensor(tensors, step, key, rank, tokens);
  for (std::size_t i = 0; i < step.extra.size(); ++i) {
    rows.extra.push_back(tensors.add(DType::kU8, {tokens, step.extra[i]}));
    fill_rows(rows.extra.back(), Fill::kBits, key, Part::kExtra, static_cast<int>(i), rank);
  }
  if (!step.with_experts) return rows;
  rows.experts = id_tensor(tensors, route.choices, route.ids, rank);
  if (!step.with_weights) return rows;
  rows.weights = tensors.add(DType::kF32, {tokens, route.choices.top_k});
  fill_rows(rows.weights, Fill::kBits, key, Part::kWeights, 0, rank);
  return rows;
}

TensorView low_latency_x(Tensors& tensors, const Scenario& scenario, int index, int rank) {
  const auto& step = scenario.step<LowLatencyDispatchStep>(index);
  const TensorView x = tensors.add(DType::kBF16, {step.choices.num_tokens(rank), step.hidden});
  fill_rows(x, step.fill, scenario.key(index), Part::kX, 0, rank);
  return x;
}

void fill_combine_rows(const Scenario& scenario, int index, int rank, std::int64_t num_rows, const TensorView& x) {
  TensorView valid = x;
  valid.shape[0] = num_rows;
  fill_rows(valid, Fill::kFinite, scenario.key(index), Part::kX, 0, rank);
}

CombineInput combine_sides(Tensors& tensors, const Scenario& scenario, int index, int rank, std::int64_t num_rows,
                           std::int64_t num_tokens) {
  const auto& step = scenario.step<CombineStep>(index);
  const std::uint64_t key = scenario.key(index);
  CombineInput in;
  if (step.weights > 0) {
    in.weights = tensors.add(DType::kF32, {num_rows + step.surplus_rows, step.weights});
    TensorView valid = in.weights;
    valid.shape[0] = num_rows;
    fill_rows(valid, Fill::kFinite, key, Part::kWeights, 0, rank);
  }
  const std::array<bool, 2> given = {step.num_biases > 0 && !step.only_second_bias,
                                     step.num_biases > 1 || step.only_second_bias};
  for (int i = 0; i < 2; ++i) {
    if (!given[static_cast<std::size_t>(i)]) continue;
    TensorView& bias = in.bias[static_cast<std::size_t>(i)];
    bias = tensors.add(step.dtype, {num_tokens, step.hidden});
    fill_rows(bias, Fill::kFinite, key, i == 0 ? Part::kBias0 : Part::kBias1, 0, rank);
  }
  return in;
}

std::vector<std::byte> slab_row(std::uint64_t step_key, int rank, std::int64_t expert, std::int64_t row,
                                std::int64_t hidden) {
  const Fill fill = row % 4 == 3 ? Fill::kFinite : Fill::kBelowOne;
  return row_bytes(static_cast<std::size_t>(hidden) * 2, fill, DType::kBF16,
                   row_key(step_key, Part::kX, 0, rank, (expert << 32) | row));
}

void fill_slab(const Scenario& scenario, int index, int rank, std::span<const std::int32_t> counts,
               const TensorView& slab) {
  const std::size_t bytes = static_cast<std::size_t>(slab.shape[2]) * 2;
  for (std::int64_t expert = 0; expert < slab.shape[0]; ++expert) {
    for (std::int64_t row = 0; row < slab.shape[1]; ++row) {
      std::byte* at = slab.as<std::byte>() + 2 * (expert * slab.strides[0] + row * slab.strides[1]);
      if (row < counts[static_cast<std::size_t>(expert)]) {
        std::memcpy(at, slab_row(scenario.key(index), rank, expert, row, slab.shape[2]).data(), bytes);
      } else {
        std::memset(at, 0xFF, bytes);
      }
    }
  }
}

}  // namespace anyep::test
