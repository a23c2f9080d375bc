// Checks of low-latency calls.
#include <anyep/plan.h>
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "backend/checks.h"
#include "core/check.h"
#include "core/gpu_low_latency.h"
#include "core/limits.h"
#include "core/low_latency.h"

namespace anyep::backend {
namespace {

/// The bound of the contract is 4096; positions and slab rows are 32 bits.
constexpr std::int64_t kMostLowLatencyTokens = 65536;

void check_shape(std::string_view op, const Shape& shape, bool fp8, const Limits& limits) {
  check_num_experts(op, shape.num_experts, limits);
  const int most_choices = std::min(core::kMaxTopK, shape.num_experts);
  if (shape.top_k < 1 || shape.top_k > most_choices) {
    core::throw_argument(op, "shape.top_k", fmt::to_string(shape.top_k), fmt::format("1..{}", most_choices));
  }
  const std::int64_t granule = fp8 ? 16 : 8;
  if (shape.hidden < granule || shape.hidden > core::kMaxHidden || shape.hidden % granule != 0) {
    core::throw_argument(op, "shape.hidden", fmt::to_string(shape.hidden),
                         fmt::format("a multiple of {} in {}..{}", granule, granule, core::kMaxHidden));
  }
  if (shape.max_tokens < 1 || shape.max_tokens > kMostLowLatencyTokens) {
    core::throw_argument(op, "shape.max_tokens", fmt::to_string(shape.max_tokens),
                         fmt::format("1..{}", kMostLowLatencyTokens));
  }
}

void check_region(std::string_view op, std::uint64_t bytes, const Shape& shape, const Limits& limits) {
  if (limits.on_device || bytes <= limits.layout.low_latency_region_bytes)
    return;  // devices cut their regions otherwise
  core::throw_capacity(
      op, "budget.low_latency_bytes",
      core::kLowLatencyRegions * static_cast<std::uint64_t>(limits.num_ranks) * core::round_up(bytes, core::kPageBytes),
      static_cast<std::uint64_t>(limits.budget.low_latency_bytes),
      fmt::format("low_latency_bytes_for() gives {} for this shape.", low_latency_bytes_for(shape, limits.num_ranks)));
}

/// Ids and, for combine, weights of this rank's tokens.
std::int64_t check_choices(std::string_view op, const Shape& shape, const Routing& routing, bool weights,
                           const Limits& limits) {
  const Argument ids{op, "routing.experts", routing.experts};
  if (!routing.experts.given()) core::throw_argument(op, "routing.experts", "not given", "[num_tokens, top_k] ids");
  ids.must_have_dtype({DType::kI32, DType::kI64});
  ids.must_have_shape({-1, shape.top_k});
  ids.must_be_dense();
  ids.must_have_memory();
  const std::int64_t tokens = routing.experts.shape[0];
  if (tokens > shape.max_tokens) {
    core::throw_capacity(op, "tokens of one rank (shape.max_tokens)", static_cast<std::uint64_t>(tokens),
                         static_cast<std::uint64_t>(shape.max_tokens), "Pass a larger maximum on every rank.");
  }
  if (weights) {
    if (!routing.weights.given())
      core::throw_argument(op, "routing.weights", "not given", "[num_tokens, top_k] float32");
    const Argument argument{op, "routing.weights", routing.weights};
    argument.must_have_dtype({DType::kF32});
    argument.must_have_shape({tokens, shape.top_k});
    argument.must_be_dense();
    argument.must_have_memory();
  }
  if (!limits.checked || limits.on_device) return tokens;
  const core::ExpertIds checked(routing.experts, shape.num_experts);
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (int choice = 0; choice < checked.top_k(); ++choice) {
      const std::int64_t id = checked.raw(token, choice);
      if (id >= -1 && id < shape.num_experts) continue;
      core::throw_argument(op, fmt::format("routing.experts[{}, {}]", token, choice), fmt::to_string(id),
                           fmt::format("-1..{}", shape.num_experts - 1));
    }
  }
  return tokens;
}

void check_tensor(std::string_view op, std::string_view name, const TensorView& view, DType dtype,
                  const Extents& shape) {
  const Argument argument{op, name, view};
  if (!view.given()) core::throw_argument(op, name, "not given", shape_text(shape));
  argument.must_have_dtype({dtype});
  argument.must_have_shape(shape);
  argument.must_be_dense();
  argument.must_have_memory();
}

/// Column-major scales: the token runs fastest, so that one scale column is contiguous.
void check_scale_columns(std::string_view op, const TensorView& view, DType dtype, std::int64_t local,
                         std::int64_t rows, std::int64_t columns) {
  const Argument argument{op, "out.scales", view};
  if (!view.given()) core::throw_argument(op, "out.scales", "not given", "given, as the wire format has scales");
  argument.must_have_dtype({dtype});
  argument.must_have_shape({local, rows, columns});
  argument.must_have_memory();
  const Extents strides{columns * rows, 1, rows};
  for (int dim = 0; dim < 3; ++dim) {
    if (view.shape[dim] > 1 && view.strides[dim] != strides[dim]) {
      core::throw_argument(op, "out.scales.strides", shape_text(view.strides), shape_text(strides));
    }
  }
}

void check_statistics(std::string_view op, const LowLatencyOptions& options, std::int64_t local, const Limits& limits) {
  if (options.received.given()) check_tensor(op, "options.received", options.received, DType::kI32, {local});
  if (options.waited.given()) check_tensor(op, "options.waited", options.waited, DType::kI64, {limits.num_ranks});
}

[[noreturn]] void refuse_wire(std::string_view op, const char* got, const char* allowed) {
  core::throw_argument(op, "options.wire", got, allowed);
}

void check_rows(std::string_view op, std::string_view name, const TensorView& rows, const Shape& shape,
                const Limits& limits) {
  if (!rows.given()) return;
  check_tensor(op, name, rows, DType::kI32, {limits.num_ranks, shape.max_tokens, shape.top_k});
}

}  // namespace

std::uint64_t low_latency_region_bytes(const Shape& shape, int num_ranks) {
  std::uint64_t bytes = core::dispatch_region(shape, num_ranks, Wire::kBF16).bytes;
  bytes = std::max(bytes, core::dispatch_region(shape, num_ranks, Wire::kFP8).bytes);
  bytes = std::max(bytes, core::combine_region(shape, num_ranks, true, Wire::kBF16).bytes);
  bytes = std::max(bytes, core::combine_region(shape, num_ranks, false, Wire::kBF16).bytes);
  if (shape.hidden % core::kLogFmtGroup == 0) {
    bytes = std::max(bytes, core::combine_region(shape, num_ranks, false, Wire::kLogFMT).bytes);
  }
  return core::round_up(bytes, core::kPageBytes);
}

void check_low_latency_dispatch(const Shape& shape, const TensorView& x, const Routing& routing, const ExpertSlabs& out,
                                const LowLatencyOptions& options, const Limits& limits) {
  constexpr std::string_view kOp = "low_latency_dispatch";
  if (options.wire == Wire::kLogFMT) refuse_wire(kOp, "kLogFMT", "kBF16, kFP8, kUE8M0");
  if (options.zero_copy) core::throw_argument(kOp, "options.zero_copy", "true", "false: it is an option of combine");
  const bool fp8 = options.wire != Wire::kBF16;
  check_shape(kOp, shape, fp8, limits);
  const std::int64_t tokens = check_choices(kOp, shape, routing, false, limits);
  check_tensor(kOp, "x", x, DType::kBF16, {tokens, shape.hidden});
  const std::int64_t local = core::expert_block(shape.num_experts, limits.num_ranks, limits.rank).count;
  const std::int64_t rows = limits.num_ranks * shape.max_tokens;
  check_tensor(kOp, "out.x", out.x, fp8 ? DType::kF8E4M3 : DType::kBF16, {local, rows, shape.hidden});
  if (fp8) {
    check_scale_columns(kOp, out.scales, options.wire == Wire::kFP8 ? DType::kF32 : DType::kI32, local, rows,
                        core::num_dispatch_scales(shape, options.wire));
  }
  check_tensor(kOp, "out.counts", out.counts, DType::kI32, {local});
  check_tensor(kOp, "out.source", out.source, DType::kI32, {local, rows});
  check_tensor(kOp, "out.range", out.range, DType::kI64, {local, limits.num_ranks});
  check_rows(kOp, "out.rows", out.rows, shape, limits);
  check_statistics(kOp, options, local, limits);
  check_region(kOp, core::dispatch_region(shape, limits.num_ranks, options.wire).bytes, shape, limits);
}

void check_low_latency_combine(const Shape& shape, const ExpertSlabs& in, const Routing& routing, const TensorView& out,
                               const LowLatencyOptions& options, bool exact, const Limits& limits) {
  constexpr std::string_view kOp = "low_latency_combine";
  if (options.wire != Wire::kBF16 && options.wire != Wire::kLogFMT) refuse_wire(kOp, "an FP8 format", "kBF16, kLogFMT");
  if (options.wire == Wire::kLogFMT && shape.hidden % core::kLogFmtGroup != 0) {
    core::throw_argument(kOp, "shape.hidden", fmt::to_string(shape.hidden), "a multiple of 128 with Wire::kLogFMT");
  }
  if (options.wire == Wire::kLogFMT && options.zero_copy) {
    core::throw_argument(kOp, "options.zero_copy", "true", "false with Wire::kLogFMT");
  }
  check_shape(kOp, shape, false, limits);
  const std::int64_t tokens = check_choices(kOp, shape, routing, true, limits);
  const std::int64_t local = core::expert_block(shape.num_experts, limits.num_ranks, limits.rank).count;
  const std::int64_t rows = limits.num_ranks * shape.max_tokens;
  if (options.zero_copy) {
    Argument{kOp, "in.x", in.x}.must_have_shape({local, rows, shape.hidden});
    Argument{kOp, "in.x", in.x}.must_have_dtype({DType::kBF16});
  } else {
    check_tensor(kOp, "in.x", in.x, DType::kBF16, {local, rows, shape.hidden});
  }
  check_tensor(kOp, "in.source", in.source, DType::kI32, {local, rows});
  check_tensor(kOp, "in.range", in.range, DType::kI64, {local, limits.num_ranks});
  check_rows(kOp, "in.rows", in.rows, shape, limits);
  check_tensor(kOp, "out", out, DType::kBF16, {tokens, shape.hidden});
  const auto* const x_begin = in.x.as<const std::byte>();
  const auto* const out_begin = out.as<const std::byte>();
  const std::int64_t x_bytes = options.zero_copy ? 0 : in.x.num_elements() * 2, out_bytes = out.num_elements() * 2;
  if (x_bytes > 0 && out_bytes > 0 && x_begin < out_begin + out_bytes && out_begin < x_begin + x_bytes) {
    core::throw_argument(kOp, "out", "memory that overlaps in.x", "memory of its own");
  }
  check_statistics(kOp, options, local, limits);
  const bool sums = core::sums_at_expert_rank(options, exact);
  check_region(kOp, core::combine_region(shape, limits.num_ranks, sums, options.wire).bytes, shape, limits);
}

}  // namespace anyep::backend

namespace anyep {

std::int64_t low_latency_bytes_for(const Shape& shape, int num_ranks) {
  constexpr std::string_view kOp = "low_latency_bytes_for";
  backend::Limits limits;
  limits.num_ranks = num_ranks;
  limits.budget.max_experts = core::kMaxExperts;
  if (num_ranks < 1) core::throw_argument(kOp, "num_ranks", fmt::to_string(num_ranks), "1 or more");
  backend::check_shape(kOp, shape, false, limits);
  std::uint64_t region = backend::low_latency_region_bytes(shape, num_ranks);
  namespace gpu = cuda::low_latency;
  if (shape.hidden <= gpu::kMaxHidden && shape.max_tokens <= gpu::kMaxTokens) {
    // Words and packets too, so that one budget serves on either kind of rank. CPU ranks never touch the difference.
    const auto local = static_cast<int>(core::most_local_experts(shape.num_experts, num_ranks));
    region =
        std::max(region, gpu::region_bytes_for(shape.hidden, local, shape.top_k, static_cast<int>(shape.max_tokens)));
  }
  region = core::round_up(region, core::kPageBytes);
  return static_cast<std::int64_t>(core::kLowLatencyRegions * static_cast<std::uint64_t>(num_ranks) * region);
}

}  // namespace anyep
