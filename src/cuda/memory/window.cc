#include "cuda/memory/window.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#include "bootstrap/memfd.h"
#include "core/check.h"
#include "core/layout.h"
#include "cuda/memory/pinned.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "host/memory.h"

namespace anyep::cuda {
namespace {

constexpr std::uint64_t kMostGrowth = std::uint64_t{64} << 30;
constexpr std::uint64_t kGrowthFactor = 8;

void zero(std::byte* memory, std::uint64_t bytes) {
  // A stream of its own: the legacy stream would wait for the caller's.
  cudaStream_t stream = nullptr;
  const OutsideCapture outside;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaError_t status = cudaMemsetAsync(memory, 0, bytes, stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  log_failure(cudaStreamDestroy(stream), "cudaStreamDestroy");
  check(status, "cudaMemsetAsync");
}

// ---- GPU memory by descriptors or fabric handles -------------------------------------------------------------------

class MappedWindow final : public Window {
 public:
  MappedWindow(Sharing sharing, const WindowShape& shape, int device, std::span<const int> devices)
      : sharing_(sharing), device_(device), devices_(devices.begin(), devices.end()) {
    mapping_ = Mapping::reserve(shape.reserved, shape.unit);
    base_ = mapping_.data();
    bytes_ = shape.bytes;
    reserved_ = shape.reserved;
  }

  Ticket add(std::uint64_t offset, std::uint64_t bytes) override {
    const DeviceGuard on_device(device_);
    const bool fabric = sharing_ == Sharing::kFabric;
    const auto memory = PhysicalMemory::create(
        device_, bytes, fabric ? PhysicalMemory::Handles::kDescriptorAndFabric : PhysicalMemory::Handles::kDescriptor);
    Ticket ticket;
    if (fabric) {
      ticket.handle = memory.export_fabric();
    } else {
      ticket.fd = memory.export_fd();
    }
    map(offset, memory);
    return ticket;
  }

  void import(std::uint64_t offset, std::uint64_t bytes, const Ticket& ticket) override {
    {
      const std::lock_guard lock(mutex_);
      if (mapped_.contains(offset)) return;
    }
    const DeviceGuard on_device(device_);
    map(offset, sharing_ == Sharing::kFabric ? PhysicalMemory::import(ticket.handle, bytes)
                                             : PhysicalMemory::import(ticket.fd.get(), bytes));
  }

 private:
  void map(std::uint64_t offset, const PhysicalMemory& memory) {
    const std::lock_guard lock(mutex_);
    if (!mapped_.insert(offset).second) return;  // another rank of this process was first
    try {
      mapping_.map(offset, memory, devices_);
    } catch (...) {
      mapped_.erase(offset);
      throw;
    }
  }

  const Sharing sharing_;
  const int device_;
  const Devices devices_;
  std::mutex mutex_;
  Mapping mapping_;
  std::set<std::uint64_t> mapped_;
};

// ---- GPU memory by cudaIpc -----------------------------------------------------------------------------------------

class IpcWindow final : public Window {
 public:
  IpcWindow(const WindowShape& shape, int device, std::span<const int> devices)
      : device_(device), devices_(devices.begin(), devices.end()) {
    bytes_ = reserved_ = shape.bytes;
  }
  ~IpcWindow() override {
    if (base_ == nullptr) return;
    const DeviceGuard on_device(device_, std::nothrow);
    const OutsideCapture outside;
    if (own_) {
      log_failure(cudaFree(base_), "cudaFree");
    } else {
      log_failure(cudaIpcCloseMemHandle(base_), "cudaIpcCloseMemHandle");
    }
  }

  Ticket add(std::uint64_t offset, std::uint64_t bytes) override {
    ANYEP_CHECK(offset == 0 && base_ == nullptr, "memory by cudaIpc does not grow");
    const DeviceGuard on_device(device_);
    const OutsideCapture outside;
    void* memory = nullptr;
    const cudaError_t status = cudaMalloc(&memory, bytes);
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      throw_device_memory("create", "cudaMalloc", bytes);
    }
    check(status, "cudaMalloc");
    base_ = static_cast<std::byte*>(memory);
    own_ = true;
    for (const int other : devices_) {
      if (other != device_) enable_access(other);
    }
    Ticket ticket;
    cudaIpcMemHandle_t handle{};
    check_ipc(cudaIpcGetMemHandle(&handle, memory), "cudaIpcGetMemHandle");
    static_assert(sizeof(handle) == sizeof(ticket.handle));
    std::memcpy(ticket.handle.data(), &handle, sizeof(handle));
    return ticket;
  }

  void import(std::uint64_t offset, std::uint64_t, const Ticket& ticket) override {
    ANYEP_CHECK(offset == 0 && base_ == nullptr, "memory by cudaIpc does not grow");
    const DeviceGuard on_device(device_);
    if (devices_.size() > 1) {  // an opened handle has another address on every device
      core::throw_error(ErrorCode::kUnsupported, "create", "cudaIpc serves one GPU per process");
    }
    const OutsideCapture outside;
    cudaIpcMemHandle_t handle{};
    std::memcpy(&handle, ticket.handle.data(), sizeof(handle));
    void* memory = nullptr;
    check_ipc(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess), "cudaIpcOpenMemHandle");
    base_ = static_cast<std::byte*>(memory);
  }

 private:
  void enable_access(int from) const {
    const DeviceGuard guard(from);
    const cudaError_t status = cudaDeviceEnablePeerAccess(device_, 0);
    if (status == cudaErrorPeerAccessAlreadyEnabled) {
      (void)cudaGetLastError();
      return;
    }
    check_ipc(status, "cudaDeviceEnablePeerAccess");
  }

  static void check_ipc(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();
    if (status == cudaErrorMemoryAllocation) check(status, call);
    core::throw_error(ErrorCode::kUnsupported, "create",
                      fmt::format("{} on device {}: {}", call, current_device(), cudaGetErrorName(status)));
  }

  const int device_;
  const Devices devices_;
  bool own_ = false;
};

// ---- pinned host memory --------------------------------------------------------------------------------------------

class HostWindow final : public Window {
 public:
  HostWindow(const WindowShape& shape, int device) : device_(device) {
    void* const at = ::mmap(nullptr, shape.reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) core::throw_resource("create", "mmap", errno, shape.reserved);
    on_host_ = static_cast<std::byte*>(at);
    addresses_ = shape.reserved;
    bytes_ = shape.bytes;
    reserved_ = shape.reserved;
  }
  ~HostWindow() override {
    ranges_.clear();  // before the pages go
    ::munmap(on_host_, addresses_);
  }

  Ticket add(std::uint64_t offset, std::uint64_t bytes) override {
    const std::uint64_t available = host::available_memory_bytes();
    if (bytes > available) core::throw_resource("create", "host memory for windows", 0, bytes, available);
    Ticket ticket;
    ticket.fd = bootstrap::make_memfd("anyep-cuda-window", bytes);
    map(offset, bytes, ticket.fd.get());
    return ticket;
  }

  void import(std::uint64_t offset, std::uint64_t bytes, const Ticket& ticket) override {
    bootstrap::check_memfd(ticket.fd.get(), bytes);
    map(offset, bytes, ticket.fd.get());
  }

 private:
  void map(std::uint64_t offset, std::uint64_t bytes, int fd) {
    ANYEP_CHECK(offset + bytes <= addresses_, "a piece lies in the reserved range");
    const DeviceGuard on_device(device_);  // registering makes a context on the current device
    const std::lock_guard lock(mutex_);
    if (!mapped_.insert(offset).second) return;
    try {
      std::byte* const at = on_host_ + offset;
      if (::mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        core::throw_resource("create", "mmap", errno, bytes);
      }
      ranges_.push_back(PinnedRange::of({at, bytes}));
      if (base_ != nullptr) return;
      base_ = ranges_.front().on_device(on_host_);
      // Pieces follow each other for the kernels only where those use the host's addresses.
      if (base_ != on_host_) reserved_ = bytes_;
    } catch (...) {
      mapped_.erase(offset);
      throw;
    }
  }

  const int device_;
  std::mutex mutex_;
  std::byte* on_host_ = nullptr;
  std::uint64_t addresses_ = 0;
  std::set<std::uint64_t> mapped_;
  std::vector<PinnedRange> ranges_;
};

std::shared_ptr<Window> empty_window(Sharing sharing, const WindowShape& shape, int device,
                                     std::span<const int> devices) {
  switch (sharing) {
    case Sharing::kIpc:
      return std::make_shared<IpcWindow>(shape, device, devices);
    case Sharing::kHostMemory:
      return std::make_shared<HostWindow>(shape, device);
    case Sharing::kDescriptors:
    case Sharing::kFabric:
      break;
  }
  return std::make_shared<MappedWindow>(sharing, shape, device, devices);
}

// ---- windows of this process ---------------------------------------------------------------------------------------

struct Registry {
  std::mutex mutex;
  std::unordered_map<std::uint64_t, std::weak_ptr<Window>> windows;
};
Registry& registry() {
  static Registry* const one = new Registry;  // never destroyed: engines may outlive static destruction
  return *one;
}

}  // namespace

const char* name_of(Sharing sharing) noexcept {
  switch (sharing) {
    case Sharing::kDescriptors:
      return "GPU memory by descriptors";
    case Sharing::kFabric:
      return "GPU memory by fabric handles";
    case Sharing::kIpc:
      return "GPU memory by cudaIpc";
    case Sharing::kHostMemory:
      return "pinned host memory";
  }
  return "?";
}

WindowShape WindowShape::of(std::uint64_t layout_bytes, Sharing sharing, std::uint64_t granularity) {
  WindowShape shape;
  shape.unit = std::max(granularity, kPageBytes);
  shape.bytes = core::round_up(std::max<std::uint64_t>(layout_bytes, 1), shape.unit);
  shape.reserved = shape.bytes;
  if (sharing != Sharing::kIpc) {
    shape.reserved += core::round_up(std::min((kGrowthFactor - 1) * shape.bytes, kMostGrowth), shape.unit);
  }
  return shape;
}

std::shared_ptr<Window> make_window(Sharing sharing, const WindowShape& shape, std::uint64_t zero_bytes, int device,
                                    std::span<const int> devices, Ticket& ticket) {
  auto window = empty_window(sharing, shape, device, devices);
  ticket = window->add(0, shape.bytes);
  if (sharing == Sharing::kHostMemory) return window;  // a memfd is born zero
  const DeviceGuard on_device(device);
  zero(window->base(), zero_bytes);
  return window;
}

std::shared_ptr<Window> map_window(Sharing sharing, const WindowShape& shape, int device, std::span<const int> devices,
                                   const Ticket& ticket) {
  const DeviceGuard guard(device);
  auto window = empty_window(sharing, shape, device, devices);
  window->import(0, shape.bytes, ticket);
  return window;
}

std::shared_ptr<Window> find_window(std::uint64_t id) {
  Registry& known = registry();
  const std::lock_guard lock(known.mutex);
  const auto found = known.windows.find(id);
  return found == known.windows.end() ? nullptr : found->second.lock();
}

std::shared_ptr<Window> find_or_make_window(std::uint64_t id, const std::function<std::shared_ptr<Window>()>& make) {
  Registry& known = registry();
  const std::lock_guard lock(known.mutex);
  std::erase_if(known.windows, [](const auto& entry) { return entry.second.expired(); });
  if (const auto found = known.windows.find(id); found != known.windows.end()) {
    if (auto window = found->second.lock()) return window;
  }
  auto window = make();
  known.windows[id] = window;
  return window;
}

std::uint64_t draw_window_id() {
  std::uint64_t id = 0;
  while (::getrandom(&id, sizeof(id), 0) != static_cast<ssize_t>(sizeof(id))) {
    if (errno != EINTR) core::throw_resource("create", "getrandom", errno);
  }
  return id;
}

}  // namespace anyep::cuda
