#include "bench/gpu/mirror.h"

#include "bench/probes/check.h"

namespace anyep::bench {

void copy_to_device(void* device, const void* host, std::size_t bytes) {
  if (bytes > 0) check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

void copy_to_host(void* host, const void* device, std::size_t bytes) {
  if (bytes > 0) check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

void poison(const TensorView& device) {
  constexpr int kPoison = 0xA5;
  if (!device.given()) return;
  check(cudaMemset(device.data, kPoison, bytes_of(device)), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

DeviceTensor::DeviceTensor(DType dtype, const Extents& shape) {
  view_ = TensorView::dense(nullptr, dtype, shape);
  memory_ = DeviceMemory(bytes_of(view_));
  view_.data = memory_.data();
}

DeviceTensor::DeviceTensor(const TensorView& host) {
  if (!host.given()) return;
  *this = DeviceTensor(host.dtype, host.shape);
  copy_to_device(view_.data, host.data, bytes_of(host));
}

HostTensor::HostTensor(const TensorView& device) {
  if (!device.given()) return;
  view_ = device;
  memory_ = Buffer(bytes_of(device));
  view_.data = memory_.data();
  copy_to_host(view_.data, device.data, bytes_of(device));
}

}  // namespace anyep::bench
