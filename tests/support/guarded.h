// Memory for one test tensor between red zones, poisoned before use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace anyep::test {

/// `bytes` bytes of 0xFF, aligned to 64 plus `misaligned`, with guard bytes in front and behind. Moves only; the
/// address stays.
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(std::size_t bytes, std::size_t misaligned = 0);

  /// Null when there are no bytes: size zero with a null pointer is legal everywhere.
  std::byte* data() const { return bytes_ == 0 ? nullptr : body_; }
  std::size_t size() const { return bytes_; }
  std::span<std::byte> bytes() const { return {body_, bytes_}; }
  /// With the guards.
  std::span<std::byte> whole() const { return {memory_.get(), memory_bytes_}; }
  std::span<std::byte> row(std::int64_t index, std::size_t row_bytes) const {
    return bytes().subspan(static_cast<std::size_t>(index) * row_bytes, row_bytes);
  }

  /// From here on the contents are an input that nobody may change.
  void seal();
  /// Empty, or what is wrong: a guard byte or a sealed input was written.
  std::string damage() const;

 private:
  std::unique_ptr<std::byte[]> memory_;
  std::size_t memory_bytes_ = 0;
  std::byte* body_ = nullptr;
  std::size_t bytes_ = 0;
  bool sealed_ = false;
  std::uint64_t digest_ = 0;
};

/// FNV-1a over 8-byte words and a tail.
std::uint64_t digest_of(std::span<const std::byte> bytes);

}  // namespace anyep::test
