// All emulated GPUs: streams, the launches in them, and the one thread that runs them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <variant>
#include <vector>

#include "block.h"

namespace anyep::emulation {

inline constexpr std::size_t kThreadsPerSm = 2048;

/// A launch under way.
class Run {
 public:
  Run(const Launch& launch, int gpu, std::shared_ptr<Run> previous, std::uint64_t seed);

  const Launch& launch() const { return launch_; }
  std::uint64_t seed() const { return seed_; }
  int gpu() const { return gpu_; }

  // By its threads.
  void let_next_start(unsigned block) { let_go_[block] = true; }
  bool is_first() const { return previous_ == nullptr || previous_->done_; }
  void sync_cluster(Block& block);
  const void* in_block(Block& from, unsigned to, const void* at) const;
  void note_block(Block& block);

  // By the machine.
  bool next_may_start() const;
  bool done() const { return done_; }
  /// Starts blocks for which there is room; threads in use are added.
  void start_blocks(std::size_t& threads_in_use, std::size_t most_threads);
  std::vector<std::unique_ptr<Block>>& blocks() { return blocks_; }
  void end_block(std::size_t at, std::size_t& threads_in_use);
  void settle();

 private:
  std::size_t threads_of_block() const;

  const Launch launch_;
  const int gpu_;
  std::shared_ptr<Run> previous_;
  const std::uint64_t seed_;
  std::vector<std::unique_ptr<Block>> blocks_;
  unsigned started_ = 0, ended_ = 0;
  std::vector<char> let_go_;
  bool done_ = false;

  struct ClusterBarrier {
    unsigned arrived = 0, generation = 0;
  };
  std::vector<ClusterBarrier> cluster_barriers_;
  struct Shared {
    std::byte *dynamic, *fixed;
  };
  std::vector<Shared> shared_of_;  ///< by block
};

using Op = std::variant<Launch, std::function<void()>>;

class Stream {
 public:
  explicit Stream(int of_gpu) : gpu(of_gpu) {}
  const int gpu;
  std::deque<Op> ops;
  std::shared_ptr<Run> last;
  std::vector<Op>* capture = nullptr;
  /// Nothing is in it and nothing of it runs.
  bool empty() const { return ops.empty() && (last == nullptr || last->done()); }
};

class Machine {
 public:
  static Machine& get();

  Stream* make_stream(int gpu);
  void drop_stream(Stream* stream);
  Stream* default_stream(int gpu);
  void put(Stream* stream, Op op);
  /// Waits until streams are empty: this one, or all of a GPU.
  void wait(const Stream* stream);
  void wait_for_gpu(int gpu);
  std::uint64_t clock_ns() const { return steps_.load(std::memory_order_relaxed) * kNsPerStep; }

 private:
  /// Of a thread between two of its meetings with others. Limits of kernels are counted in it.
  static constexpr std::uint64_t kNsPerStep = 4;

  Machine();
  void work();
  bool start_ops();
  bool advance();

  std::mutex mutex_;
  std::condition_variable work_, settled_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Stream*> default_streams_;  ///< by GPU
  std::vector<std::shared_ptr<Run>> runs_;
  std::vector<std::size_t> threads_in_use_;  ///< by GPU
  std::mt19937_64 random_;
  std::atomic<std::uint64_t> steps_ = 0;
  Block* late_ = nullptr;  ///< left out for a while
  std::uint64_t late_until_ = 0;
};

/// Bytes of a bulk load have come.
void complete_bytes(std::uint64_t& barrier, std::uint32_t bytes);

}  // namespace anyep::emulation
