// Ranks are threads here: no kernel may be loaded, and no stream share a queue with another, while kernels of two ranks wait for
// each other (docs/gpu.md). Said before the first call to CUDA; what the caller has set stays.
#include <cstdlib>

namespace {

[[maybe_unused]] const int kSet = [] {
  return setenv("CUDA_MODULE_LOADING", "EAGER", 0) + setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
}();

}  // namespace
