// Stands in for src/cuda/runtime/launch.h: launches go to the emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace anyep::cuda {

struct DeviceTraits {
  int num_sms = 0;
  std::size_t shared_bytes = 0;
  bool bulk_copies = false;
};
inline const DeviceTraits& device_traits() {
  static const DeviceTraits traits{emulation::traits().num_sms, emulation::traits().shared_bytes,
                                   ANYEP_BULK_COPIES != 0};
  return traits;
}

struct LaunchShape {
  unsigned blocks = 1, threads = 32;
  std::size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool early = false;
  unsigned cluster = 0;
};

template <class Params>
class Kernel {
 public:
  Kernel(void (*function)(Params), const char* name) : function_(function), name_(name) {}

  void operator()(const LaunchShape& shape, const Params& params) const {
    emulation::put(shape.stream, {.name = name_,
                                  .blocks = shape.blocks,
                                  .threads = shape.threads,
                                  .cluster = shape.cluster,
                                  .shared_bytes = shape.shared_bytes,
                                  .early = shape.early,
                                  .kernel = [function = function_, params] { function(params); }});
  }

 private:
  void (*function_)(Params);
  const char* name_;
};

inline void zero_later(void* memory, std::size_t bytes, cudaStream_t stream) {
  (void)cudaMemsetAsync(memory, 0, bytes, stream);
}
inline void load_kernels() {}

}  // namespace anyep::cuda
