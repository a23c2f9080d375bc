#include "bench/support/buffer.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace anyep::bench {
namespace {

constexpr std::size_t kLineBytes = 64, kPageBytes = 4096;

}  // namespace

Buffer Buffer::untouched(std::size_t bytes) {
  Buffer buffer;
  if (bytes == 0) return buffer;
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  buffer.data_ = static_cast<std::byte*>(address);
  buffer.bytes_ = bytes;
  return buffer;
}

Buffer::Buffer(std::size_t bytes) {
  *this = untouched(bytes);
  for (std::size_t at = 0; at < bytes; at += kPageBytes) *static_cast<volatile std::byte*>(data_ + at) = std::byte{0};
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

CacheFlush::CacheFlush(int num_ranks) : buffer_(static_cast<std::size_t>(kTotalBytes / num_ranks)) {}

void CacheFlush::run() {
  volatile std::uint64_t* const words = buffer_.as<std::uint64_t>();
  const std::size_t step = kLineBytes / sizeof(std::uint64_t), count = buffer_.size() / sizeof(std::uint64_t);
  for (std::size_t i = 0; i < count; i += step) words[i] = seen_ + i;
  for (std::size_t i = 0; i < count; i += step) seen_ += words[i];
}

}  // namespace anyep::bench
