// Memory of a measurement: ordinary anonymous pages, touched before anything is timed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace anyep::bench {

class Buffer {
 public:
  Buffer() = default;
  /// Zeroed pages, each of them touched. @throws std::bad_alloc.
  explicit Buffer(std::size_t bytes);
  /// Address space whose pages come when they are first used: for slabs of which a call fills a part.
  static Buffer untouched(std::size_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Makes the next timed span start with cold caches, outside of it.
class CacheFlush {
 public:
  /// More than any last-level cache of a machine that this was written for; all ranks together overwrite this much.
  static constexpr std::int64_t kTotalBytes = 128 << 20;

  explicit CacheFlush(int num_ranks);
  /// Overwrites the buffer, then reads it from the start, so that no dirty line is left to be written back later.
  void run();

 private:
  Buffer buffer_;
  std::uint64_t seen_ = 0;
};

}  // namespace anyep::bench
