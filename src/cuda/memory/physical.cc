#include "cuda/memory/physical.h"

#include <fmt/format.h>

#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/layout.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "cuda/runtime/driver.h"

namespace anyep::cuda {
namespace {

bool has(int device, CUdevice_attribute attribute) {
  int value = 0;
  // A driver that does not know the attribute does not have the feature.
  return driver().device_get_attribute(&value, attribute, device) == CUDA_SUCCESS && value != 0;
}

CUmemAllocationProp properties(int device, PhysicalMemory::Handles handles) {
  CUmemAllocationProp what{};
  what.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  what.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  what.location.id = device;
  what.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  if (handles == PhysicalMemory::Handles::kDescriptorAndFabric) {
    what.requestedHandleTypes =
        static_cast<CUmemAllocationHandleType>(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | CU_MEM_HANDLE_TYPE_FABRIC);
  }
  what.allocFlags.gpuDirectRDMACapable = has(device, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
  return what;
}

}  // namespace

void check_sharing(CUresult status, const char* call) {
  switch (status) {
    case CUDA_ERROR_NOT_SUPPORTED:
    case CUDA_ERROR_NOT_PERMITTED:
    case CUDA_ERROR_INVALID_DEVICE:
    case CUDA_ERROR_INVALID_HANDLE:
    case CUDA_ERROR_OPERATING_SYSTEM:
    case CUDA_ERROR_PEER_ACCESS_UNSUPPORTED:
    case CUDA_ERROR_INVALID_VALUE:
      break;
    default:
      check(status, call);
      return;
  }
  const char* name = nullptr;
  driver().get_error_name(status, &name);
  core::throw_error(ErrorCode::kUnsupported, "create",
                    fmt::format("{} on device {}: {}", call, current_device(), name == nullptr ? "?" : name));
}

std::uint64_t granularity(int device) {
  std::size_t bytes = 0;
  const CUmemAllocationProp what = properties(device, PhysicalMemory::Handles::kDescriptor);
  check(driver().mem_granularity(&bytes, &what, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), "cuMemGetAllocationGranularity");
  return bytes;
}

SharingSupport sharing_support(int device) {
  const bool vmm = has(device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
  SharingSupport support;
  support.descriptors = vmm && has(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
  support.fabric = vmm && has(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED);
  support.rdma = vmm && has(device, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
  support.host_pages = has(device, CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED);
  return support;
}

PhysicalMemory PhysicalMemory::create(int device, std::uint64_t bytes, Handles handles) {
  const OutsideCapture outside;
  CUmemAllocationProp what = properties(device, handles);
  PhysicalMemory memory;
  CUresult status = driver().mem_create(&memory.handle_, bytes, &what, 0);
  if (status != CUDA_SUCCESS && status != CUDA_ERROR_OUT_OF_MEMORY && what.allocFlags.gpuDirectRDMACapable != 0) {
    what.allocFlags.gpuDirectRDMACapable = 0;  // a container without the NIC's driver: memory all the same
    status = driver().mem_create(&memory.handle_, bytes, &what, 0);
  }
  if (status == CUDA_ERROR_OUT_OF_MEMORY) throw_device_memory("create", "cuMemCreate", bytes);
  check_sharing(status, "cuMemCreate");
  memory.bytes_ = bytes;
  return memory;
}

PhysicalMemory PhysicalMemory::import(int fd, std::uint64_t bytes) {
  const OutsideCapture outside;
  PhysicalMemory memory;
  // The driver takes the descriptor's number in the place of a pointer.
  void* const number = reinterpret_cast<void*>(static_cast<std::intptr_t>(fd));
  check_sharing(driver().mem_import(&memory.handle_, number, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                "cuMemImportFromShareableHandle");
  memory.bytes_ = bytes;
  return memory;
}

PhysicalMemory PhysicalMemory::import(const FabricHandle& handle, std::uint64_t bytes) {
  const OutsideCapture outside;
  PhysicalMemory memory;
  CUmemFabricHandle fabric{};
  static_assert(sizeof(fabric.data) == sizeof(handle));
  std::memcpy(fabric.data, handle.data(), sizeof(handle));
  check_sharing(driver().mem_import(&memory.handle_, &fabric, CU_MEM_HANDLE_TYPE_FABRIC),
                "cuMemImportFromShareableHandle");
  memory.bytes_ = bytes;
  return memory;
}

PhysicalMemory::PhysicalMemory(PhysicalMemory&& other) noexcept
    : handle_(std::exchange(other.handle_, 0)), bytes_(std::exchange(other.bytes_, 0)) {}

PhysicalMemory& PhysicalMemory::operator=(PhysicalMemory&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

PhysicalMemory::~PhysicalMemory() {
  if (handle_ != 0) log_failure(find_driver()->mem_release(handle_), "cuMemRelease");
}

bootstrap::UniqueFd PhysicalMemory::export_fd() const {
  int fd = -1;
  check_sharing(driver().mem_export(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                "cuMemExportToShareableHandle");
  return bootstrap::UniqueFd(fd);
}

FabricHandle PhysicalMemory::export_fabric() const {
  CUmemFabricHandle fabric{};
  check_sharing(driver().mem_export(&fabric, handle_, CU_MEM_HANDLE_TYPE_FABRIC, 0), "cuMemExportToShareableHandle");
  FabricHandle handle;
  std::memcpy(handle.data(), fabric.data, sizeof(handle));
  return handle;
}

}  // namespace anyep::cuda
