#include "cuda/runtime/architectures.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>

#include "core/check.h"
#include "cuda/runtime/check.h"

namespace anyep::cuda {

std::string_view architectures() noexcept {
  return ANYEP_CUDA_ARCHS;
}

Code code_for(std::string_view architectures, int major, int minor) noexcept {
  Code best = Code::kNone;
  while (!architectures.empty()) {
    const std::size_t comma = architectures.find(',');
    std::string_view one = architectures.substr(0, comma);
    architectures.remove_prefix(comma == std::string_view::npos ? architectures.size() : comma + 1);
    const bool exact = one.ends_with('a') || one.ends_with('f');
    if (exact) one.remove_suffix(1);
    int number = 0;
    for (const char digit : one) number = 10 * number + (digit - '0');
    if (number / 10 != major) continue;
    if (exact ? number % 10 != minor : number % 10 > minor) continue;
    best = std::max(best, exact ? Code::kTuned : Code::kPortable);
  }
  return best;
}

void check_code(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  if (code_for(architectures(), properties.major, properties.minor) != Code::kNone) return;
  core::throw_error(ErrorCode::kUnsupported, "create",
                    fmt::format("device {} ({}) is of architecture {}.{}; this build holds code for {}. Build it with "
                                "-DANYEP_CUDA_ARCHS={}{}",
                                device, properties.name, properties.major, properties.minor, architectures(),
                                properties.major, properties.minor));
}

}  // namespace anyep::cuda
