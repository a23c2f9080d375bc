// Low latency: the calls' tensors become Params.
#include <fmt/format.h>

#include <algorithm>

#include "core/check.h"
#include "core/low_latency.h"
#include "cuda/backend.h"
#include "cuda/kernels/low_latency_combine.h"
#include "cuda/kernels/low_latency_dispatch.h"
#include "cuda/runtime/device_guard.h"

namespace anyep::cuda {
namespace {

std::int64_t bytes(std::int64_t elements, const TensorView& view) {
  return elements * static_cast<std::int64_t>(size_of(view.dtype));
}

/// @throws Error kCapacity
void must_fit(const Rank& rank, const backend::LowLatencyCall& op, const low_latency::Cut& cut) {
  if (rank.low_latency_layout().holds(cut)) return;
  const int local = static_cast<int>(core::most_local_experts(op.shape.num_experts, rank.num_ranks()));
  const std::uint64_t region =
      low_latency::region_bytes_for(op.shape.hidden, local, op.shape.top_k, static_cast<int>(op.shape.max_tokens));
  core::throw_capacity(op.call.op, "budget.low_latency_bytes",
                       low_latency::kRegions * static_cast<std::uint64_t>(rank.num_ranks()) * region,
                       rank.layout().low_latency_bytes, "low_latency_bytes_for() tells what a shape needs.");
}

/// @throws Error kUnsupported
void check_shape(const backend::LowLatencyCall& op) {
  const auto check = [&](const char* field, std::int64_t value, std::int64_t most) {
    if (value <= most) return;
    core::throw_error(ErrorCode::kUnsupported, op.call.op,
                      fmt::format("shape.{} = {}; low latency on GPUs takes at most {}", field, value, most));
  };
  check("num_experts", op.shape.num_experts, low_latency::kMaxExperts);
  check("hidden", op.shape.hidden, low_latency::kMaxHidden);
  check("top_k", op.shape.top_k, low_latency::kMaxTopK);
  check("max_tokens", op.shape.max_tokens, low_latency::kMaxTokens);
}

void must_be_on_device(Rank& rank, const backend::LowLatencyCall& op, const char* x_name) {
  const auto check = [&](const char* name, const TensorView& view) { rank.must_be_on_device(op.call.op, name, view); };
  check(x_name, op.x);
  check("routing.experts", op.routing.experts);
  check("routing.weights", op.routing.weights);
  check("slabs.x", op.slabs.x);
  check("slabs.scales", op.slabs.scales);
  check("slabs.counts", op.slabs.counts);
  check("slabs.source", op.slabs.source);
  check("slabs.range", op.slabs.range);
  check("slabs.rows", op.slabs.rows);
  check("options.received", op.options.received);
  check("options.waited", op.options.waited);
}

/// What both ops of low latency have in common.
low_latency::CallParams call_params(const Rank& rank, const backend::LowLatencyCall& op, int halves) {
  low_latency::CallParams call;
  call.progress = rank.low_latency_progress();
  call.layout = rank.low_latency_layout();
  call.halves = halves;
  call.hook = op.options.hook;
  call.num_experts = op.shape.num_experts;
  call.top_k = op.shape.top_k;
  call.hidden = op.shape.hidden;
  call.max_tokens = static_cast<int>(op.shape.max_tokens);
  const TensorView& ids = op.routing.experts;
  call.routing.experts = ids.data;
  call.routing.wide_ids = ids.dtype == DType::kI64;
  call.routing.num_tokens = static_cast<int>(ids.shape[0]);
  if (op.routing.weights.given()) {
    call.routing.weights = op.routing.weights.as<const float>();
  }
  if (op.options.waited.given()) call.waited = op.options.waited.as<unsigned long long>();
  return call;
}

std::int64_t row_stride(const TensorView& view, std::int64_t hidden) {
  return bytes(view.shape[0] > 1 ? view.strides[0] : hidden, view);
}

}  // namespace

void CudaBackend::launch_low_latency_dispatch(backend::LowLatencyCall& op, int halves, Rank::Half half) {
  const DeviceGuard guard(rank_->device());
  check_shape(op);
  must_be_on_device(*rank_, op, "x");
  const int local = static_cast<int>(core::most_local_experts(op.shape.num_experts, rank_->num_ranks()));
  must_fit(*rank_, op,
           low_latency::dispatch_cut(op.shape.hidden, op.options.wire != Wire::kBF16, local, op.shape.top_k,
                                     static_cast<int>(op.shape.max_tokens)));
  const Rank::Launch launch = rank_->begin(op.call, half);
  low_latency::DispatchParams params;
  params.call = call_params(*rank_, op, halves);
  params.call.team = launch.team;
  params.call.turns_back = half == Rank::Half::kSecond ? rank_->sends_behind(op.turn) : 0;
  params.wire = op.options.wire;
  params.round_scale = op.options.round_scale || op.options.wire == Wire::kUE8M0;
  params.x = op.x.as<const std::byte>();
  params.x_row_stride = row_stride(op.x, op.shape.hidden);
  const ExpertSlabs& out = op.slabs;
  params.slab = out.x.as<std::byte>();
  if (out.scales.given()) {
    params.scales = out.scales.as<std::uint32_t>();
    params.scale_expert_stride = out.scales.strides[0];
    params.scale_row_stride = out.scales.strides[1];
    params.scale_column_stride = out.scales.strides[2];
  }
  params.counts = out.counts.as<std::int32_t>();
  params.source = out.source.as<std::int32_t>();
  params.range = out.range.as<std::int64_t>();
  if (out.rows.given()) params.rows = out.rows.as<std::int32_t>();
  if (op.options.received.given()) params.received = op.options.received.as<std::int32_t>();
  low_latency::launch_dispatch(params, sms(op.call, rank_->sms_of_rank()), rank_->has_gpu_alone(), launch.stream);
}

void CudaBackend::launch_low_latency_combine(backend::LowLatencyCall& op, int halves, Rank::Half half) {
  const DeviceGuard guard(rank_->device());
  check_shape(op);
  must_be_on_device(*rank_, op, "out");
  const int local = static_cast<int>(core::most_local_experts(op.shape.num_experts, rank_->num_ranks()));
  const bool exact = rank_->group().tuning().exact_combine;
  const bool logfmt = op.options.wire == Wire::kLogFMT;
  must_fit(*rank_, op,
           low_latency::combine_cut(op.shape.hidden, logfmt, op.options.hook || logfmt || exact, local, op.shape.top_k,
                                    static_cast<int>(op.shape.max_tokens)));
  const Rank::Launch launch = rank_->begin(op.call, half);
  low_latency::CombineParams params;
  params.call = call_params(*rank_, op, halves);
  params.call.team = launch.team;
  params.call.turns_back = half == Rank::Half::kSecond ? rank_->sends_behind(op.turn) : 0;
  params.wire = op.options.wire;
  params.exact = exact;
  const ExpertSlabs& in = op.slabs;
  params.x = in.x.as<const std::byte>();
  params.x_expert_stride = bytes(in.x.strides[0], in.x);
  params.x_row_stride = bytes(in.x.strides[1], in.x);
  params.out = op.x.as<std::byte>();
  params.out_row_stride = row_stride(op.x, op.shape.hidden);
  const int num_sms = sms(op.call, rank_->sms_of_rank());
  if ((halves & low_latency::kSend) != 0) {
    params.rows = in.rows.given() ? in.rows.as<const std::int32_t>() : find_rows(op, num_sms, launch.stream);
  }
  low_latency::launch_combine(params, num_sms, rank_->has_gpu_alone(), launch.stream);
}

/// A table of rows for one combine whose handle has none.
const std::int32_t* CudaBackend::find_rows(const backend::LowLatencyCall& op, int num_sms, cudaStream_t stream) {
  low_latency::FindRowsParams params;
  params.source = op.slabs.source.as<const std::int32_t>();
  params.range = op.slabs.range.as<const std::int64_t>();
  params.num_ranks = rank_->num_ranks();
  params.num_local_experts = core::expert_block(op.shape.num_experts, rank_->num_ranks(), rank_->rank()).count;
  params.max_tokens = static_cast<int>(op.shape.max_tokens);
  params.top_k = op.shape.top_k;
  Block table = rank_->allocate(static_cast<std::uint64_t>(params.num_ranks) *
                                    static_cast<std::uint64_t>(params.max_tokens * params.top_k) * sizeof(std::int32_t),
                                "low_latency_combine", "a table of rows", Rank::Store::kHandles);
  params.rows = reinterpret_cast<std::int32_t*>(table.data());
  low_latency::launch_find_rows(params, num_sms, stream);
  rank_->keep_until_done(std::move(table));
  return params.rows;
}

// Without a hook the send half of the interface does it all: one launch.
int CudaBackend::halves_of_send(backend::LowLatencyCall& op) {
  op.turn = rank_->next_low_latency_send();
  return op.options.hook ? low_latency::kSend : low_latency::kSend | low_latency::kReceive;
}

void CudaBackend::low_latency_dispatch_send(backend::LowLatencyCall& op) {
  launch_low_latency_dispatch(op, halves_of_send(op), Rank::Half::kFirst);
}

void CudaBackend::low_latency_dispatch_receive(backend::LowLatencyCall& op) {
  if (op.options.hook) launch_low_latency_dispatch(op, low_latency::kReceive, Rank::Half::kSecond);
}

void CudaBackend::low_latency_combine_send(backend::LowLatencyCall& op) {
  launch_low_latency_combine(op, halves_of_send(op), Rank::Half::kFirst);
}

void CudaBackend::low_latency_combine_receive(backend::LowLatencyCall& op) {
  if (op.options.hook) launch_low_latency_combine(op, low_latency::kReceive, Rank::Half::kSecond);
}

}  // namespace anyep::cuda
