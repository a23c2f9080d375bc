#include "cuda/runtime/device_guard.h"

#include <fmt/format.h>

#include <mutex>
#include <vector>

#include "core/check.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/driver.h"

namespace anyep::cuda {
namespace {

/// The context that the CUDA runtime uses too. Held until the process ends, as the runtime holds it.
CUcontext primary_context(int device) {
  static std::mutex mutex;
  static std::vector<CUcontext>& contexts = *new std::vector<CUcontext>;  // never destroyed: guards may outlive statics
  const std::lock_guard lock(mutex);
  const auto index = static_cast<std::size_t>(device);
  if (index >= contexts.size()) contexts.resize(index + 1, nullptr);
  if (contexts[index] == nullptr)
    check(driver().primary_ctx_retain(&contexts[index], device), "cuDevicePrimaryCtxRetain");
  return contexts[index];
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  enter(device);
}

DeviceGuard::DeviceGuard(int device, std::nothrow_t) noexcept {
  try {
    enter(device);
  } catch (...) {  // CUDA has gone before us, as at exit: there is nothing left to release either
  }
}

void DeviceGuard::enter(int device) {
  int count = 0;
  const Driver& functions = driver();
  if (device < 0) {
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    core::throw_argument("create", "device", fmt::format("{}", device), fmt::format("0..{}", count - 1));
  }
  CUcontext current = nullptr;
  const CUcontext wanted = primary_context(device);
  check(functions.ctx_get_current(&current), "cuCtxGetCurrent");
  if (current == wanted) return;
  check(functions.ctx_push_current(wanted), "cuCtxPushCurrent");
  pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (!pushed_) return;
  CUcontext popped = nullptr;
  log_failure(find_driver()->ctx_pop_current(&popped), "cuCtxPopCurrent");
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

}  // namespace anyep::cuda
