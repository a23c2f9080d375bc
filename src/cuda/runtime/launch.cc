#include "cuda/runtime/launch.h"

#include <anyep/error.h>

#include <array>
#include <mutex>
#include <string>

namespace anyep::cuda {
namespace {

constexpr int kMaxDevices = 128;  ///< more GPUs than any host has

void check(cudaError_t error, const char* doing, const char* name) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // an error of a launch stays behind otherwise
  throw Error(ErrorCode::kDevice, std::string(doing) + " " + name + " failed: " + cudaGetErrorString(error));
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice", "");
  if (device >= kMaxDevices) throw Error(ErrorCode::kUnsupported, "more than 128 GPUs in one process");
  return device;
}

DeviceTraits look_up(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute", "");
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  DeviceTraits traits;
  traits.num_sms = attribute(cudaDevAttrMultiProcessorCount);
  traits.shared_bytes = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  traits.bulk_copies = major == 9 || major == 10;
  return traits;
}

KernelEntry*& first_kernel() {
  static KernelEntry* first = nullptr;  // filled by constructors of globals, before main
  return first;
}

}  // namespace

const DeviceTraits& device_traits() {
  static std::array<DeviceTraits, kMaxDevices> traits;
  static std::array<std::once_flag, kMaxDevices> once;
  const auto device = static_cast<std::size_t>(current_device());
  std::call_once(once[device], [&] { traits[device] = look_up(static_cast<int>(device)); });
  return traits[device];
}

KernelEntry::KernelEntry(const void* function, const char* name)
    : function_(function), name_(name), next_(first_kernel()) {
  first_kernel() = this;
}

void KernelEntry::load() const {
  const int device = current_device();
  const std::uint64_t bit = std::uint64_t{1} << (device % 64);
  std::atomic<std::uint64_t>& loaded = loaded_[device / 64];
  if ((loaded.load(std::memory_order_acquire) & bit) != 0) return;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, function_), "loading", name_);
  const auto most = static_cast<int>(device_traits().shared_bytes - attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory of", name_);
  loaded.fetch_or(bit, std::memory_order_release);  // two threads may both have done it: no harm
}

void KernelEntry::launch(const LaunchShape& shape, void** arguments) const {
  load();
  cudaLaunchAttribute attributes[2]{};
  unsigned num_attributes = 0;
  if (shape.early) {
    cudaLaunchAttribute& early = attributes[num_attributes++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 0) {
    cudaLaunchAttribute& cluster = attributes[num_attributes++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  check(cudaLaunchKernelExC(&config, function_, arguments), "launch of", name_);
}

void zero_later(void* memory, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "zeroing", "memory");
}

void load_kernels() {
  for (const KernelEntry* kernel = first_kernel(); kernel != nullptr; kernel = kernel->next_) kernel->load();
}

}  // namespace anyep::cuda
