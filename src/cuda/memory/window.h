// One rank's window as one process sees it. Ranks that are threads of a process share the object: one address for one byte
// (pattern O of the memory model), whichever of their devices looks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "bootstrap/unique_fd.h"
#include "cuda/memory/mapping.h"
#include "cuda/window.h"

namespace anyep::cuda {

/// How ranks see each other's windows; the same for all pairs of a group.
enum class Sharing : std::uint8_t {
  kDescriptors,  ///< GPU memory, by POSIX descriptors over the control links
  kFabric,       ///< GPU memory, by fabric handles
  kIpc,  ///< GPU memory, by the older handles of the CUDA runtime, where descriptors are not permitted; cannot grow
  kHostMemory,  ///< pinned host memory, where a pair of GPUs cannot reach each other: slower, never wrong
};
const char* name_of(Sharing sharing) noexcept;

/// What makes one piece of a window appear in another process. What is not of the kind of sharing stays empty.
struct Ticket {
  bootstrap::UniqueFd fd;                 ///< kDescriptors, kHostMemory
  std::array<std::byte, 64> handle = {};  ///< kFabric, kIpc
};

class Window {
 public:
  virtual ~Window() = default;
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  /// As kernels of this process address its first byte.
  std::byte* base() const noexcept { return base_; }
  /// Bytes from base() that are backed from the start: the layout's, rounded up.
  std::uint64_t bytes() const noexcept { return bytes_; }
  /// Where further pieces may lie: bytes()..reserved().
  std::uint64_t reserved() const noexcept { return reserved_; }
  bool can_grow() const noexcept { return reserved_ > bytes_; }

  /// A new piece of own memory, for a window that can grow. Thread-safe. @throws Error kUnsupported, kResource, kDevice
  virtual Ticket add(std::uint64_t offset, std::uint64_t bytes) = 0;
  /// A piece that its owner has added, unless another rank of this process has done so. Thread-safe, may be called while
  /// kernels run. @throws Error kUnsupported, kResource, kDevice, kCorrupt
  virtual void import(std::uint64_t offset, std::uint64_t bytes, const Ticket& ticket) = 0;

 protected:
  Window() = default;
  std::byte* base_ = nullptr;
  std::uint64_t bytes_ = 0, reserved_ = 0;
};

/// What all windows of a group have in common.
struct WindowShape {
  std::uint64_t bytes = 0;     ///< backed from the start
  std::uint64_t reserved = 0;  ///< addresses
  std::uint64_t unit = 0;      ///< of sizes and offsets of pieces
  /// The layout's bytes, and addresses for eight times as much, but at most 64 GiB more.
  static WindowShape of(std::uint64_t layout_bytes, Sharing sharing, std::uint64_t granularity);
};

/// A window in this rank's GPU, or in host memory, whose first `zero_bytes` are zero when it returns. Waits for no kernel.
/// @throws Error kUnsupported (try another kind), kResource, kDevice
std::shared_ptr<Window> make_window(Sharing sharing, const WindowShape& shape, std::uint64_t zero_bytes, int device,
                                    std::span<const int> devices, Ticket& ticket);
/// A window that a rank of another process has made, for `devices` of this one.
/// @throws Error kUnsupported (try another kind), kResource, kDevice, kCorrupt
std::shared_ptr<Window> map_window(Sharing sharing, const WindowShape& shape, int device, std::span<const int> devices,
                                   const Ticket& ticket);

/// Windows of this process by the number that their owner drew: for ranks that are threads of it. Null when there is none.
std::shared_ptr<Window> find_window(std::uint64_t id);
/// The same, or else what `make` makes, which is remembered. One rank of the process makes at a time.
std::shared_ptr<Window> find_or_make_window(std::uint64_t id, const std::function<std::shared_ptr<Window>()>& make);
/// A number that no other window has: 64 random bits. @throws Error kResource
std::uint64_t draw_window_id();

}  // namespace anyep::cuda
