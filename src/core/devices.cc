#include "core/devices.h"

#include <fmt/format.h>

namespace anyep::core {

std::string cuda_version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

#if !ANYEP_CUDA
Devices examine_devices() {
  Devices none;
  none.problem = "this build has no CUDA backend (-DANYEP_CUDA=ON)";
  return none;
}
#endif

}  // namespace anyep::core
