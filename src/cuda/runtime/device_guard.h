// Which device and which rules for capture a thread works under, for the length of a scope.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <new>

namespace anyep::cuda {

/// Makes `device` current in this thread, then puts back what was. Where nothing was current, nothing is afterwards:
/// cudaSetDevice() would make a context on device 0 for every thread that only passed through.
class DeviceGuard {
 public:
  /// @throws Error kUnsupported, kDevice
  explicit DeviceGuard(int device);
  /// For destructors: where the device cannot be made current any more, what is current stays.
  DeviceGuard(int device, std::nothrow_t) noexcept;
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void enter(int device);
  bool pushed_ = false;
};

/// While a thread of the process captures a graph in global mode, calls that could disturb it fail in every thread,
/// and spoil the capture. Ours take no part in any capture; this says so for one thread and scope.
class OutsideCapture {
 public:
  OutsideCapture() noexcept { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Is this stream being captured? @throws Error kDevice
bool is_capturing(cudaStream_t stream);

/// Device that is current in this thread. @throws Error kUnsupported, kDevice
int current_device();

}  // namespace anyep::cuda
