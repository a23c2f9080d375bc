// The shared memory of CPU ranks: windows and staging areas in memfds, and the heap of rows inside a window.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "bootstrap/unique_fd.h"
#include "core/buffers.h"

namespace anyep::host {

/// One mapping of a memfd. Moves only.
class Mapping {
 public:
  enum class Access { kRead, kReadWrite };
  Mapping() = default;
  /// @throws Error kResource
  static Mapping map(int fd, std::uint64_t bytes, Access access);
  /// Private memory of this rank; address space until it is touched. @throws Error kResource
  static Mapping reserve(std::uint64_t bytes);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();
  std::byte* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
};

/// Hands out ranges of a window's heap, lowest address first. Thread-safe; keeps no data in the window.
class Heap {
 public:
  Heap(std::uint64_t offset, std::uint64_t bytes);
  std::optional<std::uint64_t> allocate(std::uint64_t bytes);  ///< offset in the window; rounded up to row alignment
  void release(std::uint64_t offset);
  std::uint64_t largest_free() const;

 private:
  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::uint64_t> free_;  ///< offset -> bytes
  std::map<std::uint64_t, std::uint64_t> used_;
};

/// A window and a staging area as one process sees them: its own, or a peer's.
/// Ranks that are threads of one process share one object, so that ThreadSanitizer sees one address for one byte.
struct RankMemory {
  bootstrap::UniqueFd window_fd, staging_fd;  ///< own memory only
  Mapping window, staging;
  std::unique_ptr<Heap> heap;  ///< own memory only
  std::uint64_t token = 0;     ///< names own memory inside this process

  std::byte* at(std::uint64_t offset) const { return window.data() + offset; }
};

/// Makes, formats and seals this rank's memory. @throws Error kResource
std::shared_ptr<RankMemory> make_memory(const core::WindowLayout& layout, int rank, std::uint16_t generation);
/// A peer's memory by its descriptors. Peers cannot write the staging area. @throws Error kCorrupt, kResource
std::shared_ptr<RankMemory> map_memory(const core::WindowLayout& layout, int peer, std::uint16_t generation,
                                       int window_fd, int staging_fd);
/// Memory that another rank of this process made, by its token; null when it is gone.
std::shared_ptr<RankMemory> find_memory(std::uint64_t token);

/// MemAvailable of /proc/meminfo, in bytes; UINT64_MAX where it does not say (a sandbox's file may say 0, which no running
/// kernel means).
std::uint64_t available_in(std::istream& meminfo);
/// Bytes this host could still give: MemAvailable, or less under a control group's limit.
std::uint64_t available_memory_bytes();

}  // namespace anyep::host
