#include "cuda/runtime/check.h"

#include <fmt/format.h>

#include <string>

#include "core/check.h"
#include "core/log.h"
#include "cuda/runtime/driver.h"

namespace anyep::cuda {
namespace {

std::string describe(cudaError_t status, const char* call) {
  int device = -1;
  const bool known = cudaGetDevice(&device) == cudaSuccess;
  return fmt::format("{} failed{}: {} ({}): {}", call, known ? fmt::format(" on device {}", device) : std::string(),
                     cudaGetErrorName(status), static_cast<int>(status), cudaGetErrorString(status));
}

std::string describe(CUresult status, const char* call) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (const Driver* const driver = find_driver()) {
    driver->get_error_name(status, &name);
    driver->get_error_string(status, &text);
  }
  int device = -1;
  const bool known = cudaGetDevice(&device) == cudaSuccess;
  return fmt::format("{} failed{}: {} ({}): {}", call, known ? fmt::format(" on device {}", device) : std::string(),
                     name == nullptr ? "?" : name, static_cast<int>(status), text == nullptr ? "no text" : text);
}

template <class Status>
void log_it(Status status, const char* call) noexcept {
  try {
    core::log_warning(describe(status, call));
  } catch (...) {  // out of memory: there is nobody else to tell
  }
}

}  // namespace

void check(cudaError_t status, const char* call, std::string_view op) {
  if (status == cudaSuccess) [[likely]]
    return;
  (void)cudaGetLastError();  // takes back what is not sticky, so that the caller's next call does not find it
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice || status == cudaErrorStubLibrary) {
    throw_unusable(op);
  }
  if (status == cudaErrorMemoryAllocation) throw_device_memory(op, call, 0);
  core::throw_error(ErrorCode::kDevice, op, describe(status, call));
}

void check(CUresult status, const char* call, std::string_view op) {
  if (status == CUDA_SUCCESS) [[likely]]
    return;
  if (status == CUDA_ERROR_NO_DEVICE || status == CUDA_ERROR_STUB_LIBRARY) throw_unusable(op);
  if (status == CUDA_ERROR_OUT_OF_MEMORY) throw_device_memory(op, call, 0);
  core::throw_error(ErrorCode::kDevice, op, describe(status, call));
}

void throw_device_memory(std::string_view op, std::string_view call, std::uint64_t need) {
  std::size_t free = 0, total = 0;
  int device = -1;
  (void)cudaGetDevice(&device);
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) free = total = 0;
  (void)cudaGetLastError();
  core::throw_resource(op, fmt::format("{} for memory of device {} ({} bytes in all)", call, device, total), 0, need,
                       free);
}

void log_failure(cudaError_t status, const char* call) noexcept {
  // At process exit the driver may be gone before us, and a forked child has none: there is nothing to release then.
  if (status == cudaSuccess || status == cudaErrorCudartUnloading || status == cudaErrorInitializationError) return;
  log_it(status, call);
}

void log_failure(CUresult status, const char* call) noexcept {
  if (status == CUDA_SUCCESS || status == CUDA_ERROR_DEINITIALIZED || status == CUDA_ERROR_NOT_INITIALIZED) return;
  log_it(status, call);
}

}  // namespace anyep::cuda
