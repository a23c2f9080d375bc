#include "cuda/runtime/driver.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "core/check.h"

namespace anyep::cuda {
namespace {

template <class Function>
bool find(const char* name, unsigned version, Function& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &address, version, cudaEnableDefault, &result);
  (void)cudaGetLastError();
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) return false;
  function = reinterpret_cast<Function>(address);
  return true;
}

/// The version is that of the signature which the field has.
bool find_all(Driver& driver) {
  return find("cuGetErrorName", 6000, driver.get_error_name) &&
         find("cuGetErrorString", 6000, driver.get_error_string) &&
         find("cuDeviceGetAttribute", 2000, driver.device_get_attribute) &&
         find("cuCtxGetCurrent", 4000, driver.ctx_get_current) &&
         find("cuCtxPushCurrent", 4000, driver.ctx_push_current) &&
         find("cuCtxPopCurrent", 4000, driver.ctx_pop_current) &&
         find("cuDevicePrimaryCtxRetain", 7000, driver.primary_ctx_retain) &&
         find("cuMemGetAllocationGranularity", 10020, driver.mem_granularity) &&
         find("cuMemCreate", 10020, driver.mem_create) && find("cuMemRelease", 10020, driver.mem_release) &&
         find("cuMemExportToShareableHandle", 10020, driver.mem_export) &&
         find("cuMemImportFromShareableHandle", 10020, driver.mem_import) &&
         find("cuMemAddressReserve", 10020, driver.mem_reserve) && find("cuMemAddressFree", 10020, driver.mem_free) &&
         find("cuMemMap", 10020, driver.mem_map) && find("cuMemUnmap", 10020, driver.mem_unmap) &&
         find("cuMemSetAccess", 10020, driver.mem_set_access);
}

const char* examine() noexcept {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "there is no NVIDIA driver (libcuda.so.1)";
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  if (status == cudaErrorInsufficientDriver) return "the NVIDIA driver is too old for this build's CUDA runtime";
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) return "no GPU is visible to this process";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return find_driver() == nullptr ? "the NVIDIA driver lacks virtual memory functions of CUDA 10.2" : "";
}

}  // namespace

const Driver* find_driver() noexcept {
  struct Found {
    Driver driver;
    bool all = find_all(driver);
  };
  static const Found found;
  return found.all ? &found.driver : nullptr;
}

const char* why_unusable() noexcept {
  static const char* const reason = examine();
  return reason;
}

void throw_unusable(std::string_view op) {
  const char* const reason = why_unusable();
  core::throw_error(
      ErrorCode::kUnsupported, op,
      fmt::format("CUDA ranks cannot run here: {}. ANYEP_BACKEND=cpu uses CPU ranks; `anyep doctor` says more",
                  *reason == '\0' ? "CUDA refuses its devices" : reason));
}

const Driver& driver(std::string_view op) {
  if (*why_unusable() != '\0') throw_unusable(op);
  return *find_driver();
}

}  // namespace anyep::cuda
