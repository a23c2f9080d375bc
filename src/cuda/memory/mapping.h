// Addresses for memory of a GPU: a range that is reserved once and backed piece by piece.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/memory/physical.h"

namespace anyep::cuda {

/// Which devices of this process may touch the memory.
using Devices = std::vector<int>;

/// A range of device addresses and what is mapped there. Moves only. Not thread-safe.
class Mapping {
 public:
  Mapping() = default;
  /// Addresses only. @throws Error kUnsupported, kResource, kDevice
  static Mapping reserve(std::uint64_t bytes, std::uint64_t alignment);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  /// Maps all of `memory` at `offset`, for all `devices` alike: one address for one byte in the whole process. May be called
  /// while kernels run, also kernels that use other parts of the range, and blocks on none. The memory may be released
  /// afterwards. On failure nothing is mapped. @throws Error kUnsupported (no access from one of the devices), kDevice
  void map(std::uint64_t offset, const PhysicalMemory& memory, std::span<const int> devices);

  std::byte* data() const noexcept { return reinterpret_cast<std::byte*>(base_); }
  std::uint64_t bytes() const noexcept { return bytes_; }  ///< reserved

 private:
  struct Piece {
    std::uint64_t offset, bytes;
  };
  CUdeviceptr base_ = 0;
  std::uint64_t bytes_ = 0;
  std::vector<Piece> pieces_;
};

}  // namespace anyep::cuda
