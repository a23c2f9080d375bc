#include "block.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "machine.h"
#include "pages.h"

namespace anyep::emulation {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
/// Basic blocks that a thread runs at most before another one does.
constexpr std::uint64_t kMostPatience = 100;

thread_local Block* own_block = nullptr;

constexpr std::uint64_t kForEver = ~std::uint64_t{0};
/// Basic blocks until the running thread makes room. For ever outside of kernels: library templates that kernels use, too, may be
/// compiled to call us.
thread_local std::uint64_t patience = kForEver;

/// Stacks of fibers, used again. Threads of blocks take turns, so that nothing else guards the list. Mapped many at a time: a
/// process may have some 65,000 mappings.
class Stacks {
 public:
  boost::context::stack_context allocate() {
    if (free().empty()) map_more();
    boost::context::stack_context stack;
    stack.size = kStackBytes;
    stack.sp = free().back();
    free().pop_back();
    return stack;
  }
  void deallocate(const boost::context::stack_context& stack) noexcept { free().push_back(stack.sp); }

 private:
  static std::vector<void*>& free() {
    static auto* const all = new std::vector<void*>;
    return *all;
  }
  static void map_more() {
    constexpr std::size_t kMany = 256;
    std::byte* const memory = map_pages(kMany * kStackBytes);
    if (memory == nullptr) throw std::bad_alloc();
    for (std::size_t i = 1; i <= kMany; ++i) free().push_back(memory + i * kStackBytes);
  }
};

bool is_multiple(const void* pointer, std::uint32_t of) {
  return reinterpret_cast<std::uintptr_t>(pointer) % of == 0;
}

const char* state_of(const Thread& thread) {
  if (thread.ended) return "ended";
  return thread.waits != nullptr ? thread.waits : "runs";
}

}  // namespace

Block* Block::own() {
  return own_block;
}

InKernel::InKernel() : patience_(std::exchange(patience, kForEver)) {}
InKernel::~InKernel() {
  patience = patience_;
}

Block::Block(Run& run, unsigned index)
    : run_(run),
      random_(run.seed() + index),
      threads_(run.launch().threads),
      meetings_((run.launch().threads + 31) / 32),
      barriers_(16),
      live_(static_cast<int>(run.launch().threads)) {
  const Launch& launch = run.launch();
  if (launch.shared_bytes > 0) {
    shared_ = map_pages(launch.shared_bytes);
    if (shared_ == nullptr) throw std::bad_alloc();
    std::memset(shared_, 0xCD, launch.shared_bytes);
  }
  for (unsigned i = 0; i < launch.threads; ++i) {
    threads_[i].place = {{i, 0, 0}, {index, 0, 0}, {launch.threads, 1, 1}, {launch.blocks, 1, 1}};
    ready_.push_back(&threads_[i]);
  }
  own_ = std::thread([this] { work(); });
}

Block::~Block() {
  over_ = true;
  go_.release();
  own_.join();
  if (shared_ != nullptr) unmap_pages(shared_, run_.launch().shared_bytes);
}

std::uint64_t Block::advance(std::uint64_t steps) {
  steps_ = steps;
  go_.release();
  done_.acquire();
  return steps - steps_;
}

void Block::work() {
  own_block = this;
  for (bool first = true;; first = false) {
    go_.acquire();
    if (over_) return;
    if (first) run_.note_block(*this);
    take_steps();
    done_.release();
  }
}

void Block::take_steps() {
  looks_ = 0;
  for (; steps_ > 0 && !ended(); --steps_) {
    ++now_;
    if (ready_.empty()) now_ = std::max(now_, first_due_);
    if (now_ >= first_due_) advance_copies();
    if (!ready_.empty()) {
      step();
    } else if (copies_.empty() && live_ > 0) {
      give_up("everybody waits for somebody");
    }
  }
  idle_ = looks_ > 2 * static_cast<std::uint64_t>(live_);
}

void Block::step() {
  // Mostly in turn, so that nobody is left out; else anybody.
  if (random(4) == 0) std::swap(ready_.front(), ready_[random(ready_.size())]);
  Thread& thread = *ready_.front();
  ready_.pop_front();
  current_ = &thread;
  patience = 1 + random(kMostPatience);
  if (!thread.fiber && !thread.ended) {
    thread.fiber =
        boost::context::fiber(std::allocator_arg, Stacks(), [this, &thread](boost::context::fiber&& scheduler) {
          thread.scheduler = std::move(scheduler);
          run_.launch().kernel();
          thread.ended = true;
          return std::move(thread.scheduler);
        });
  }
  thread.fiber = std::move(thread.fiber).resume();
  patience = kForEver;
  if (thread.ended) end(thread);
  current_ = nullptr;
}

void Block::end(Thread& thread) {
  thread.fiber = {};
  --live_;
  looks_ = 0;
  if (whole_.arrived > 0 && whole_.arrived == live_) complete(whole_);
}

void Block::pause() {
  Thread& me = *current_;
  ready_.push_back(&me);
  ++looks_;
  me.scheduler = std::move(me.scheduler).resume();
  patience = kForEver;  // until the caller is back in its kernel
}

void Block::wait(const char* what) {
  Thread& me = *current_;
  looks_ = 0;
  me.waits = what;
  me.scheduler = std::move(me.scheduler).resume();
  patience = kForEver;
}

void Block::wake(Thread& thread) {
  thread.waits = nullptr;
  ready_.push_back(&thread);
}

const std::uint64_t* Block::meet(const char* what, unsigned mask, std::uint64_t value) {
  const unsigned index = current_->place.thread.x, lane = index % 32, warp = index / 32;
  if ((mask >> lane & 1) == 0) give_up(std::string(what) + ": the mask lacks the caller");
  Meeting& at = meetings_[warp][mask];
  if (at.arrived == 0) at.what = what;
  if (std::strcmp(at.what, what) != 0) give_up(std::string(what) + " meets " + at.what);
  at.values[lane] = value;
  at.arrived |= 1u << lane;
  if (at.arrived != mask) {
    wait(what);
    return at.result;
  }
  at.arrived = 0;
  std::ranges::copy(at.values, at.result);
  for (unsigned other = 0; other < 32; ++other) {
    if ((mask >> other & 1) == 0 || other == lane) continue;
    wake(threads_[warp * 32 + other]);
  }
  return at.result;
}

Votes Block::sync(Barrier& barrier, const char* what, int expected, bool vote) {
  barrier.all = barrier.all && vote;
  barrier.any = barrier.any || vote;
  if (!come(barrier, what, expected)) {
    barrier.waiting.push_back(current_);
    wait(what);
  }
  return barrier.result;
}

void Block::arrive(Barrier& barrier, int expected) {
  (void)come(barrier, "barrier.arrive", expected);
}

// True: the caller is the last one.
bool Block::come(Barrier& barrier, const char* what, int expected) {
  if (&barrier != &whole_ && (expected % 32 != 0 || (barrier.arrived > 0 && barrier.expected != expected))) {
    give_up(std::string(what) + ": " + std::to_string(expected) +
            " threads, a multiple of 32, the same for all, is allowed");
  }
  barrier.expected = expected;
  if (++barrier.arrived < expected) return false;
  complete(barrier);
  return true;
}

void Block::complete(Barrier& barrier) {
  barrier.result = {barrier.all, barrier.any};
  barrier.all = true;
  barrier.any = false;
  barrier.arrived = 0;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
}

void Block::start(Copy copy, CopyGroups* groups) {
  if (!is_multiple(copy.to, 16) || !is_multiple(copy.from, 16) || copy.bytes % 16 != 0) {
    give_up("a copy that is no multiple of 16");
  }
  if (groups != nullptr) {
    copy.group = groups->all.back();
    ++copy.group->unread;
    ++copy.group->unwritten;
  }
  copy.due = now_ + delay();
  first_due_ = std::min(first_due_, copy.due);
  copies_.push_back(std::move(copy));
}

// Of half of a copy, in steps. Mostly soon, now and then when a block has long gone on.
std::uint64_t Block::delay() {
  constexpr std::uint64_t kMost[] = {16, 16, 256, 256, 256, 1024, 4096, 16384};
  return 1 + random(kMost[random(8)]);
}

void Block::advance_copies() {
  looks_ = 0;
  first_due_ = kForEver;
  std::erase_if(copies_, [&](Copy& copy) {
    const bool done = now_ >= copy.due && advance(copy);
    if (!done) first_due_ = std::min(first_due_, copy.due);
    return done;
  });
}

// True: it is over.
bool Block::advance(Copy& copy) {
  if (!copy.read) {
    copy.data.assign(copy.bytes, std::byte{0});
    if (copy.from != nullptr) std::memcpy(copy.data.data(), copy.from, copy.bytes);
    copy.read = true;
    copy.due = now_ + delay();
    if (copy.group != nullptr) --copy.group->unread;
    return false;
  }
  std::memcpy(copy.to, copy.data.data(), copy.bytes);
  if (copy.group != nullptr) --copy.group->unwritten;
  if (copy.barrier != nullptr) complete_bytes(*copy.barrier, copy.bytes);
  return true;
}

void Block::wait_for(CopyGroups& groups, int last, bool written) {
  const auto closed = static_cast<std::ptrdiff_t>(groups.all.size()) - 1;
  for (std::ptrdiff_t i = 0; i < closed - last; ++i) {
    const std::shared_ptr<CopyGroup> group = groups.all[static_cast<std::size_t>(i)];
    while ((written ? group->unwritten : group->unread) > 0) pause();
  }
  while (groups.all.size() > 1 && groups.all.front()->unwritten == 0) groups.all.pop_front();
}

void Block::give_up(const std::string& text) const {
  const Launch& launch = run_.launch();
  std::fprintf(stderr, "EMULATION: %s, block %u of %u", launch.name, threads_[0].place.block.x, launch.blocks);
  if (current_ != nullptr) std::fprintf(stderr, ", thread %u", current_->place.thread.x);
  std::fprintf(stderr, ": %s\n", text.c_str());
  for (std::size_t i = 0; i < threads_.size(); ++i) {
    const char* const now = state_of(threads_[i]);
    const char* const before = i % 32 == 0 ? "" : state_of(threads_[i - 1]);
    if (std::strcmp(now, before) != 0) std::fprintf(stderr, "  warp %zu, from lane %zu: %s\n", i / 32, i % 32, now);
  }
  ::_exit(5);
}

}  // namespace anyep::emulation

// At every basic block of code that is compiled for it.
extern "C" void __sanitizer_cov_trace_pc() {
  using namespace anyep::emulation;
  if (--patience != 0) return;
  if (own_block != nullptr) own_block->pause();
  patience = kMostPatience;
}
