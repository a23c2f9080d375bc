// Tensors of the host on the GPU, and back.
#pragma once

#include <anyep/types.h>

#include <cstdint>

#include "bench/probes/probes.h"
#include "bench/support/buffer.h"

namespace anyep::bench {

inline std::size_t as_size(std::int64_t value) {
  return static_cast<std::size_t>(value);
}
inline std::size_t bytes_of(const TensorView& view) {
  return as_size(view.num_elements()) * size_of(view.dtype);
}

/// A dense tensor on the current device.
class DeviceTensor {
 public:
  DeviceTensor() = default;
  DeviceTensor(DType dtype, const Extents& shape);
  /// A copy of the host's.
  explicit DeviceTensor(const TensorView& host);
  const TensorView& view() const { return view_; }

 private:
  DeviceMemory memory_;
  TensorView view_;
};

/// A copy of a dense tensor on the GPU, in memory of the host.
class HostTensor {
 public:
  HostTensor() = default;
  explicit HostTensor(const TensorView& device);
  const TensorView& view() const { return view_; }

 private:
  Buffer memory_;
  TensorView view_;
};

void copy_to_device(void* device, const void* host, std::size_t bytes);
void copy_to_host(void* host, const void* device, std::size_t bytes);
/// Overwrites, so that a check sees what the next call wrote.
void poison(const TensorView& device);

}  // namespace anyep::bench
