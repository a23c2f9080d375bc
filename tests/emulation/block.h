// The threads of one block, as fibers.
#pragma once

#include <boost/context/fiber.hpp>
#include <deque>
#include <map>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "emulation.h"

namespace anyep::emulation {

class Run;

/// Copies of one thread that are waited for together. Bytes are not counted, copies are.
struct CopyGroup {
  int unread = 0, unwritten = 0;
};
/// The groups of one thread, oldest first; the last one is open.
struct CopyGroups {
  std::deque<std::shared_ptr<CopyGroup>> all = {std::make_shared<CopyGroup>()};
};

struct Thread {
  Place place;
  boost::context::fiber fiber, scheduler;
  const char* waits = nullptr;  ///< for whom; nullptr = it can run
  CopyGroups bulk, small;
  bool ended = false;
};

/// A copy under way: first it reads, later it writes.
struct Copy {
  std::byte* to;
  const std::byte* from;  ///< nullptr = zeros
  std::uint32_t bytes;
  std::uint64_t* barrier = nullptr;  ///< counts the bytes
  std::shared_ptr<CopyGroup> group = {};
  std::vector<std::byte> data = {};
  bool read = false;
  std::uint64_t due = 0;  ///< its next half, in steps of the block
};

/// Lanes of a warp that name the same mask.
struct Meeting {
  unsigned arrived = 0;  ///< bits
  const char* what = nullptr;
  std::uint64_t values[32] = {}, result[32] = {};
};

struct Barrier {
  int arrived = 0, expected = 0;
  bool all = true, any = false;  ///< votes so far
  Votes result = {};
  std::vector<Thread*> waiting;
};

class Block {
 public:
  Block(Run& run, unsigned index);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  /// Some steps of its threads, in the block's own operating-system thread. The caller waits. @return steps taken
  std::uint64_t advance(std::uint64_t steps);
  bool ended() const { return live_ == 0 && copies_.empty(); }
  /// The last time, its threads did nothing but look again.
  bool idle() const { return idle_; }
  std::byte* shared() { return shared_; }
  Run& run() { return run_; }
  unsigned index() const { return threads_[0].place.block.x; }

  // By its threads.
  const std::uint64_t* meet(const char* what, unsigned mask, std::uint64_t value);
  Votes sync(Barrier& barrier, const char* what, int expected, bool vote);
  void arrive(Barrier& barrier, int expected);
  Barrier& barrier(int id) { return barriers_[static_cast<std::size_t>(id)]; }
  Barrier& whole() { return whole_; }
  int live() const { return live_; }
  void pause();
  void start(Copy copy, CopyGroups* groups);
  void wait_for(CopyGroups& groups, int last, bool written);
  Thread& current() { return *current_; }
  std::uint64_t random(std::uint64_t below) { return random_() % below; }

  /// Of which the calling operating-system thread is; nullptr = of none.
  static Block* own();

 private:
  void work();
  void take_steps();
  void step();
  void end(Thread& thread);
  std::uint64_t delay();
  void advance_copies();
  bool advance(Copy& copy);
  void wait(const char* what);
  void wake(Thread& thread);
  bool come(Barrier& barrier, const char* what, int expected);
  void complete(Barrier& barrier);
  [[noreturn]] void give_up(const std::string& text) const;

  Run& run_;
  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  std::vector<std::map<unsigned, Meeting>> meetings_;  // by warp; by mask
  std::vector<Barrier> barriers_;
  Barrier whole_;
  std::deque<Thread*> ready_;
  std::vector<Copy> copies_;
  Thread* current_ = nullptr;
  int live_ = 0;
  std::byte* shared_ = nullptr;
  std::uint64_t steps_ = 0, looks_ = 0;
  std::uint64_t now_ = 0, first_due_ = ~std::uint64_t{0};  ///< in steps of the block; of copies
  bool idle_ = false, over_ = false;
  std::binary_semaphore go_{0}, done_{0};
  std::thread own_;
};

/// While a thread of a kernel is in our functions: nobody takes its place between two basic blocks.
class InKernel {
 public:
  InKernel();
  ~InKernel();
  InKernel(const InKernel&) = delete;
  InKernel& operator=(const InKernel&) = delete;
  Block* operator->() const { return Block::own(); }

 private:
  const std::uint64_t patience_;
};

}  // namespace anyep::emulation
