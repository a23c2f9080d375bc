// Host memory that kernels read and write while the host looks at it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace anyep::cuda {

/// Zeroed host memory, one address for the host and for the kernels of every device. Moves only. Freeing it waits for all
/// kernels of the process (measured), so a rank frees its pages when its own have left.
class PinnedPages {
 public:
  PinnedPages() = default;
  /// @throws Error kUnsupported, kResource, kDevice
  explicit PinnedPages(std::uint64_t bytes);
  PinnedPages(PinnedPages&& other) noexcept;
  PinnedPages& operator=(PinnedPages&& other) noexcept;
  ~PinnedPages();

  std::byte* data() const noexcept { return data_; }
  std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
  int device_ = 0;  ///< that was current when it was made
};

/// Existing whole pages of the host, made visible to the kernels of every device. Ranks of one process that name the same
/// range share its registration. Moves only; the pages must outlive it. Its end waits for kernels like that of PinnedPages.
class PinnedRange {
 public:
  PinnedRange() = default;
  /// @throws Error kArgument (not whole pages), kUnsupported, kResource, kDevice
  static PinnedRange of(std::span<std::byte> pages);

  std::span<std::byte> pages() const noexcept;
  /// The address by which kernels of the current device know `on_host`, which lies in the range. @throws Error kDevice
  template <class T>
  T* on_device(T* on_host) const {
    return reinterpret_cast<T*>(translate(reinterpret_cast<std::byte*>(on_host)));
  }

 private:
  struct Registration;
  std::byte* translate(std::byte* on_host) const;
  std::shared_ptr<const Registration> registration_;
};

}  // namespace anyep::cuda
