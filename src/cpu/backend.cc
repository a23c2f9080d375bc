#include "cpu/backend.h"

#include <fmt/format.h>

#include <utility>

#include "core/layout.h"
#include "core/log.h"
#include "core/routing.h"
#include "core/tuning.h"
#include "host/op_run.h"
#include "protocol/barrier.h"

namespace anyep::cpu {

CpuBackend::CpuBackend(std::unique_ptr<Group> group) : group_(std::move(group)) {}

void CpuBackend::barrier(const backend::Call& call) {
  OpRun run(*group_, call);
  const int me = group_->rank();
  const core::WindowLayout& layout = group_->layout();
  barrier_turn_ = protocol::next_epoch(barrier_turn_);
  const std::uint64_t mark = protocol::make_mark(group_->generation(), barrier_turn_, 0);
  if (group_->budget().masks) run.waiter.masked = group_->masked();
  run.at(kBeforeSend);
  for (int peer = 0; peer < group_->num_ranks(); ++peer) {
    if (peer == me) continue;
    protocol::enter_barrier(group_->word(peer, layout.barrier, me), group_->doorbell(peer), mark);
    run.at(kMidSend);
  }
  run.at(kAfterFlag);
  for (int peer = 0; peer < group_->num_ranks(); ++peer) {
    if (peer == me) continue;
    const protocol::Who who{peer, kInReceive};
    const protocol::Ended ended = protocol::wait_barrier(run.waiter, who, group_->word(me, layout.barrier, peer), mark);
    if (ended == protocol::Ended::kMasked) continue;
    if (group_->budget().masks && run.is_silent(ended, peer)) {
      mask_silent(peer, call.op);
      run.forget_fault();
      continue;
    }
    run.must(ended, who);
    run.at(kInReceive);
  }
}

void CpuBackend::mask_silent(int peer, const char* op) {
  group_->set_mask(peer, true);
  core::log_warning(fmt::format("{}: rank {} did not answer in time and is masked from now on", op, peer));
}

std::unique_ptr<OwnedRows::State> CpuBackend::make_rows(std::int64_t num_rows, const Shape& shape) {
  auto state = std::make_unique<OwnedRows::State>();
  const std::shared_ptr<RankMemory>& memory = group_->own_memory();
  core::Cursor at(core::kArrayAlignment);
  const auto rows = static_cast<std::uint64_t>(num_rows);
  const std::uint64_t x = at.take(rows * static_cast<std::uint64_t>(shape.hidden) * size_of(shape.dtype));
  const std::uint64_t scales = at.take(rows * static_cast<std::uint64_t>(shape.num_scales) * sizeof(float));
  const std::optional<std::uint64_t> offset = memory->heap->allocate(at.bytes());
  if (!offset) {
    core::throw_capacity("make_rows", "bytes of the window's heap", at.bytes(), memory->heap->largest_free(),
                         "Release rows, or create the engine with a larger budget.rows_bytes.");
  }
  state->memory = memory;
  state->release = [keep = memory.get(), offset = *offset] { keep->heap->release(offset); };
  state->num_rows = num_rows;
  state->rows.x = TensorView::dense(memory->at(*offset + x), shape.dtype, {num_rows, shape.hidden});
  if (shape.num_scales > 0) {
    state->rows.scales = TensorView::dense(memory->at(*offset + scales), DType::kF32, {num_rows, shape.num_scales});
  }
  if (shape.top_k > 0) {
    const auto choices = rows * static_cast<std::uint64_t>(shape.top_k);
    state->experts.assign(choices, -1);
    state->weights.assign(choices, 0.0f);
    state->rows.experts = TensorView::dense(state->experts.data(), DType::kI32, {num_rows, shape.top_k});
    state->rows.weights = TensorView::dense(state->weights.data(), DType::kF32, {num_rows, shape.top_k});
  }
  return state;
}

TensorView CpuBackend::combine_buffer(const Shape& shape) {
  const core::ExpertBlock block = core::expert_block(shape.num_experts, group_->num_ranks(), group_->rank());
  const std::int64_t slots = shape.max_tokens * group_->num_ranks();
  const auto bytes = static_cast<std::uint64_t>(block.count) * static_cast<std::uint64_t>(slots * shape.hidden) * 2;
  return TensorView::dense(group_->combine_buffer(bytes), DType::kBF16, {block.count, slots, shape.hidden});
}

TensorView CpuBackend::memory(Mode mode, std::size_t offset, std::size_t bytes) {
  const core::WindowLayout& layout = group_->layout();
  const bool low = mode == Mode::kLowLatency;
  const std::uint64_t begin = low ? layout.low_latency : layout.slots;
  const std::uint64_t have = low ? layout.low_latency_bytes : layout.rows_bytes;
  if (offset > have || bytes > have - offset) {
    core::throw_capacity("memory", "bytes of this mode's payload memory", offset + bytes, have);
  }
  return TensorView::dense(group_->own(begin + offset), DType::kU8, {static_cast<std::int64_t>(bytes)});
}

std::vector<int> CpuBackend::masks() const {
  std::vector<int> masks(static_cast<std::size_t>(group_->num_ranks()));
  for (std::size_t rank = 0; rank < masks.size(); ++rank) {
    masks[rank] = protocol::Shared(group_->masked()[rank]).load(protocol::kRelaxed) != 0;
  }
  return masks;
}

void CpuBackend::mask(int rank) {
  group_->mask(rank);
}

void CpuBackend::unmask(int rank) {
  group_->ask_unmask(rank);
}

void CpuBackend::fail(const Error& error) noexcept {
  group_->fail(error);
}
std::optional<Error> CpuBackend::first_error() const {
  return group_->first_error();
}
void CpuBackend::refused(std::uint32_t call, const Error& error) noexcept {
  group_->refused(call, error);
}
std::vector<int> CpuBackend::close() {
  return group_->close();
}

}  // namespace anyep::cpu
