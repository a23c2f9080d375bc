// The only way to launch a kernel, and the list of all of them.
//
// A kernel is a global object of type Kernel<Params> beside its code; load_kernels() goes through all of them.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace anyep::cuda {

/// Of one GPU, looked up once.
struct DeviceTraits {
  int num_sms = 0;
  std::size_t shared_bytes = 0;  ///< that one block can have, dynamic and static together
  /// Device code for it has bulk copies and clusters (device/ptx.cuh); else the portable path runs.
  bool bulk_copies = false;
};
/// Of the current device.
const DeviceTraits& device_traits();

struct LaunchShape {
  unsigned blocks = 1, threads = 32;
  std::size_t shared_bytes = 0;  ///< dynamic
  cudaStream_t stream = nullptr;
  /// Programmatic dependent launch: the kernel may start before the one in front of it in the stream has ended, and waits
  /// for it by grid_dependency_wait() before it touches anything. Only where a GPU serves one rank.
  bool early = false;
  /// Blocks of a cluster; 0 = none. Only where device code has clusters: DeviceTraits::bulk_copies.
  unsigned cluster = 0;
};

/// What launch() needs to know of a kernel. Lives for ever; a node of the list of all kernels.
class KernelEntry {
 public:
  KernelEntry(const void* function, const char* name);
  KernelEntry(const KernelEntry&) = delete;
  KernelEntry& operator=(const KernelEntry&) = delete;

  const char* name() const { return name_; }
  /// Makes the kernel resident on the current device and lets it have all its shared memory. Cheap when done before.
  void load() const;

 protected:
  void launch(const LaunchShape& shape, void** arguments) const;

 private:
  friend void load_kernels();

  const void* function_;
  const char* name_;
  mutable std::atomic<std::uint64_t> loaded_[2] = {};  ///< bit d: done on device d
  KernelEntry* next_;
};

template <class Params>
class Kernel : public KernelEntry {
 public:
  Kernel(void (*function)(Params), const char* name) : KernelEntry(reinterpret_cast<const void*>(function), name) {}

  /// @throws Error(kDevice), naming the kernel
  void operator()(const LaunchShape& shape, const Params& params) const {
    void* arguments[] = {const_cast<Params*>(&params)};
    launch(shape, arguments);
  }
};

/// Zeroes memory of the current device in stream order.
void zero_later(void* memory, std::size_t bytes, cudaStream_t stream);

/// Loads every kernel of the library on the current device: a first launch must not wait behind a kernel that waits for a
/// peer. For create().
void load_kernels();

}  // namespace anyep::cuda
