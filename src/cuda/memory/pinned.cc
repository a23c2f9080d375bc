#include "cuda/memory/pinned.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "core/check.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "cuda/runtime/driver.h"

namespace anyep::cuda {

PinnedPages::PinnedPages(std::uint64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  (void)driver();
  device_ = current_device();
  void* data = nullptr;
  const OutsideCapture outside;
  const cudaError_t status = cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (status == cudaErrorMemoryAllocation) core::throw_resource("create", "cudaHostAlloc", 0, bytes);
  check(status, "cudaHostAlloc");
  data_ = static_cast<std::byte*>(data);
  std::memset(data_, 0, bytes);
}

PinnedPages::PinnedPages(PinnedPages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)), device_(other.device_) {}

PinnedPages& PinnedPages::operator=(PinnedPages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

PinnedPages::~PinnedPages() {
  if (data_ == nullptr) return;
  const DeviceGuard on_device(device_, std::nothrow);
  const OutsideCapture outside;
  log_failure(cudaFreeHost(data_), "cudaFreeHost");
}

struct PinnedRange::Registration {
  std::byte* data = nullptr;
  std::uint64_t bytes = 0;
  int device = 0;            ///< that was current when it was made
  bool same_address = true;  ///< kernels use the host's address

  ~Registration() {
    if (data == nullptr) return;
    const DeviceGuard on_device(device, std::nothrow);
    const OutsideCapture outside;
    log_failure(cudaHostUnregister(data), "cudaHostUnregister");
  }
};

PinnedRange PinnedRange::of(std::span<std::byte> pages) {
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(pages.data());
  if (pages.empty() || address % page != 0 || pages.size() % page != 0) {
    core::throw_argument("create", "pages", fmt::format("{} bytes at {:#x}", pages.size(), address),
                         fmt::format("whole pages of {} bytes", page));
  }
  (void)driver();
  static std::mutex mutex;
  using Known = std::map<std::byte*, std::weak_ptr<const Registration>>;
  static Known& known = *new Known;  // never destroyed: engines may outlive static destruction
  // The lock is held over the call: another rank must not meet a range that is only half registered.
  const std::lock_guard lock(mutex);
  std::erase_if(known, [](const auto& entry) { return entry.second.expired(); });
  PinnedRange range;
  if (const auto found = known.find(pages.data()); found != known.end()) {
    range.registration_ = found->second.lock();
    if (range.registration_ != nullptr && range.registration_->bytes == pages.size()) return range;
  }
  auto made = std::make_shared<Registration>();
  made->device = current_device();
  const OutsideCapture outside;
  const cudaError_t status =
      cudaHostRegister(pages.data(), pages.size(), cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (status == cudaErrorMemoryAllocation) core::throw_resource("create", "cudaHostRegister", 0, pages.size());
  check(status, "cudaHostRegister");
  made->data = pages.data();
  made->bytes = pages.size();
  void* on_device = nullptr;
  check(cudaHostGetDevicePointer(&on_device, pages.data(), 0), "cudaHostGetDevicePointer");
  made->same_address = on_device == pages.data();
  range.registration_ = made;
  known[pages.data()] = made;
  return range;
}

std::span<std::byte> PinnedRange::pages() const noexcept {
  if (registration_ == nullptr) return {};
  return {registration_->data, registration_->bytes};
}

std::byte* PinnedRange::translate(std::byte* on_host) const {
  ANYEP_CHECK(registration_ != nullptr && on_host >= registration_->data &&
                  on_host < registration_->data + registration_->bytes,
              "the address lies in the registered range");
  if (registration_->same_address) return on_host;
  void* on_device = nullptr;
  check(cudaHostGetDevicePointer(&on_device, registration_->data, 0), "cudaHostGetDevicePointer");
  return static_cast<std::byte*>(on_device) + (on_host - registration_->data);
}

}  // namespace anyep::cuda
