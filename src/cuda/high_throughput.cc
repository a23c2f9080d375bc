// High throughput: the calls' tensors become Params; what peers cannot write
// goes through temporaries in the window.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "cuda/backend.h"
#include "cuda/handle.h"
#include "cuda/kernels/intranode_combine.h"
#include "cuda/kernels/intranode_dispatch.h"
#include "cuda/kernels/notify.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"

namespace anyep::cuda {
namespace {

DeviceHandle& device_handle(const backend::Call& call, const Handle::State& handle) {
  if (handle.device == nullptr) {
    core::throw_argument(call.op, "handle", "of CPU ranks", "of this engine, or adopted by it",
                         "Engine::adopt() takes arrays on the GPU.");
  }
  return static_cast<DeviceHandle&>(*handle.device);
}

std::int64_t row_elements(const TensorView& view) {
  std::int64_t elements = 1;
  for (int dim = 1; dim < view.shape.dims; ++dim) elements *= view.shape[dim];
  return elements;
}

std::uint32_t row_bytes(const TensorView& view) {
  return static_cast<std::uint32_t>(row_elements(view)) * static_cast<std::uint32_t>(size_of(view.dtype));
}

std::int64_t row_stride(const TensorView& view) {
  return view.shape[0] > 1 ? view.strides[0] * static_cast<std::int64_t>(size_of(view.dtype)) : row_bytes(view);
}

bool is_dense_rows(const TensorView& view) {
  return row_stride(view) == row_bytes(view);
}

SideField side_field(const TensorView& view) {
  SideField field;
  if (!view.given()) return field;
  field.data = view.as<const std::byte>();
  field.element_bytes = static_cast<std::uint32_t>(size_of(view.dtype));
  field.num_elements = static_cast<std::uint32_t>(row_elements(view));
  field.row_stride = row_stride(view);
  const bool strided = view.shape.dims == 2 && view.shape[1] > 1;
  field.element_stride = (strided ? view.strides[1] : 1) * static_cast<std::int64_t>(field.element_bytes);
  return field;
}

/// What the page of counts and the tables of notify hold.
void check_experts(const char* op, int num_experts, int num_ranks) {
  if (num_experts <= CountsPage::kMaxLocalExperts * num_ranks) return;
  core::throw_error(ErrorCode::kUnsupported, op,
                    fmt::format("shape.num_experts = {} on {} ranks; on GPUs a rank hosts at most {} experts",
                                num_experts, num_ranks, CountsPage::kMaxLocalExperts));
}

void must_be_on_device(Rank& rank, const backend::Call& call, const char* name, const Rows& rows) {
  const bool in = name[0] == 'x';
  const auto check = [&](const char* field, const TensorView& view) {
    if (view.given()) rank.must_be_on_device(call.op, field, view);
  };
  check(in ? "x.x" : "out.x", rows.x);
  check(in ? "x.scales" : "out.scales", rows.scales);
  check(in ? "x.experts" : "out.experts", rows.experts);
  check(in ? "x.weights" : "out.weights", rows.weights);
  for (const TensorView& extra : rows.extra) check(in ? "x.extra" : "out.extra", extra);
}

Grant no_grant(std::uint64_t room) {
  Grant grant{Grant::kNone, Grant::kNone, Grant::kNone, Grant::kNone, Grant::kNone, {}, room, 0};
  std::fill(std::begin(grant.extra), std::end(grant.extra), Grant::kNone);
  return grant;
}

void must_know_rows(const backend::Call& call, bool whole_or_nothing) {
  if (!whole_or_nothing || !is_capturing(static_cast<cudaStream_t>(call.stream.native))) return;
  core::throw_error(ErrorCode::kUnsupported, call.op,
                    "the host cannot wait for the number of rows in a captured graph; make rows for the most that may "
                    "come and let a surplus be dropped");
}

/// Out of the window into tensors that peers cannot write. Large fields of which the host knows how much to copy go by the
/// driver's own copy, which takes none of the call's SMs: 117 MB in 62 us where 16 SMs take 100 and more (H200).
void copy_out(const CopyRowsParams& copies, int num_sms, cudaStream_t stream) {
  constexpr std::int64_t kLargeBytes = std::int64_t{4} << 20;
  CopyRowsParams rest = copies;
  rest.num_fields = 0;
  for (int i = 0; i < copies.num_fields; ++i) {
    const CopyRowsParams::Field& field = copies.field[i];
    const std::int64_t bytes = copies.num_rows * field.row_bytes;
    const bool dense = field.from_stride == field.row_bytes && field.to_stride == field.row_bytes;
    if (copies.rows_until == nullptr && dense && bytes >= kLargeBytes) {
      check(cudaMemcpyAsync(field.to, field.from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
            "cudaMemcpyAsync");
    } else {
      rest.field[rest.num_fields++] = field;
    }
  }
  if (rest.num_fields > 0) launch_copy_rows(rest, num_sms, stream);
}

/// A dispatch of source indices alone: for a handle whose rows nobody has dispatched. All ranks of a group have dispatched the
/// same handles.
void send_sources(const std::shared_ptr<Rank>& rank, const Rank::Launch& launch, DeviceHandle& handle,
                  std::int64_t rows, int num_sms) {
  DispatchParams params;
  params.team = launch.team;
  params.places = handle.places();
  params.grant = no_grant(static_cast<std::uint64_t>(rows));
  params.grant.source = handle.source_for(rank, rows);
  params.rows_until = handle.rows_until_data;
  launch_dispatch(params, num_sms, launch.stream);
}

}  // namespace

int CudaBackend::sms(const backend::Call& call) const {
  // 16 reach the wire in every operation (two H100, bench/results).
  constexpr int kDefaultSms = 16;
  return sms(call, kDefaultSms);
}

int CudaBackend::sms(const backend::Call& call, int unless_limited) const {
  return std::min(call.num_sms > 0 ? call.num_sms : unless_limited, rank_->sms_of_rank());
}

// ---- route ---------------------------------------------------------------------------------------------------------

struct CudaBackend::Routed {
  std::shared_ptr<DeviceHandle> handle;
  NotifyParams params;
};

void CudaBackend::check_arguments(const backend::Call& call, const backend::RouteCall& route) const {
  check_experts(call.op, route.num_experts, rank_->num_ranks());
  rank_->must_be_on_device(call.op, "routing.experts", route.routing.experts);
  rank_->must_be_on_device(call.op, "routing.ranks", route.routing.ranks);
  rank_->must_be_on_device(call.op, "routing.pairs_per_expert", route.routing.pairs_per_expert);
}

CudaBackend::Routed CudaBackend::prepare(const backend::Call& call, const backend::RouteCall& route) {
  const auto tokens = static_cast<int>(route.handle->num_tokens);
  const int ranges = notify_ranges(tokens, sms(call));
  Routed routed{std::make_shared<DeviceHandle>(rank_, tokens, ranges), {}};
  const std::shared_ptr<DeviceHandle>& handle = routed.handle;
  handle->page = rank_->take_page();
  handle->tokens_per_range = std::max(1, (tokens + ranges - 1) / ranges);

  NotifyParams& params = routed.params;
  if (route.routing.experts.given()) {
    const TensorView& ids = route.routing.experts;
    params.experts = ids.data;
    params.wide_ids = ids.dtype == DType::kI64;
    params.token_stride = ids.shape[1];  // dense, as checked
    params.choice_stride = 1;
  }
  params.in_rank = route.routing.ranks.as<const std::uint8_t>();
  params.pairs_given = route.routing.pairs_per_expert.as<const std::int32_t>();
  params.num_tokens = tokens;
  params.top_k = route.routing.experts.given() ? route.top_k : 0;
  params.num_experts = route.num_experts;
  params.place = handle->place_data;
  params.before = handle->before_data;
  params.tokens_per_range = handle->tokens_per_range;
  params.num_ranges = ranges;
  params.rows_until = handle->rows_until_data;
  params.tokens = handle->tokens_data;
  params.partial = rank_->partial_counts();
  params.page = handle->page.get();
  return routed;
}

void CudaBackend::launch(const backend::Call& call, const backend::RouteCall& route, const Routed& routed,
                         cudaStream_t stream) {
  launch_notify(routed.params, stream);
  Handle::State& state = *route.handle;
  state.device = routed.handle;
  const core::ExpertBlock block = core::expert_block(route.num_experts, rank_->num_ranks(), rank_->rank());
  state.routed = std::make_shared<CountsEvent>(rank_, state, call.limit_ns, block.count);
  routed.handle->routed = state.routed.get();
}

void CudaBackend::route(const backend::Call& call, const backend::RouteCall& route) {
  const DeviceGuard guard(rank_->device());
  check_arguments(call, route);
  const Rank::Launch launch = rank_->begin(call);
  Routed routed = prepare(call, route);
  routed.params.team = launch.team;
  this->launch(call, route, routed, launch.stream);
}

// ---- dispatch ------------------------------------------------------------------------------------------------------

struct CudaBackend::Sent {
  DispatchParams params;
  CopyRowsParams copies;
};

CudaBackend::Sent CudaBackend::prepare(const backend::Call& call, const backend::DispatchCall& dispatch) {
  DeviceHandle& handle = device_handle(call, *dispatch.handle);
  Sent sent;
  DispatchParams& params = sent.params;
  CopyRowsParams& copies = sent.copies;
  const auto room = static_cast<std::uint64_t>(dispatch.room);
  /// Where peers write a field: the caller's memory if it lies in the window, else a block that is copied out of.
  const auto take = [&](const TensorView& out, const char* what) {
    if (room == 0) return rank_->layout().heap;  // nobody writes there
    const std::uint64_t bytes = room * row_bytes(out);
    const bool aligned = reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0;
    if (is_dense_rows(out) && aligned) {
      const std::uint64_t offset = rank_->offset_of(out.data, bytes);
      if (offset != Grant::kNone) return offset;
    }
    Block block = rank_->allocate(bytes, call.op, what);
    CopyRowsParams::Field& field = copies.field[copies.num_fields++];
    field.from = block.data();
    field.to = out.as<std::byte>();
    field.row_bytes = row_bytes(out);
    field.from_stride = field.row_bytes;
    field.to_stride = row_stride(out);
    const std::uint64_t offset = block.offset();
    rank_->keep_until_done(std::move(block));
    return offset;
  };
  Grant& grant = params.grant;
  grant = no_grant(room);
  grant.x = take(dispatch.out.x, "x");
  if (dispatch.x.scales.given()) grant.scales = take(dispatch.out.scales, "scales");
  if (dispatch.x.experts.given()) grant.experts = take(dispatch.out.experts, "experts");
  grant.wide_ids = dispatch.out.experts.dtype == DType::kI64 ? 1 : 0;
  if (dispatch.x.weights.given()) grant.weights = take(dispatch.out.weights, "weights");
  for (std::size_t at = 0; at < dispatch.x.extra.size(); ++at) {
    grant.extra[at] = take(dispatch.out.extra[at], "extra payload");
  }
  grant.source = handle.source_for(rank_, dispatch.room);

  params.places = handle.places();
  params.x = dispatch.x.x.as<const std::byte>();
  params.x_row_stride = row_stride(dispatch.x.x);
  params.row_bytes = row_bytes(dispatch.x.x);
  params.scales = side_field(dispatch.x.scales);
  params.experts = side_field(dispatch.x.experts);
  params.weights = side_field(dispatch.x.weights);
  for (std::size_t at = 0; at < dispatch.x.extra.size(); ++at) params.extra[at] = side_field(dispatch.x.extra[at]);
  params.num_experts = dispatch.handle->num_experts;
  params.rows_until = handle.rows_until_data;
  params.whole_or_nothing = dispatch.whole_or_nothing;
  params.mark_rest_until = dispatch.x.experts.given() && !dispatch.whole_or_nothing ? dispatch.room : 0;
  if (!handle.has_final_place) {
    params.final_place = handle.final_place();
    handle.has_final_place = true;
  }
  copies.num_rows = dispatch.room;
  copies.num_ranks = rank_->num_ranks();
  if (dispatch.whole_or_nothing) copies.rows_until = handle.rows_until_data;
  return sent;
}

void CudaBackend::launch(const backend::Call& call, const backend::DispatchCall& dispatch, const Sent& sent,
                         cudaStream_t stream) {
  launch_dispatch(sent.params, sms(call), stream);
  copy_out(sent.copies, sms(call, rank_->sms_of_rank()), stream);
  if (dispatch.whole_or_nothing) return;  // the engine looks at the counts itself
  verify_ = [handle_state = dispatch.handle, op = call.op, room = dispatch.room] {
    if (handle_state->routed != nullptr) handle_state->routed->wait();
    if (handle_state->rows_until.empty() || handle_state->num_rows() <= room) return;
    core::throw_capacity(op, "rows of out", static_cast<std::uint64_t>(handle_state->num_rows()),
                         static_cast<std::uint64_t>(room), "The surplus was dropped.");
  };
}

void CudaBackend::dispatch(const backend::Call& call, const backend::DispatchCall& dispatch) {
  const DeviceGuard guard(rank_->device());
  must_be_on_device(*rank_, call, "x", dispatch.x);
  must_be_on_device(*rank_, call, "out", dispatch.out);
  must_know_rows(call, dispatch.whole_or_nothing);
  const Rank::Launch launch = rank_->begin(call);
  Sent sent = prepare(call, dispatch);
  sent.params.team = launch.team;
  this->launch(call, dispatch, sent, launch.stream);
}

/// notify and dispatch back to back. Where the rank has its GPU for itself, the blocks of the dispatch start as soon as all of
/// notify have counted: those that have left make room, the one that exchanges the counts has its SM already, so that
/// dispatch never holds what notify needs. Ranks that share a GPU take turns on streams of their own, each within its share
/// of the SMs, and the dispatch starts when notify has ended: then every rank's counts are there, so that what it waits for
/// is the dispatch of its peers alone, as without notify in front. What the dispatch needs is made ready while notify runs.
void CudaBackend::route_and_dispatch(const backend::Call& route_call, const backend::RouteCall& route,
                                     const backend::Call& call, const DispatchLater& later) {
  const DeviceGuard guard(rank_->device());
  check_arguments(route_call, route);
  must_know_rows(call, later.whole_or_nothing);
  const Rank::Launch first = rank_->begin(route_call);
  Routed routed = prepare(route_call, route);
  routed.params.team = first.team;
  const bool early = rank_->has_gpu_alone() && !first.captured;
  routed.params.dispatch_behind = early;
  if (early) ++notifies_with_dispatch_;
  launch(route_call, route, routed, first.stream);
  const backend::DispatchCall* dispatch = nullptr;
  Sent sent;
  try {
    dispatch = later.make();
    if (dispatch == nullptr) return;
    must_be_on_device(*rank_, call, "x", dispatch->x);
    must_be_on_device(*rank_, call, "out", dispatch->out);
    sent = prepare(call, *dispatch);
  } catch (const Error&) {
    (void)rank_->end(route_call);
    throw;
  }
  const Rank::Launch second = rank_->begin(call, Rank::Half::kRightBehind);
  sent.params.team = second.team;
  if (early) sent.params.behind_notify = notifies_with_dispatch_;
  launch(call, *dispatch, sent, second.stream);
}

void CudaBackend::settle(const backend::DispatchCall& dispatch) {
  const std::int64_t rows = dispatch.handle->num_rows();
  auto& handle = static_cast<DeviceHandle&>(*dispatch.handle->device);
  handle.settle(rows <= dispatch.room ? std::optional(rows) : std::nullopt);
}

// ---- combine -------------------------------------------------------------------------------------------------------

void CudaBackend::combine(const backend::Call& call, const backend::CombineCall& combine) {
  const DeviceGuard guard(rank_->device());
  DeviceHandle& handle = device_handle(call, *combine.handle);
  rank_->must_be_on_device(call.op, "in.x", combine.in.x);
  rank_->must_be_on_device(call.op, "in.weights", combine.in.weights);
  rank_->must_be_on_device(call.op, "in.bias[0]", combine.in.bias[0]);
  rank_->must_be_on_device(call.op, "in.bias[1]", combine.in.bias[1]);
  must_be_on_device(*rank_, call, "out", combine.out);
  const Rank::Launch launch = rank_->begin(call);
  const TensorView& x = combine.in.x;
  CombineParams params;
  params.dtype = x.dtype;
  params.hidden = combine.hidden;
  params.x = x.as<const std::byte>();
  params.x_row_stride = row_stride(x);
  params.num_rows = x.shape[0];
  const std::uint64_t x_bytes = static_cast<std::uint64_t>(x.shape[0]) * row_bytes(x);
  const bool aligned = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
  if (is_dense_rows(x) && aligned && x.shape[0] > 0) params.x_in_window = rank_->offset_of(x.data, x_bytes);
  const bool gathered = params.x_in_window != Grant::kNone;
  const TensorView& weights = combine.in.weights;
  CopyRowsParams weight_copy;
  if (weights.given()) {
    params.num_weights = static_cast<int>(row_elements(weights));
    params.weights = weights.as<const float>();
    const std::uint64_t bytes = static_cast<std::uint64_t>(weights.shape[0]) * row_bytes(weights);
    if (gathered) params.weights_in_window = rank_->offset_of(weights.data, bytes);
    const bool dense = weights.is_dense();
    if (!dense || (gathered && params.weights_in_window == Grant::kNone)) {
      Block block = rank_->allocate(bytes, call.op, "weights");
      CopyRowsParams::Field& field = weight_copy.field[weight_copy.num_fields++];
      const bool apart = weights.shape[1] > 1 && weights.strides[1] != 1;
      if (apart) {
        core::throw_argument(call.op, "in.weights.strides", "elements of a row that lie apart",
                             "the elements of a row without gaps", "Pass a contiguous copy.");
      }
      field = {weights.as<const std::byte>(), block.data(), row_bytes(weights), row_stride(weights),
               row_bytes(weights)};
      weight_copy.num_rows = weights.shape[0];
      params.weights = reinterpret_cast<const float*>(block.data());
      if (gathered) params.weights_in_window = block.offset();
      rank_->keep_until_done(std::move(block));
    }
    params.out_weights = combine.out.weights.as<float>();
  }
  params.rows_until = handle.rows_until_data;
  params.tokens = handle.tokens_data;
  params.places = handle.places();
  for (std::size_t at = 0; at < combine.in.bias.size(); ++at) {
    if (!combine.in.bias[at].given()) continue;
    params.bias[at] = combine.in.bias[at].as<const std::byte>();
    params.bias_row_stride[at] = row_stride(combine.in.bias[at]);
  }
  params.out = combine.out.x.as<std::byte>();
  params.out_row_stride = row_stride(combine.out.x);

  params.team = launch.team;
  if (weight_copy.num_fields > 0) launch_copy_rows(weight_copy, sms(call), launch.stream);
  const std::uint64_t bytes_of_slot = slot_bytes(params.dtype, params.hidden, params.num_weights);
  const auto slot_rows = static_cast<std::int64_t>(slots_of_pair(rank_->layout(), bytes_of_slot));
  // Every rank cuts the op alike: the number of turns follows from the ranks' numbers of tokens alone. Where the host does not
  // know them, a second launch takes the turns after the first, if there are any. That needs the rows' sources; only a handle
  // that nobody has dispatched lacks them, and all ranks must know alike whether to send them.
  const Handle::State& state = *combine.handle;
  if (!launch.captured && !handle.has_source() && state.routed != nullptr) state.routed->wait();
  const bool known = state.routed == nullptr ? !state.tokens.empty() : state.routed->done();
  std::int64_t most_tokens = known || !handle.has_source() ? 0 : INT64_MAX;
  for (const std::int32_t tokens : state.tokens) most_tokens = std::max<std::int64_t>(most_tokens, tokens);
  if (most_tokens <= slot_rows || rank_->num_ranks() == 1) {
    launch_combine(params, sms(call), launch.stream);
    return;
  }
  if (slot_rows == 0) {
    core::throw_capacity(call.op, "bytes of one slot", bytes_of_slot, rank_->layout().slot_region_bytes,
                         "Create the engine with a larger rows_bytes.");
  }
  if (!handle.has_source()) send_sources(rank_, launch, handle, x.shape[0], sms(call));
  params.source = handle.source_data();
  for (std::int64_t first = 0; first < most_tokens; first += slot_rows) {
    params.first_token = first;
    params.last_token = first + slot_rows;
    if (!known && first > 0) {
      launch_further_turns(params, sms(call), launch.stream);
      return;
    }
    launch_combine(params, sms(call), launch.stream);
  }
}

}  // namespace anyep::cuda
