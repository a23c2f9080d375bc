// Memory that ends at a page that nobody may touch.
#pragma once

#include <sys/mman.h>

#include <cstddef>

namespace anyep::emulation {

inline constexpr std::size_t kPageBytes = 4096;

/// Whole pages that hold so many bytes.
constexpr std::size_t in_pages(std::size_t bytes) {
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

/// Zeroed, in_pages(bytes) of them. nullptr = there are none.
inline std::byte* map_pages(std::size_t bytes) {
  void* const map = ::mmap(nullptr, in_pages(bytes) + kPageBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<std::byte*>(map);
  ::mprotect(begin + in_pages(bytes), kPageBytes, PROT_NONE);
  return begin;
}
inline void unmap_pages(std::byte* begin, std::size_t bytes) {
  ::munmap(begin, in_pages(bytes) + kPageBytes);
}

}  // namespace anyep::emulation
