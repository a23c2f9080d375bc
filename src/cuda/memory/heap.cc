#include "cuda/memory/heap.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core/layout.h"

namespace anyep::cuda {

void Heap::add(std::uint64_t offset, std::uint64_t bytes) {
  const std::uint64_t begin = core::round_up(offset, kAlignment);
  const std::uint64_t end = (offset + bytes) / kAlignment * kAlignment;
  if (end <= begin) return;
  const std::lock_guard lock(mutex_);
  bytes_ += end - begin;
  put(begin, end - begin);
}

std::optional<std::uint64_t> Heap::allocate(std::uint64_t bytes, Lifetime lifetime) {
  if (bytes > UINT64_MAX / 2) return std::nullopt;
  const std::uint64_t wanted = core::round_up(std::max<std::uint64_t>(bytes, 1), kAlignment);
  const std::lock_guard lock(mutex_);
  if (waiting_ > bytes_ / kWaitingShare) look_at_released(kFewLooks);
  std::optional<std::uint64_t> offset = take(wanted);
  if (!offset && !released_.empty()) {
    look_at_released(released_.size());
    offset = take(wanted);
  }
  if (!offset) return std::nullopt;
  blocks_.emplace(*offset, Block{wanted, lifetime, false, {}});
  in_use_ += wanted;
  if (lifetime == Lifetime::kGraph) graphs_ += wanted;
  high_water_ = std::max(high_water_, in_use_ + waiting_);
  return offset;
}

void Heap::release(std::uint64_t offset, std::shared_ptr<const Completion> after) {
  std::vector<std::shared_ptr<const Completion>> all;
  if (after != nullptr) all.push_back(std::move(after));
  release(offset, std::move(all));
}

void Heap::release(std::uint64_t offset, std::vector<std::shared_ptr<const Completion>> after) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(offset);
  if (found == blocks_.end() || found->second.released || found->second.lifetime == Lifetime::kGraph) return;
  Block& block = found->second;
  in_use_ -= block.bytes;
  if (after.empty()) {
    const std::uint64_t bytes = block.bytes;
    blocks_.erase(found);
    put(offset, bytes);
    return;
  }
  waiting_ += block.bytes;
  block.released = true;
  block.after = std::move(after);
  released_.push_back(offset);
}

void Heap::keep_front(std::uint64_t offset, std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(offset);
  if (found == blocks_.end() || found->second.released || found->second.lifetime == Lifetime::kGraph) return;
  std::uint64_t& held = found->second.bytes;
  if (bytes >= held) return;
  const std::uint64_t kept = core::round_up(std::max<std::uint64_t>(bytes, 1), kAlignment);
  if (kept >= held) return;
  in_use_ -= held - kept;
  put(offset + kept, held - kept);
  held = kept;
}

std::uint64_t Heap::largest_free() const {
  const std::lock_guard lock(mutex_);
  std::uint64_t largest = 0;
  for (const auto& [offset, bytes] : free_) largest = std::max(largest, bytes);
  return largest;
}

bool Heap::has_pending() const {
  const std::lock_guard lock(mutex_);
  return !released_.empty();
}

HeapStatistics Heap::statistics() const {
  HeapStatistics now;
  now.largest_free = largest_free();
  const std::lock_guard lock(mutex_);
  now.bytes = bytes_;
  now.in_use = in_use_;
  now.waiting = waiting_;
  now.graphs = graphs_;
  now.high_water = high_water_;
  now.num_blocks = blocks_.size();
  return now;
}

/// Asks the driver at most about the oldest `most` blocks, a few of which are not over: ops of one rank end in the order of
/// their release. Blocks of one op wait for the same event, which is asked once.
void Heap::look_at_released(std::size_t most) {
  constexpr int kMostUnfinished = 4;
  int unfinished = 0;
  const Completion* asked = nullptr;  // the last one that was not over
  std::erase_if(released_, [&](std::uint64_t offset) {
    if (most == 0 || unfinished >= kMostUnfinished) return false;
    --most;
    const auto found = blocks_.find(offset);
    auto& after = found->second.after;
    while (!after.empty() && after.back().get() != asked && after.back()->done()) after.pop_back();
    if (!after.empty()) {
      if (after.back().get() != asked) ++unfinished;
      asked = after.back().get();
      return false;
    }
    const std::uint64_t bytes = found->second.bytes;
    waiting_ -= bytes;
    blocks_.erase(found);
    put(offset, bytes);
    return true;
  });
}

void Heap::put(std::uint64_t offset, std::uint64_t bytes) {
  std::uint64_t begin = offset, end = offset + bytes;
  const auto after = free_.lower_bound(begin);
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == begin) {
      begin = before->first;
      free_.erase(before);
    }
  }
  if (after != free_.end() && after->first == end) {
    end += after->second;
    free_.erase(after);
  }
  free_.emplace(begin, end - begin);
}

std::optional<std::uint64_t> Heap::take(std::uint64_t bytes) {
  if (bytes < kSmallBytes) {
    for (auto range = free_.rbegin(); range != free_.rend(); ++range) {
      if (range->second < bytes) continue;
      const std::uint64_t offset = range->first + range->second - bytes;
      if (range->second == bytes) {
        free_.erase(std::next(range).base());
      } else {
        range->second -= bytes;
      }
      return offset;
    }
    return std::nullopt;
  }
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    const auto [offset, have] = *range;
    if (have < bytes) continue;
    free_.erase(range);
    if (have > bytes) free_.emplace(offset + bytes, have - bytes);
    return offset;
  }
  return std::nullopt;
}

}  // namespace anyep::cuda
