#include "cuda/backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/layout.h"
#include "core/routing.h"
#include "cuda/handle.h"
#include "cuda/kernels/barrier.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"

namespace anyep::cuda {
namespace {

cudaStream_t native(StreamRef stream) {
  return static_cast<cudaStream_t>(stream.native);
}

LayoutParams layout_params(const Shape& shape, const Routing& routing, int num_ranks) {
  if (shape.num_experts > CountsPage::kMaxLocalExperts * num_ranks) {
    core::throw_error(ErrorCode::kUnsupported, "layout",
                      fmt::format("shape.num_experts = {}; on GPUs a rank hosts at most {}", shape.num_experts,
                                  CountsPage::kMaxLocalExperts));
  }
  LayoutParams params;
  params.experts = routing.experts.data;
  params.wide_ids = routing.experts.dtype == DType::kI64;
  params.token_stride = routing.experts.shape[1];
  params.choice_stride = 1;
  params.num_tokens = static_cast<int>(routing.experts.shape[0]);
  params.top_k = shape.top_k;
  params.num_experts = shape.num_experts;
  params.num_ranks = num_ranks;
  return params;
}

}  // namespace

void CudaBackend::hold_back(const backend::Call& call, const anyep::Event::State& event) {
  rank_->hold_back(call, event);
}

std::shared_ptr<anyep::Event::State> CudaBackend::record(const backend::Call& call) {
  return rank_->end(call, std::exchange(verify_, {}));
}

std::shared_ptr<Handle::State> CudaBackend::adopt(const HandleArrays& arrays, std::shared_ptr<const void> owner,
                                                  StreamRef stream) {
  const DeviceGuard guard(rank_->device());
  auto state = std::make_shared<Handle::State>();
  state->num_ranks = rank_->num_ranks();
  state->rank = rank_->rank();
  state->num_tokens = arrays.place.shape[0];
  state->device = std::make_shared<DeviceHandle>(rank_, arrays, std::move(owner));
  // In a capture the counts stay unknown to the host.
  if (!is_capturing(native(stream))) state->routed = std::make_shared<CopiedCounts>(rank_, *state, native(stream));
  return state;
}

Layout CudaBackend::layout(const Shape& shape, const Routing& routing, StreamRef stream) {
  const DeviceGuard guard(rank_->device());
  rank_->must_be_on_device("layout", "routing.experts", routing.experts);
  const auto ranks = static_cast<std::size_t>(rank_->num_ranks());
  const auto experts = static_cast<std::size_t>(shape.num_experts);
  const auto tokens = static_cast<std::size_t>(routing.experts.shape[0]);
  core::Cursor at(core::kArrayAlignment);
  const std::uint64_t per_rank = at.take(ranks * 4), per_expert = at.take(experts * 4),
                      in_rank = at.take(tokens * ranks);
  rank_->allocate_for(native(stream));
  const Block block = rank_->allocate(at.bytes(), "layout", "the layout", Rank::Store::kHandles);
  LayoutParams params = layout_params(shape, routing, rank_->num_ranks());
  params.tokens_per_rank = reinterpret_cast<std::int32_t*>(block.data() + per_rank);
  params.pairs_per_expert = reinterpret_cast<std::int32_t*>(block.data() + per_expert);
  params.token_in_rank = reinterpret_cast<std::uint8_t*>(block.data() + in_rank);
  launch_layout(params, rank_->num_sms(), native(stream));
  Layout layout;
  layout.tokens_per_rank.resize(ranks);
  layout.pairs_per_expert.resize(experts);
  layout.token_in_rank.resize(tokens * ranks);
  const auto fetch = [&](void* to, const void* from, std::size_t bytes) {
    if (bytes != 0) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, native(stream)), "cudaMemcpyAsync");
  };
  fetch(layout.tokens_per_rank.data(), params.tokens_per_rank, ranks * 4);
  fetch(layout.pairs_per_expert.data(), params.pairs_per_expert, experts * 4);
  fetch(layout.token_in_rank.data(), params.token_in_rank, tokens * ranks);
  check(cudaStreamSynchronize(native(stream)), "cudaStreamSynchronize");
  return layout;
}

void CudaBackend::layout_into(const Shape& shape, const Routing& routing, const LayoutArrays& out, StreamRef stream) {
  const DeviceGuard guard(rank_->device());
  rank_->must_be_on_device("layout", "routing.experts", routing.experts);
  rank_->must_be_on_device("layout", "out.tokens_per_rank", out.tokens_per_rank);
  rank_->must_be_on_device("layout", "out.pairs_per_expert", out.pairs_per_expert);
  rank_->must_be_on_device("layout", "out.token_in_rank", out.token_in_rank);
  LayoutParams params = layout_params(shape, routing, rank_->num_ranks());
  params.tokens_per_rank = out.tokens_per_rank.as<std::int32_t>();
  params.pairs_per_expert = out.pairs_per_expert.as<std::int32_t>();
  params.token_in_rank = out.token_in_rank.as<std::uint8_t>();
  launch_layout(params, rank_->num_sms(), native(stream));
}

void CudaBackend::barrier(const backend::Call& call) {
  const DeviceGuard guard(rank_->device());
  const Rank::Launch launch = rank_->begin(call);
  BarrierParams params;
  params.team = launch.team;
  launch_barrier(params, launch.stream);
}

namespace {

/// Where the fields of rows lie in their block. x comes last: what keep_front() gives back lies at the end.
struct RowsBlock {
  std::uint64_t x, scales, experts, weights, row_bytes, bytes;

  RowsBlock(std::int64_t num_rows, const Shape& shape)
      : row_bytes(static_cast<std::uint64_t>(shape.hidden) * size_of(shape.dtype)) {
    const auto rows = static_cast<std::uint64_t>(num_rows);
    const auto choices = rows * static_cast<std::uint64_t>(shape.top_k);
    core::Cursor at(core::kArrayAlignment);
    scales = at.take(rows * static_cast<std::uint64_t>(shape.num_scales) * sizeof(float));
    experts = at.take(choices * sizeof(std::int32_t));
    weights = at.take(choices * sizeof(float));
    x = at.take(rows * row_bytes);
    bytes = at.bytes();
  }
};

std::unique_ptr<OwnedRows::State> rows_in(const std::shared_ptr<Block>& block, const RowsBlock& at,
                                          std::int64_t num_rows, const Shape& shape) {
  auto state = std::make_unique<OwnedRows::State>();
  std::byte* const data = block->data();
  state->num_rows = num_rows;
  state->rows.x = TensorView::dense(data + at.x, shape.dtype, {num_rows, shape.hidden});
  if (shape.num_scales > 0) {
    state->rows.scales = TensorView::dense(data + at.scales, DType::kF32, {num_rows, shape.num_scales});
  }
  if (shape.top_k > 0) {
    state->rows.experts = TensorView::dense(data + at.experts, DType::kI32, {num_rows, shape.top_k});
    state->rows.weights = TensorView::dense(data + at.weights, DType::kF32, {num_rows, shape.top_k});
  }
  state->memory = block;
  state->keep_front = [kept = block.get(), at](std::int64_t rows) {
    kept->keep_front(at.x + static_cast<std::uint64_t>(rows) * at.row_bytes);
  };
  return state;
}

}  // namespace

std::unique_ptr<OwnedRows::State> CudaBackend::make_rows(std::int64_t num_rows, const Shape& shape) {
  const RowsBlock at(num_rows, shape);
  return rows_in(std::make_shared<Block>(rank_->allocate(at.bytes, "make_rows", "rows")), at, num_rows, shape);
}

std::unique_ptr<OwnedRows::State> CudaBackend::make_rows_if_free(std::int64_t num_rows, const Shape& shape,
                                                                 StreamRef stream) {
  const DeviceGuard guard(rank_->device());
  rank_->allocate_for(native(stream));
  const RowsBlock at(num_rows, shape);
  Block block = rank_->allocate_free(at.bytes);
  return block ? rows_in(std::make_shared<Block>(std::move(block)), at, num_rows, shape) : nullptr;
}

std::unique_ptr<OwnedRows::State> CudaBackend::make_rows_on(std::int64_t num_rows, const Shape& shape,
                                                            StreamRef stream) {
  const DeviceGuard guard(rank_->device());
  rank_->allocate_for(native(stream));
  return make_rows(num_rows, shape);
}

TensorView CudaBackend::combine_buffer(const Shape& shape) {
  const core::ExpertBlock block = core::expert_block(shape.num_experts, rank_->num_ranks(), rank_->rank());
  const std::int64_t slots = shape.max_tokens * rank_->num_ranks();
  const auto bytes = static_cast<std::uint64_t>(block.count) * static_cast<std::uint64_t>(slots * shape.hidden) * 2;
  return TensorView::dense(rank_->combine_buffer(bytes), DType::kBF16, {block.count, slots, shape.hidden});
}

TensorView CudaBackend::memory(Mode mode, std::size_t offset, std::size_t bytes) {
  const WindowLayout& layout = rank_->layout();
  const bool low = mode == Mode::kLowLatency;
  const std::uint64_t begin = low ? layout.low_latency : layout.slots;
  const std::uint64_t have =
      low ? static_cast<std::uint64_t>(rank_->group().budget().low_latency_bytes) : layout.handles - layout.slots;
  if (offset > have || bytes > have - offset) {
    core::throw_capacity("memory", "bytes of this mode's payload memory", offset + bytes, have);
  }
  return TensorView::dense(rank_->own(begin + offset), DType::kU8, {static_cast<std::int64_t>(bytes)});
}

std::shared_ptr<const void> CudaBackend::hold_memory() {
  return rank_;  // which owns the windows and the zero-copy buffer
}

std::vector<int> CudaBackend::masks() const {
  std::vector<int> masks(static_cast<std::size_t>(rank_->num_ranks()));
  for (std::size_t rank = 0; rank < masks.size(); ++rank) {
    masks[rank] = protocol::Shared(rank_->group().masked()[rank]).load(protocol::kRelaxed) != 0;
  }
  return masks;
}

void CudaBackend::copy_masks(const TensorView& out, StreamRef stream) const {
  const DeviceGuard guard(rank_->device());
  const std::vector<int> now = masks();
  // From pageable memory: the copy has left `now` when the call returns.
  check(cudaMemcpyAsync(out.data, now.data(), now.size() * sizeof(int), cudaMemcpyHostToDevice, native(stream)),
        "cudaMemcpyAsync");
}

void CudaBackend::mask(int rank) {
  rank_->group().mask(rank);
}
void CudaBackend::unmask(int) {
  // The agreement on a turn is made by hosts, which count turns on CPU ranks only; here kernels count them.
  core::throw_error(ErrorCode::kUnsupported, "unmask", "a masked rank stays masked on GPUs; make a new engine with it");
}
void CudaBackend::fail(const Error& error) noexcept {
  rank_->group().fail(error);
}
std::optional<Error> CudaBackend::first_error() const {
  return rank_->first_error();
}
void CudaBackend::refused(std::uint32_t call, const Error& error) noexcept {
  rank_->group().refused(call, error);
}
std::vector<int> CudaBackend::close() {
  return rank_->close();
}

std::uint64_t CudaBackend::ids_out_of_range() const {
  const DeviceGuard guard(rank_->device());
  rank_->must_drain("ids_out_of_range");
  unsigned long long count = 0;
  check(cudaMemcpy(&count, &rank_->state()->ids_out_of_range, sizeof(count), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return count;
}

std::unique_ptr<backend::Backend> make_backend(const Budget& budget, const Topology& topology, const Tuning& tuning,
                                               Bootstrap& bootstrap) {
  return std::make_unique<CudaBackend>(Rank::create(budget, topology, tuning, bootstrap));
}

}  // namespace anyep::cuda
