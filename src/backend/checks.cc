#include "backend/checks.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "core/check.h"
#include "core/limits.h"
#include "core/routing.h"

namespace anyep::backend {

std::string shape_text(const Extents& shape) {
  std::string text = "[";
  for (int dim = 0; dim < shape.dims; ++dim) {
    if (dim > 0) text += ", ";
    text += shape[dim] < 0 ? std::string("any") : fmt::to_string(shape[dim]);
  }
  return text + "]";
}

void Argument::must_have_dtype(std::initializer_list<DType> allowed) const {
  if (std::find(allowed.begin(), allowed.end(), view.dtype) != allowed.end()) return;
  std::string names;
  for (const DType dtype : allowed) names += fmt::format("{}{}", names.empty() ? "" : ", ", name_of(dtype));
  core::throw_argument(op, fmt::format("{}.dtype", name), name_of(view.dtype), names);
}

void Argument::must_have_shape(const Extents& shape) const {
  bool fits = view.shape.dims == shape.dims;
  for (int dim = 0; fits && dim < shape.dims; ++dim) {
    fits = shape[dim] < 0 ? view.shape[dim] >= 0 : view.shape[dim] == shape[dim];
  }
  if (!fits) core::throw_argument(op, fmt::format("{}.shape", name), shape_text(view.shape), shape_text(shape));
}

void Argument::must_be_dense() const {
  if (!view.is_dense()) {
    core::throw_argument(op, fmt::format("{}.strides", name), shape_text(view.strides), "row-major without gaps",
                         "Pass a contiguous copy.");
  }
}

void Argument::must_have_dense_elements() const {
  if (view.num_elements() == 0) return;  // array libraries give empty arrays any strides
  std::int64_t inner = 1;
  for (int dim = view.shape.dims - 1; dim >= 1; --dim) {
    if (view.shape[dim] > 1 && view.strides[dim] != inner) {
      core::throw_argument(op, fmt::format("{}.strides", name), shape_text(view.strides),
                           "the elements of a row without gaps", "Pass a contiguous copy.");
    }
    inner *= view.shape[dim];
  }
  if (view.shape.dims > 0 && view.shape[0] > 1 && view.strides[0] < inner) {
    core::throw_argument(op, fmt::format("{}.strides", name), shape_text(view.strides), "rows that do not overlap");
  }
}

void Argument::must_have_memory() const {
  if (view.num_elements() == 0) return;
  if (view.data == nullptr) {
    core::throw_argument(op, name, fmt::format("a null pointer with shape {}", shape_text(view.shape)), "memory");
  }
  const std::size_t alignment = size_of(view.dtype);
  if (reinterpret_cast<std::uintptr_t>(view.data) % alignment != 0) {
    core::throw_argument(op, name, fmt::format("address {}", view.data),
                         fmt::format("an address that is a multiple of its element's {} bytes", alignment));
  }
}

namespace {

using core::kMaxTopK;

/// [tokens, top_k], both or neither of ids and weights.
void check_choices(std::string_view op, const char* ids_name, const TensorView& ids, const char* weights_name,
                   const TensorView& weights) {
  if (ids.given()) {
    const Argument argument{op, ids_name, ids};
    argument.must_have_dtype({DType::kI32, DType::kI64});
    argument.must_have_shape({-1, -1});
    argument.must_have_memory();
  }
  if (!weights.given()) return;
  const Argument argument{op, weights_name, weights};
  argument.must_have_dtype({DType::kF32});
  argument.must_have_shape({-1, -1});
  argument.must_have_memory();
  if (ids.given() && ids.shape != weights.shape) {
    core::throw_argument(op, fmt::format("{}.shape", weights_name), shape_text(weights.shape),
                         fmt::format("{}, as {}", shape_text(ids.shape), ids_name));
  }
}

void check_top_k(std::string_view op, std::int64_t top_k, int num_experts) {
  const int most = std::min(kMaxTopK, num_experts);
  if (top_k < 1 || top_k > most) {
    core::throw_argument(op, "top_k", fmt::to_string(top_k), fmt::format("1..{}", most));
  }
}

void check_tokens(std::string_view op, std::int64_t tokens) {
  if (tokens > core::kMaxTokens) {
    core::throw_argument(op, "num_tokens", fmt::to_string(tokens), fmt::format("0..{}", core::kMaxTokens));
  }
}

/// Checked mode: the first id that is no expert.
void check_ids(std::string_view op, const TensorView& experts, int num_experts) {
  const core::ExpertIds ids(experts, num_experts);
  for (std::int64_t token = 0; token < ids.num_tokens(); ++token) {
    for (int choice = 0; choice < ids.top_k(); ++choice) {
      const std::int64_t id = ids.raw(token, choice);
      if (id >= -1 && id < num_experts) continue;
      core::throw_argument(op, fmt::format("experts[{}, {}]", token, choice), fmt::to_string(id),
                           fmt::format("-1..{}", num_experts - 1));
    }
  }
}

/// Checked mode: what the caller counted must be what the ids say.
void check_given_counts(std::string_view op, const Routing& routing, int num_experts, int num_ranks) {
  const Layout layout = core::count_layout(core::ExpertIds(routing.experts, num_experts), num_experts, num_ranks);
  for (std::size_t at = 0; routing.ranks.given() && at < layout.token_in_rank.size(); ++at) {
    const bool given = routing.ranks.as<const std::uint8_t>()[at] != 0;
    if (given == (layout.token_in_rank[at] != 0)) continue;
    const auto ranks = static_cast<std::size_t>(num_ranks);
    core::throw_argument(op, fmt::format("ranks[{}, {}]", at / ranks, at % ranks), given ? "true" : "false",
                         "what the experts of the token say");
  }
  for (std::size_t at = 0; routing.pairs_per_expert.given() && at < layout.pairs_per_expert.size(); ++at) {
    const std::int32_t given = routing.pairs_per_expert.as<const std::int32_t>()[at];
    if (given == layout.pairs_per_expert[at]) continue;
    core::throw_argument(op, fmt::format("pairs_per_expert[{}]", at), fmt::to_string(given),
                         fmt::format("{}, as the experts say", layout.pairs_per_expert[at]));
  }
}

bool overlap(const TensorView& a, const TensorView& b) {
  const auto extent = [](const TensorView& view) {
    std::int64_t last = 0;
    for (int dim = 0; dim < view.shape.dims; ++dim) {
      if (view.shape[dim] > 0) last += (view.shape[dim] - 1) * view.strides[dim];
    }
    return static_cast<std::size_t>(last + 1) * size_of(view.dtype);
  };
  if (a.num_elements() == 0 || b.num_elements() == 0) return false;
  const auto* const a_begin = static_cast<const std::byte*>(a.data);
  const auto* const b_begin = static_cast<const std::byte*>(b.data);
  return a_begin < b_begin + extent(b) && b_begin < a_begin + extent(a);
}

void check_no_overlap(std::string_view op, const TensorView& x, const TensorView& out) {
  if (overlap(x, out)) {
    core::throw_argument(op, "out.x", "memory that overlaps x", "memory of its own");
  }
}

std::int64_t row_bytes(std::string_view op, std::string_view name, const TensorView& view) {
  std::int64_t elements = 1;
  for (int dim = 1; dim < view.shape.dims; ++dim) elements *= view.shape[dim];
  const std::int64_t bytes = elements * static_cast<std::int64_t>(size_of(view.dtype));
  if (bytes < 1 || bytes > UINT32_MAX / 2) {
    core::throw_argument(op, fmt::format("{}.shape", name), shape_text(view.shape), "rows of at least one element");
  }
  return bytes;
}

void check_hidden(std::string_view op, std::string_view name, const TensorView& x) {
  const std::int64_t bytes = row_bytes(op, name, x);
  if (bytes % core::kRowGranule != 0 || x.shape[1] > core::kMaxHidden) {
    core::throw_argument(op, fmt::format("{}.shape[1] (hidden)", name), fmt::to_string(x.shape[1]),
                         fmt::format("1..{} with row bytes a multiple of {}", core::kMaxHidden, core::kRowGranule));
  }
}

/// What a field is called, in and out: no text is made for a call that is right.
struct FieldName {
  std::string_view in, out;
};
constexpr FieldName kX{"x", "out.x"}, kScales{"scales", "out.scales"}, kExperts{"experts", "out.experts"},
    kWeights{"weights", "out.weights"};

/// One field of the rows, in and out. Returns its bytes per row.
std::uint32_t check_field(std::string_view op, const FieldName& names, const TensorView& in, const TensorView& out,
                          std::int64_t tokens, std::int64_t room) {
  const auto [name, out_name] = names;
  if (!in.given()) return 0;
  if (!out.given()) core::throw_argument(op, out_name, "not given", fmt::format("given, as {} is", name));
  Extents in_shape = in.shape, out_shape = in.shape;
  in_shape[0] = tokens;
  out_shape[0] = room;
  Argument{op, name, in}.must_have_shape(in_shape);
  Argument{op, name, in}.must_have_memory();
  const Argument out_argument{op, out_name, out};
  out_argument.must_have_shape(out_shape);
  out_argument.must_have_dense_elements();
  out_argument.must_have_memory();
  return static_cast<std::uint32_t>(row_bytes(op, name, in));
}

void check_same_dtype(std::string_view op, const FieldName& names, const TensorView& in, const TensorView& out) {
  if (!in.given()) return;
  Argument{op, names.out, out}.must_have_dtype({in.dtype});
}

/// A row with all its fields must fit one turn of a ring.
void check_fits(std::string_view op, const core::RowFields& fields, std::uint64_t region_bytes, int num_ranks) {
  if (num_ranks == 1 || core::TurnLayout::rows_that_fit(fields, (1u << core::kMaxFields) - 1, region_bytes) > 0) return;
  core::throw_capacity(op, "bytes of one turn of a ring (a share of budget.rows_bytes)",
                       fields.total() + core::kMaxFields * core::kArrayAlignment + 1, region_bytes,
                       "Create the engine with a larger rows_bytes.");
}

void check_scales(std::string_view op, const Rows& x) {
  const bool bytes = size_of(x.x.dtype) == 1;
  if (x.x.dtype == DType::kF8E4M3 && !x.scales.given()) {
    core::throw_argument(op, "x.scales", "not given", "given, as x is float8_e4m3fn",
                         "View the data as uint8 to send FP8 bytes without scales.");
  }
  if (!x.scales.given()) return;
  if (!bytes) {
    core::throw_argument(op, "x.scales", fmt::format("given with {}", name_of(x.x.dtype)),
                         "only with elements of one byte");
  }
  Argument{op, "x.scales", x.scales}.must_have_dtype({DType::kF32, DType::kI32});
  Argument{op, "x.scales", x.scales}.must_have_shape({-1, -1});
}

}  // namespace

void check_options(std::string_view op, const Options& options) {
  if (options.timeout && options.timeout->count() <= 0) {
    core::throw_argument(op, "options.timeout", fmt::format("{} ns", options.timeout->count()), "more than 0");
  }
  if (options.num_sms < 0) {
    core::throw_argument(op, "options.num_sms", fmt::to_string(options.num_sms), "0 (the plan chooses) or more");
  }
}

void check_num_experts(std::string_view op, int num_experts, const Limits& limits) {
  if (num_experts < 1 || num_experts > limits.budget.max_experts) {
    core::throw_argument(op, "shape.num_experts", fmt::to_string(num_experts),
                         fmt::format("1..{} (budget.max_experts)", limits.budget.max_experts));
  }
}

void check_routing(std::string_view op, const Shape& shape, const Routing& routing, const Limits& limits) {
  check_num_experts(op, shape.num_experts, limits);
  if (!routing.experts.given() && !routing.ranks.given()) {
    core::throw_argument(op, "routing", "neither experts nor ranks", "at least one of them");
  }
  check_choices(op, "routing.experts", routing.experts, "routing.weights", routing.weights);
  std::int64_t tokens = routing.experts.given() ? routing.experts.shape[0] : routing.ranks.shape[0];
  check_tokens(op, tokens);
  if (routing.experts.given()) {
    Argument{op, "routing.experts", routing.experts}.must_be_dense();
    check_top_k(op, routing.experts.shape[1], shape.num_experts);
    if (shape.top_k != routing.experts.shape[1]) {
      core::throw_argument(op, "shape.top_k", fmt::to_string(shape.top_k),
                           fmt::format("{}, as routing.experts has", routing.experts.shape[1]));
    }
  }
  if (routing.ranks.given()) {
    const Argument ranks{op, "routing.ranks", routing.ranks};
    ranks.must_have_dtype({DType::kBool, DType::kU8});
    ranks.must_have_shape({tokens, limits.num_ranks});
    ranks.must_be_dense();
    ranks.must_have_memory();
  }
  if (routing.pairs_per_expert.given()) {
    const Argument pairs{op, "routing.pairs_per_expert", routing.pairs_per_expert};
    pairs.must_have_dtype({DType::kI32});
    pairs.must_have_shape({shape.num_experts});
    pairs.must_be_dense();
    pairs.must_have_memory();
  }
  if (!limits.checked || limits.on_device || !routing.experts.given()) return;
  check_ids(op, routing.experts, shape.num_experts);
  check_given_counts(op, routing, shape.num_experts, limits.num_ranks);
}

void check_handle(std::string_view op, const Handle::State* handle, const Limits& limits) {
  if (handle == nullptr) core::throw_error(ErrorCode::kState, op, "the handle is empty or was moved from");
  if (handle->num_ranks != limits.num_ranks || handle->rank != limits.rank) {
    core::throw_argument(op, "handle", fmt::format("of rank {} in {}", handle->rank, handle->num_ranks),
                         fmt::format("of rank {} in {}", limits.rank, limits.num_ranks));
  }
}

void check_rows(std::string_view op, const Handle::State& handle, const TensorView& x) {
  if (x.shape[0] < handle.num_rows()) {  // more: dispatch gave them room without waiting for the number of rows
    core::throw_argument(op, "in.x.shape[0]", fmt::to_string(x.shape[0]),
                         fmt::format("{} or more, the rows of the handle", handle.num_rows()));
  }
}

DispatchCall check_dispatch(const Rows& x, const Rows& out, const std::shared_ptr<Handle::State>& handle,
                            const Limits& limits) {
  constexpr std::string_view kOp = "dispatch";
  check_handle(kOp, handle.get(), limits);
  const Argument data{kOp, "x.x", x.x};
  data.must_have_dtype({DType::kBF16, DType::kF16, DType::kF32, DType::kF8E4M3, DType::kI8, DType::kU8});
  data.must_have_shape({-1, -1});
  if (x.x.shape[0] != handle->num_tokens) {
    core::throw_argument(kOp, "x.x.shape[0]", fmt::to_string(x.x.shape[0]),
                         fmt::format("{}, the tokens of the handle", handle->num_tokens));
  }
  data.must_have_dense_elements();
  check_hidden(kOp, "x.x", x.x);
  check_scales(kOp, x);
  Argument{kOp, "out.x", out.x}.must_have_shape({-1, x.x.shape[1]});

  DispatchCall call{x, out, handle, {}, 0, out.x.shape[0]};
  const std::int64_t tokens = handle->num_tokens;
  call.fields.bytes[core::kFieldX] = check_field(kOp, kX, x.x, out.x, tokens, call.room);
  check_same_dtype(kOp, kX, x.x, out.x);
  check_no_overlap(kOp, x.x, out.x);
  call.fields.bytes[core::kFieldScales] = check_field(kOp, kScales, x.scales, out.scales, tokens, call.room);
  check_same_dtype(kOp, kScales, x.scales, out.scales);
  check_choices(kOp, "x.experts", x.experts, "x.weights", x.weights);
  if (x.weights.given() && !x.experts.given()) {
    core::throw_argument(kOp, "x.weights", "given without x.experts", "both or neither");
  }
  if (x.experts.given()) {
    if (handle->num_experts == 0) {
      core::throw_argument(kOp, "x.experts", "given with an adopted handle",
                           "a handle from route(), which knows the experts");
    }
    call.top_k = static_cast<int>(x.experts.shape[1]);
    check_top_k(kOp, call.top_k, handle->num_experts);
    check_field(kOp, kExperts, x.experts, out.experts, tokens, call.room);
    Argument{kOp, "out.experts", out.experts}.must_have_dtype({DType::kI32, DType::kI64});
    call.fields.bytes[core::kFieldExperts] = static_cast<std::uint32_t>(call.top_k) * sizeof(std::int32_t);
    call.fields.bytes[core::kFieldWeights] = check_field(kOp, kWeights, x.weights, out.weights, tokens, call.room);
    check_same_dtype(kOp, kWeights, x.weights, out.weights);
    if (limits.checked && !limits.on_device) check_ids(kOp, x.experts, handle->num_experts);
  }
  constexpr std::size_t kMaxExtra = core::kMaxFields - core::kFirstExtraField;
  if (x.extra.size() > kMaxExtra || out.extra.size() != x.extra.size()) {
    core::throw_argument(kOp, "x.extra", fmt::format("{} tensors, {} in out", x.extra.size(), out.extra.size()),
                         fmt::format("0..{} tensors, as many in out", kMaxExtra));
  }
  for (std::size_t at = 0; at < x.extra.size(); ++at) {
    const std::string name = fmt::format("extra[{}]", at), out_name = "out." + name;
    const FieldName names{name, out_name};
    Argument{kOp, name, x.extra[at]}.must_have_dense_elements();
    call.fields.bytes[core::kFirstExtraField + at] =
        check_field(kOp, names, x.extra[at], out.extra[at], tokens, call.room);
    check_same_dtype(kOp, names, x.extra[at], out.extra[at]);
  }
  if (!limits.on_device) check_fits(kOp, call.fields, limits.layout.staging_region_bytes, limits.num_ranks);
  return call;
}

CombineCall check_combine(const CombineInput& in, const Rows& out, const std::shared_ptr<Handle::State>& handle,
                          const Limits& limits) {
  constexpr std::string_view kOp = "combine";
  check_handle(kOp, handle.get(), limits);
  const Argument data{kOp, "in.x", in.x};
  data.must_have_dtype({DType::kBF16, DType::kF16, DType::kF32});
  data.must_have_shape({-1, -1});
  data.must_have_dense_elements();
  data.must_have_memory();
  check_hidden(kOp, "in.x", in.x);
  if (handle->routed == nullptr || handle->routed->done()) check_rows(kOp, *handle, in.x);

  CombineCall call{in, out, handle, {}, in.x.shape[1]};
  const Extents result{handle->num_tokens, call.hidden};
  const auto check_token_rows = [&](std::string_view name, const TensorView& view) {
    const Argument argument{kOp, name, view};
    argument.must_have_dtype({in.x.dtype});
    argument.must_have_shape(result);
    argument.must_have_dense_elements();
    argument.must_have_memory();
  };
  check_token_rows("out.x", out.x);
  check_no_overlap(kOp, in.x, out.x);
  for (std::size_t at = 0; at < in.bias.size(); ++at) {
    if (in.bias[at].given()) check_token_rows(at == 0 ? "in.bias[0]" : "in.bias[1]", in.bias[at]);
  }
  call.fields.bytes[core::kFieldX] = static_cast<std::uint32_t>(row_bytes(kOp, "in.x", in.x));
  if (in.weights.given()) {
    check_choices(kOp, "", {}, "in.weights", in.weights);
    call.fields.bytes[core::kFieldWeights] =
        check_field(kOp, kWeights, in.weights, out.weights, in.x.shape[0], handle->num_tokens);
    check_same_dtype(kOp, kWeights, in.weights, out.weights);
  }
  if (!limits.on_device) check_fits(kOp, call.fields, limits.layout.slot_region_bytes, limits.num_ranks);
  return call;
}

}  // namespace anyep::backend
