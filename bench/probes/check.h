// Failures of CUDA calls in benchmarks: an exception that names the call.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace anyep::bench {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

}  // namespace anyep::bench
