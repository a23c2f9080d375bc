// The windows of all ranks of a group, as one rank's kernels address them.
#pragma once

#include <anyep/bootstrap.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bootstrap/control.h"
#include "cuda/memory/growth.h"
#include "cuda/memory/window.h"
#include "cuda/window.h"

namespace anyep::cuda {

class Windows {
 public:
  /// Collective, in create(), before the control links' watcher starts; all or none. Makes this rank's window and maps all
  /// others; the first way of sharing that works for every pair is taken (sharing.h). When it returns, every window is zero
  /// but for its heap, on every rank.
  /// @throws Error the same on every rank: kUnsupported, kMismatch, kResource, kDevice, and what the exchange throws
  static std::shared_ptr<Windows> share(const WindowLayout& layout, int device, int rank, control::Control& control,
                                        Deadline deadline);

  int num_ranks() const noexcept { return static_cast<int>(windows_.size()); }
  /// Offset 0 of that rank's window, for kernels of this rank's GPU.
  std::byte* base(int rank) const noexcept { return windows_[static_cast<std::size_t>(rank)]->base(); }
  /// Bytes of every window that are backed from the start: the layout's, rounded up. The rest behind the heap is its too.
  std::uint64_t bytes() const noexcept { return shape_.bytes; }
  Sharing sharing() const noexcept { return sharing_; }
  /// Why it is not the best way of sharing; empty when it is.
  const std::string& reason() const noexcept { return reason_; }

  /// Most bytes that the own window can grow by now.
  std::uint64_t room() const { return growth_->room(); }
  /// See Growth::grow(). On success the caller puts the piece into its heap.
  Piece grow(std::uint64_t bytes, Deadline deadline, const std::function<bool(int)>& gone) {
    return growth_->grow(bytes, deadline, gone);
  }

 private:
  struct Setup;
  Windows() = default;

  Sharing sharing_ = Sharing::kDescriptors;
  std::string reason_;
  WindowShape shape_;
  std::vector<std::shared_ptr<Window>> windows_;
  std::unique_ptr<Growth> growth_;  ///< after windows_: its thread uses them
};

}  // namespace anyep::cuda
