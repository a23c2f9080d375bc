// The driver's own functions, found at run time: nothing of the library links the driver, so that it loads without one.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <string_view>

namespace anyep::cuda {

/// What the CUDA runtime has no counterpart for.
struct Driver {
  PFN_cuGetErrorName_v6000 get_error_name = nullptr;
  PFN_cuGetErrorString_v6000 get_error_string = nullptr;
  PFN_cuDeviceGetAttribute_v2000 device_get_attribute = nullptr;
  PFN_cuCtxGetCurrent_v4000 ctx_get_current = nullptr;
  PFN_cuCtxPushCurrent_v4000 ctx_push_current = nullptr;
  PFN_cuCtxPopCurrent_v4000 ctx_pop_current = nullptr;
  PFN_cuDevicePrimaryCtxRetain_v7000 primary_ctx_retain = nullptr;
  PFN_cuMemGetAllocationGranularity_v10020 mem_granularity = nullptr;
  PFN_cuMemCreate_v10020 mem_create = nullptr;
  PFN_cuMemRelease_v10020 mem_release = nullptr;
  PFN_cuMemExportToShareableHandle_v10020 mem_export = nullptr;
  PFN_cuMemImportFromShareableHandle_v10020 mem_import = nullptr;
  PFN_cuMemAddressReserve_v10020 mem_reserve = nullptr;
  PFN_cuMemAddressFree_v10020 mem_free = nullptr;
  PFN_cuMemMap_v10020 mem_map = nullptr;
  PFN_cuMemUnmap_v10020 mem_unmap = nullptr;
  PFN_cuMemSetAccess_v10020 mem_set_access = nullptr;
};

/// Never throws; null without a driver. Found once: a driver does not appear while a process runs.
const Driver* find_driver() noexcept;
/// @throws Error kUnsupported: no driver, one that is too old, or no GPU
const Driver& driver(std::string_view op = "create");

/// Why CUDA cannot be used here, as one sentence for people; empty where it can. Makes no context.
const char* why_unusable() noexcept;
/// kUnsupported with that sentence and what to do.
[[noreturn]] void throw_unusable(std::string_view op);

}  // namespace anyep::cuda
