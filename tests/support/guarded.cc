#include "support/guarded.h"

#include <algorithm>
#include <cstring>

namespace anyep::test {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kGuardBytes = 192;  // more than one vector store or one line past the end
constexpr std::byte kGuard{0xA5};
constexpr std::byte kPoison{0xFF};

}  // namespace

Guarded::Guarded(std::size_t bytes, std::size_t misaligned)
    : memory_bytes_(bytes + misaligned + 2 * kGuardBytes + kAlignment), bytes_(bytes) {
  memory_ = std::make_unique_for_overwrite<std::byte[]>(memory_bytes_);
  const auto address = reinterpret_cast<std::uintptr_t>(memory_.get()) + kGuardBytes;
  body_ = memory_.get() + kGuardBytes + (kAlignment - address % kAlignment) % kAlignment + misaligned;
  std::fill(memory_.get(), body_, kGuard);
  std::fill(body_, body_ + bytes_, kPoison);
  std::fill(body_ + bytes_, memory_.get() + memory_bytes_, kGuard);
}

void Guarded::seal() {
  sealed_ = true;
  digest_ = digest_of(bytes());
}

std::string Guarded::damage() const {
  const auto is_guard = [](std::byte byte) { return byte == kGuard; };
  if (!std::all_of(memory_.get(), static_cast<std::byte*>(body_), is_guard))
    return "bytes before the tensor were written";
  if (!std::all_of(static_cast<std::byte*>(body_) + bytes_, memory_.get() + memory_bytes_, is_guard)) {
    return "bytes behind the tensor were written";
  }
  if (sealed_ && digest_ != digest_of(bytes())) return "an input was written";
  return {};
}

std::uint64_t digest_of(std::span<const std::byte> bytes) {
  std::uint64_t digest = 0xcbf29ce484222325u;
  for (std::size_t at = 0; at < bytes.size(); at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, std::min<std::size_t>(8, bytes.size() - at));
    digest = (digest ^ word) * 0x100000001b3u;
    digest ^= digest >> 29;
  }
  return digest ^ bytes.size();
}

}  // namespace anyep::test
