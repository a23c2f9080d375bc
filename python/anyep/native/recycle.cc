// Memory of large outputs. The C library gives blocks of more than 32 MiB back to the kernel at every free; touching fresh pages
// costs several times what a combine of as many bytes takes. So blocks that nobody uses wait here for the next output.
#include <sys/mman.h>

#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <new>

#include "native.h"

namespace anyep::python {
namespace {

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

/// Blocks that wait, oldest first. Any thread may free a tensor.
class IdleBlocks {
 public:
  static constexpr std::size_t kMostBlocks = 4;
  static constexpr std::size_t kMostBytes = std::size_t{1} << 30;  // address space; pages are there where one was used

  /// The smallest block that holds `bytes`; none that is more than twice as large. data = nullptr: there is none.
  Block take(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto best = blocks_.end();
    for (auto at = blocks_.begin(); at != blocks_.end(); ++at) {
      const bool fits = at->bytes >= bytes && at->bytes / 2 <= bytes;
      if (fits && (best == blocks_.end() || at->bytes < best->bytes)) best = at;
    }
    if (best == blocks_.end()) return {};
    const Block block = *best;
    blocks_.erase(best);
    bytes_ -= block.bytes;
    return block;
  }

  void give(const Block& block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(block);
    bytes_ += block.bytes;
    while (blocks_.size() > kMostBlocks || bytes_ > kMostBytes) {
      bytes_ -= blocks_.front().bytes;
      munmap(blocks_.front().data, blocks_.front().bytes);
      blocks_.pop_front();
    }
  }

 private:
  std::mutex mutex_;
  std::deque<Block> blocks_;
  std::size_t bytes_ = 0;
};

/// Never destroyed: tensors may live until the process ends.
IdleBlocks& idle_blocks() {
  static IdleBlocks* const blocks = new IdleBlocks;
  return *blocks;
}

/// @throws std::bad_alloc.
Memory recycled_memory(std::size_t bytes) {
  Block block = idle_blocks().take(bytes);
  if (block.data == nullptr) {
    block = {mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), bytes};
    if (block.data == MAP_FAILED) throw std::bad_alloc();
  }
  return {std::shared_ptr<const void>(block.data, [block](const void*) { idle_blocks().give(block); }), block.data,
          bytes};
}

}  // namespace

void bind_recycle(nb::module_& module) {
  module.def("recycled_memory", &recycled_memory, nb::arg("bytes"));
}

}  // namespace anyep::python
