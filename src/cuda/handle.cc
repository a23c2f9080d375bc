#include "cuda/handle.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "core/check.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "protocol/platform.h"

namespace anyep::cuda {
namespace {

std::uint64_t bytes_of(std::int64_t count) {
  return static_cast<std::uint64_t>(count) * sizeof(std::int32_t);
}

}  // namespace

DeviceHandle::DeviceHandle(std::shared_ptr<Rank> rank, std::int64_t num_tokens, int ranges)
    : rank_(std::move(rank)), num_tokens_(num_tokens) {
  const std::int64_t ranks = rank_->num_ranks();
  core::Cursor at(core::kArrayAlignment);
  const std::uint64_t rows_until = at.take(bytes_of(ranks)), tokens = at.take(bytes_of(ranks)),
                      place = at.take(bytes_of(num_tokens * ranks)), before = at.take(bytes_of(ranges * ranks)),
                      final_rows = at.take(bytes_of(num_tokens * ranks));
  arrays_ = rank_->allocate(at.bytes(), "route", "a handle", Rank::Store::kHandles);
  const auto array = [&](std::uint64_t offset) { return reinterpret_cast<std::int32_t*>(arrays_.data() + offset); };
  rows_until_data = array(rows_until);
  tokens_data = array(tokens);
  place_data = array(place);
  before_data = array(before);
  final_place_ = array(final_rows);
}

DeviceHandle::DeviceHandle(std::shared_ptr<Rank> rank, const HandleArrays& arrays, std::shared_ptr<const void> owner)
    : rank_(std::move(rank)), num_tokens_(arrays.place.shape[0]), owner_(std::move(owner)) {
  rows_until_data = arrays.rows_until.as<std::int32_t>();
  tokens_data = arrays.tokens.as<std::int32_t>();
  place_data = arrays.place.as<std::int32_t>();
  final_place_ = place_data;
  has_final_place = true;
  source_ = arrays.source.as<std::int32_t>();
  has_source_ = true;
  source_rows_ = arrays.source.shape[0];
  tokens_per_range = static_cast<int>(std::max<std::int64_t>(num_tokens_, 1));
}

Places DeviceHandle::places() const {
  return {place_data, before_data, tokens_per_range, static_cast<int>(num_tokens_)};
}

TensorView DeviceHandle::rows_until() {
  return TensorView::dense(rows_until_data, DType::kI32, {rank_->num_ranks()});
}

TensorView DeviceHandle::tokens() {
  return TensorView::dense(tokens_data, DType::kI32, {rank_->num_ranks()});
}

TensorView DeviceHandle::place() {
  if (!has_final_place) {
    if (routed != nullptr) routed->wait();  // notify has made what the kernel reads
    const DeviceGuard guard(rank_->device());
    launch_final_places(place_data, before_data, tokens_per_range, static_cast<int>(num_tokens_), rank_->num_ranks(),
                        final_place_, nullptr);
    check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    has_final_place = true;
  }
  return TensorView::dense(final_place_, DType::kI32, {num_tokens_, rank_->num_ranks()});
}

TensorView DeviceHandle::source() {
  if (!has_source_) {
    core::throw_error(ErrorCode::kState, "source",
                      "on GPUs the source tokens arrive with the rows: they "
                      "are known after the first dispatch");
  }
  return TensorView::dense(source_, DType::kI32, {source_rows_});
}

std::uint64_t DeviceHandle::source_for(const std::shared_ptr<Rank>& rank, std::int64_t rows) {
  if (has_source_ && !source_block_) return Grant::kNone;  // an adopted handle has its own
  if (!has_source_ || source_rows_ < rows || source_rank_ != rank.get()) {
    source_block_ = rank->allocate(bytes_of(rows), "dispatch", "source indices", Rank::Store::kHandles);
    source_ = reinterpret_cast<const std::int32_t*>(source_block_.data());
    source_rows_ = rows;
    source_rank_ = rank.get();
    has_source_ = true;
  }
  return source_block_.offset();
}

void DeviceHandle::settle(std::optional<std::int64_t> rows) {
  if (before_data == nullptr) return;  // adopted: everything is there
  if (rows) {
    source_rows_ = std::min(source_rows_, *rows);
  } else {
    has_source_ = has_final_place = false;
  }
}

CopiedCounts::CopiedCounts(std::shared_ptr<Rank> rank, Handle::State& handle, cudaStream_t stream)
    : rank_(std::move(rank)), handle_(handle), page_(rank_->take_page()) {
  const auto bytes = static_cast<std::size_t>(handle.num_ranks) * sizeof(std::int32_t);
  DeviceArrays& arrays = *handle.device;
  check(cudaMemcpyAsync(page_->rows_until, arrays.rows_until().data, bytes, cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync", "adopt");
  check(cudaMemcpyAsync(page_->tokens, arrays.tokens().data, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync",
        "adopt");
  copied_ = rank_->mark(stream);
}

bool CopiedCounts::done() const noexcept {
  if (filled_) return true;
  if (!copied_->done()) return false;
  const auto ranks = static_cast<std::size_t>(handle_.num_ranks);
  handle_.rows_until.assign(page_->rows_until, page_->rows_until + ranks);
  handle_.tokens.assign(page_->tokens, page_->tokens + ranks);
  filled_ = true;
  return true;
}

bool CopiedCounts::wait_for(std::uint64_t limit) const {
  const std::uint64_t begin = protocol::now_ns();
  while (!done()) {
    if (protocol::now_ns() - begin > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

void CopiedCounts::wait() const {
  while (!wait_for(1'000'000'000)) rank_->look("adopt", "between");
}

CountsEvent::CountsEvent(std::shared_ptr<Rank> rank, Handle::State& handle, std::uint64_t op_limit_ns,
                         int local_experts)
    : rank_(std::move(rank)),
      handle_(handle),
      page_(static_cast<DeviceHandle&>(*handle.device).page),
      limit_(op_limit_ns),
      local_experts_(local_experts) {}

bool CountsEvent::done() const noexcept {
  if (filled_) return true;
  if (protocol::Shared(page_->word).load(protocol::kAcquire) == 0) return false;  // pattern Q
  fill();
  return true;
}

void CountsEvent::fill() const {
  const auto ranks = static_cast<std::size_t>(handle_.num_ranks);
  handle_.rows_until.assign(page_->rows_until, page_->rows_until + ranks);
  handle_.tokens.assign(page_->tokens, page_->tokens + ranks);
  handle_.pairs_per_expert.assign(page_->pairs, page_->pairs + local_experts_);
  filled_ = true;
}

bool CountsEvent::wait_for(std::uint64_t limit) const {
  const std::uint64_t begin = protocol::now_ns();
  for (unsigned looks = 1; !done(); ++looks) {
    protocol::relax();
    if (looks % 1024 != 0) continue;
    const std::uint64_t waited = protocol::now_ns() - begin;
    rank_->look("route", "in_recv");
    if (waited > limit) return false;
    if (waited > 1'000'000) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

void CountsEvent::wait() const {
  while (!wait_for(limit_)) {  // the kernel has its own limit from its start;
                               // what stands before it is the caller's
  }
}

}  // namespace anyep::cuda
