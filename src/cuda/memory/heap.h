// The heap of a CUDA rank's window: rows that peers write and the caller reads in stream order. Only offsets; no data here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace anyep::cuda {

/// Work that must be over before something is used again.
struct Completion {
  virtual ~Completion() = default;
  virtual bool done() const noexcept = 0;  ///< never waits
};

/// Whose a block is.
enum class Lifetime : std::uint8_t {
  kCall,   ///< comes back by release()
  kGraph,  ///< allocated in a capture: every replay writes it, so it goes to nobody else as long as the engine lives
};

struct HeapStatistics {
  std::uint64_t bytes = 0;         ///< that the heap may hand out in all
  std::uint64_t in_use = 0;        ///< held by callers, graphs included
  std::uint64_t waiting = 0;       ///< released, their work not yet seen to be over
  std::uint64_t graphs = 0;        ///< of in_use: allocated in captures
  std::uint64_t high_water = 0;    ///< most of in_use + waiting so far
  std::uint64_t largest_free = 0;  ///< largest block that could be handed out now
  std::uint64_t num_blocks = 0;    ///< held or waiting
};

/// Hands out ranges of a window. Large blocks come from the low end and small ones from the high end, so that what is small
/// and long-lived does not cut up the room for rows. Thread-safe; never waits for a GPU.
class Heap {
 public:
  static constexpr std::uint64_t kAlignment = 256;
  static constexpr std::uint64_t kSmallBytes = std::uint64_t{1} << 20;  ///< blocks below this are small
  /// What is released waits until this share of the heap does, or until there is no room: a look at it asks the driver, about
  /// a microsecond a question. From then on every allocation looks at a few blocks, so that no call pays for many.
  static constexpr std::uint64_t kWaitingShare = 8;
  static constexpr std::size_t kFewLooks = 8;

  Heap() = default;
  Heap(std::uint64_t offset, std::uint64_t bytes) { add(offset, bytes); }

  /// One more range: the window has grown.
  void add(std::uint64_t offset, std::uint64_t bytes);

  /// Offset in the window, a multiple of kAlignment.
  std::optional<std::uint64_t> allocate(std::uint64_t bytes, Lifetime lifetime = Lifetime::kCall);

  /// The block is free once `after` is done (null: at once). What was never handed out is ignored.
  void release(std::uint64_t offset, std::shared_ptr<const Completion> after);
  /// Likewise after all of them: a block that several streams have used.
  void release(std::uint64_t offset, std::vector<std::shared_ptr<const Completion>> after);

  /// The block ends after its first `bytes`, at least one; what lies behind them is free at once: nobody has ever used it.
  /// Of a graph's block, and of what is released or was never handed out, everything stays.
  void keep_front(std::uint64_t offset, std::uint64_t bytes);

  std::uint64_t largest_free() const;
  /// Are there released blocks whose work was not over when allocate() last looked?
  bool has_pending() const;
  HeapStatistics statistics() const;

 private:
  struct Block {
    std::uint64_t bytes = 0;
    Lifetime lifetime = Lifetime::kCall;
    bool released = false;
    std::vector<std::shared_ptr<const Completion>> after;
  };
  using Ranges = std::map<std::uint64_t, std::uint64_t>;

  void look_at_released(std::size_t most);
  void put(std::uint64_t offset, std::uint64_t bytes);
  std::optional<std::uint64_t> take(std::uint64_t bytes);

  mutable std::mutex mutex_;
  Ranges free_;                            ///< offset -> bytes; no two touch
  std::map<std::uint64_t, Block> blocks_;  ///< handed out, by offset
  std::vector<std::uint64_t> released_;    ///< offsets of blocks that wait for their work, oldest first
  std::uint64_t bytes_ = 0, in_use_ = 0, waiting_ = 0, graphs_ = 0, high_water_ = 0;
};

}  // namespace anyep::cuda
