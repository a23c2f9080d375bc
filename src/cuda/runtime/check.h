// How failures of CUDA become errors of the library.
#pragma once

#include <anyep/error.h>
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>

namespace anyep::cuda {

/// @throws Error kDevice "<op>: <call> failed on device <n>: <name> (<number>): <text>" unless the call succeeded;
/// kUnsupported where the reason is that there is no driver or no GPU; kResource where device memory ran out.
void check(cudaError_t status, const char* call, std::string_view op = "create");
void check(CUresult status, const char* call, std::string_view op = "create");

/// kResource with what was asked for and what the current device has free.
[[noreturn]] void throw_device_memory(std::string_view op, std::string_view call, std::uint64_t need);

/// For destructors: what cannot be undone is logged, since nobody can be told.
void log_failure(cudaError_t status, const char* call) noexcept;
void log_failure(CUresult status, const char* call) noexcept;

}  // namespace anyep::cuda
