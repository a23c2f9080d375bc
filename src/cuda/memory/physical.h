// Memory of one GPU without an address: what is handed to other processes.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "bootstrap/unique_fd.h"

namespace anyep::cuda {

/// What a process of another host, but in the same NVLink fabric, imports memory by. Whoever has it can map the memory.
using FabricHandle = std::array<std::byte, CU_IPC_HANDLE_SIZE>;

/// Owns one reference to memory made by cuMemCreate; mappings hold their own. The memory lives until its last reference and
/// mapping in any process is gone, whoever made it. Moves only.
class PhysicalMemory {
 public:
  PhysicalMemory() = default;
  /// Shared by descriptor, or by fabric handle too. `bytes` is a multiple of granularity(). RDMA-capable where the GPU is.
  /// @throws Error kUnsupported (the driver offers no such handles), kResource, kDevice
  enum class Handles : std::uint8_t { kDescriptor, kDescriptorAndFabric };
  static PhysicalMemory create(int device, std::uint64_t bytes, Handles handles = Handles::kDescriptor);
  /// A peer's memory, under the current device's context. @throws Error kUnsupported, kResource, kDevice
  static PhysicalMemory import(int fd, std::uint64_t bytes);
  static PhysicalMemory import(const FabricHandle& handle, std::uint64_t bytes);
  PhysicalMemory(PhysicalMemory&& other) noexcept;
  PhysicalMemory& operator=(PhysicalMemory&& other) noexcept;
  ~PhysicalMemory();

  /// @throws Error kUnsupported where this process may not, kDevice
  bootstrap::UniqueFd export_fd() const;
  FabricHandle export_fabric() const;

  CUmemGenericAllocationHandle get() const noexcept { return handle_; }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  CUmemGenericAllocationHandle handle_ = 0;
  std::uint64_t bytes_ = 0;
};

/// The unit of sizes and addresses of such memory.
std::uint64_t granularity(int device);

/// What `device` can do for sharing memory. Needs a driver, makes no context.
struct SharingSupport {
  bool descriptors = false;  ///< VMM memory by POSIX descriptor
  bool fabric = false;       ///< by fabric handle
  bool rdma = false;         ///< VMM memory that a NIC can reach
  bool host_pages = false;   ///< registered host memory
};
SharingSupport sharing_support(int device);

/// Errors of sharing that another way of sharing may avoid become kUnsupported, others are as check() has them.
void check_sharing(CUresult status, const char* call);

}  // namespace anyep::cuda
