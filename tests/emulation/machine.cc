#include "machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace anyep::emulation {
namespace {

thread_local std::byte fixed_mark;  // every block's thread has one, as far from its __shared__ variables as the others'

std::uint64_t number_from(const char* name, std::uint64_t otherwise) {
  const char* const text = std::getenv(name);
  if (text == nullptr) return otherwise;
  std::uint64_t number = 0;
  const char* const end = text + std::strlen(text);
  const auto [at, error] = std::from_chars(text, end, number);
  if (error == std::errc() && at == end && number > 0) return number;
  std::fprintf(stderr, "%s = '%s', allowed: a number from 1\n", name, text);
  ::_exit(2);
}

// Threads of blocks, which inherit this, take turns: handing over is cheapest where they all are. Programs side by side choose
// different ones.
void stay_on_one_processor() {
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int skip = ::getpid() % CPU_COUNT(&allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || skip-- > 0) continue;
    CPU_ZERO(&allowed);
    CPU_SET(cpu, &allowed);
    (void)::sched_setaffinity(0, sizeof allowed, &allowed);
    return;
  }
}

}  // namespace

const Traits& traits() {
  static const Traits all = [] {
    Traits traits;
    traits.num_gpus = static_cast<int>(number_from("ANYEP_EMULATED_GPUS", 2));
    traits.num_sms = static_cast<int>(number_from("ANYEP_EMULATED_SMS", 8));
    return traits;
  }();
  return all;
}

// ---- a launch ------------------------------------------------------------------------------------------------------

Run::Run(const Launch& launch, int gpu, std::shared_ptr<Run> previous, std::uint64_t seed)
    : launch_(launch), gpu_(gpu), previous_(std::move(previous)), seed_(seed), let_go_(launch.blocks) {
  cluster_barriers_.resize(launch.blocks);
  shared_of_.resize(launch.blocks);
}

bool Run::next_may_start() const {
  return done_ ||
         (is_first() && started_ == launch_.blocks && std::ranges::all_of(let_go_, [](char is) { return is; }));
}

std::size_t Run::threads_of_block() const {
  const std::size_t of_shared = kThreadsPerSm * launch_.shared_bytes / traits().shared_bytes;
  return std::max<std::size_t>(launch_.threads, of_shared);
}

void Run::start_blocks(std::size_t& threads_in_use, std::size_t most_threads) {
  // A cluster starts as a whole.
  const unsigned at_once = std::max(launch_.cluster, 1u);
  while (started_ < launch_.blocks && threads_in_use + threads_of_block() * at_once <= most_threads) {
    for (unsigned i = 0; i < at_once; ++i) blocks_.push_back(std::make_unique<Block>(*this, started_++));
    threads_in_use += threads_of_block() * at_once;
  }
}

void Run::end_block(std::size_t at, std::size_t& threads_in_use) {
  blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(at));
  ++ended_;
  threads_in_use -= threads_of_block();
}

void Run::settle() {
  if (ended_ < launch_.blocks || !is_first()) return;
  done_ = true;
  previous_ = nullptr;
}

void Run::note_block(Block& block) {
  shared_of_[block.index()] = {block.shared(), &fixed_mark};
}

const void* Run::in_block(Block& from, unsigned to, const void* at) const {
  const unsigned first = from.index() / launch_.cluster * launch_.cluster;
  const Shared &own = shared_of_[from.index()], &other = shared_of_[first + to];
  const auto* const byte = static_cast<const std::byte*>(at);
  const bool dynamic = byte >= own.dynamic && byte < own.dynamic + launch_.shared_bytes;
  return dynamic ? other.dynamic + (byte - own.dynamic) : other.fixed + (byte - own.fixed);
}

void Run::sync_cluster(Block& block) {
  ClusterBarrier& barrier = cluster_barriers_[block.index() / launch_.cluster];
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == launch_.cluster * launch_.threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) block.pause();
}

// ---- the machine ---------------------------------------------------------------------------------------------------

Machine& Machine::get() {
  static auto* const machine = new Machine;  // its thread never ends
  return *machine;
}

Machine::Machine()
    : default_streams_(static_cast<std::size_t>(traits().num_gpus)),
      threads_in_use_(static_cast<std::size_t>(traits().num_gpus)),
      random_(number_from("ANYEP_EMULATED_SEED", 1)) {
  std::thread([this] { work(); }).detach();
}

Stream* Machine::make_stream(int gpu) {
  const std::lock_guard lock(mutex_);
  streams_.push_back(std::make_unique<Stream>(gpu));
  return streams_.back().get();
}

void Machine::drop_stream(Stream* stream) {
  wait(stream);
  const std::lock_guard lock(mutex_);
  std::erase_if(streams_, [&](const auto& one) { return one.get() == stream; });
}

Stream* Machine::default_stream(int gpu) {
  const std::lock_guard lock(mutex_);
  auto& stream = default_streams_[static_cast<std::size_t>(gpu)];
  if (stream == nullptr) {
    streams_.push_back(std::make_unique<Stream>(gpu));
    stream = streams_.back().get();
  }
  return stream;
}

void Machine::put(Stream* stream, Op op) {
  if (stream->capture != nullptr) {
    stream->capture->push_back(std::move(op));
    return;
  }
  const std::lock_guard lock(mutex_);
  stream->ops.push_back(std::move(op));
  work_.notify_one();
}

void Machine::wait(const Stream* stream) {
  std::unique_lock lock(mutex_);
  settled_.wait(lock, [&] { return stream->empty(); });
}

void Machine::wait_for_gpu(int gpu) {
  std::unique_lock lock(mutex_);
  settled_.wait(lock, [&] {
    return std::ranges::all_of(streams_, [&](const auto& one) { return one->gpu != gpu || one->empty(); });
  });
}

void Machine::work() {
  stay_on_one_processor();
  std::unique_lock lock(mutex_);
  for (;;) {
    const bool started = start_ops();
    if (runs_.empty()) {
      if (!started) work_.wait(lock);
      continue;
    }
    lock.unlock();
    const bool busy = advance();
    if (!busy) std::this_thread::yield();  // they wait for what the host has not put in yet
    lock.lock();
    const std::size_t before = runs_.size();
    for (const auto& run : runs_) run->settle();
    std::erase_if(runs_, [](const auto& run) { return run->done(); });
    if (runs_.size() != before) settled_.notify_all();
  }
}

bool Machine::start_ops() {
  bool started = false;
  for (const auto& stream : streams_) {
    while (!stream->ops.empty()) {
      Op& op = stream->ops.front();
      const bool first = stream->last == nullptr || stream->last->done();
      if (auto* const launch = std::get_if<Launch>(&op)) {
        if (!first && !(launch->early && stream->last->next_may_start())) break;
        stream->last = std::make_shared<Run>(*launch, stream->gpu, first ? nullptr : stream->last, random_());
        runs_.push_back(stream->last);
      } else {
        if (!first) break;
        std::get<std::function<void()>>(op)();
      }
      stream->ops.pop_front();
      started = true;
    }
  }
  if (started) settled_.notify_all();
  return started;
}

// Some steps of a block chosen at random. False: nobody has anything to do.
bool Machine::advance() {
  std::vector<std::pair<Run*, std::size_t>> all;
  const std::size_t most = static_cast<std::size_t>(traits().num_sms) * kThreadsPerSm;
  bool busy = false;
  for (const auto& run : runs_) {
    run->start_blocks(threads_in_use_[static_cast<std::size_t>(run->gpu())], most);
    for (std::size_t i = 0; i < run->blocks().size(); ++i) {
      all.emplace_back(run.get(), i);
      busy = busy || !run->blocks()[i]->idle();
    }
  }
  if (all.empty()) return false;
  const auto [run, at] = all[random_() % all.size()];
  Block& block = *run->blocks()[at];
  if (steps_ < late_until_ && &block == late_ && all.size() > 1) return busy;
  // Those who only look again look once or so.
  const std::uint64_t many = block.idle() ? run->launch().threads : 100 + random_() % 2000;
  steps_.fetch_add(block.advance(many), std::memory_order_relaxed);
  if (steps_ >= late_until_ && random_() % 256 == 0) {
    late_ = &block;
    late_until_ = steps_ + random_() % 200'000;
  }
  if (block.ended()) {
    if (late_ == &block) late_until_ = 0;
    run->end_block(at, threads_in_use_[static_cast<std::size_t>(run->gpu())]);
  }
  return busy;
}

// ---- what threads call ---------------------------------------------------------------------------------------------

const Place& here() {
  return Block::own()->current().place;
}
const std::uint64_t* meet(const char* what, unsigned mask, std::uint64_t value) {
  return InKernel()->meet(what, mask, value);
}
Votes sync_block(bool vote) {
  const InKernel block;
  return block->sync(block->whole(), "__syncthreads", block->live(), vote);
}
void sync_some(int id, int threads) {
  const InKernel block;
  (void)block->sync(block->barrier(id), "barrier.sync", threads, true);
}
void arrive_some(int id, int threads) {
  const InKernel block;
  block->arrive(block->barrier(id), threads);
}
void yield() {
  InKernel()->pause();
}
std::uint64_t clock_ns() {
  return Machine::get().clock_ns();
}
std::byte* dynamic_shared() {
  return Block::own()->shared();
}
const void* in_block_of_cluster(unsigned block, const void* at) {
  const InKernel own;
  return own->run().in_block(*Block::own(), block, at);
}
void sync_cluster() {
  const InKernel own;
  own->run().sync_cluster(*Block::own());
}

void bulk_load(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier) {
  InKernel()->start({static_cast<std::byte*>(to), static_cast<const std::byte*>(from), bytes, barrier}, nullptr);
}
void bulk_store(void* to, const void* from, std::uint32_t bytes) {
  const InKernel own;
  own->start({static_cast<std::byte*>(to), static_cast<const std::byte*>(from), bytes}, &own->current().bulk);
}
void bulk_commit() {
  InKernel()->current().bulk.all.push_back(std::make_shared<CopyGroup>());
}
void bulk_wait(int groups, bool written) {
  const InKernel own;
  own->wait_for(own->current().bulk, groups, written);
}
void small_load(void* to, const void* from, bool is_there) {
  const InKernel own;
  own->start({static_cast<std::byte*>(to), is_there ? static_cast<const std::byte*>(from) : nullptr, 16},
             &own->current().small);
}
void small_commit() {
  InKernel()->current().small.all.push_back(std::make_shared<CopyGroup>());
}
void small_wait(int groups) {
  const InKernel own;
  own->wait_for(own->current().small, groups, true);
}

void wait_for_earlier_launches() {
  const InKernel own;
  while (!own->run().is_first()) own->pause();
}
void let_later_launches_start() {
  const InKernel own;
  own->run().let_next_start(own->index());
}

// ---- mbarriers: phase (1) | bytes to come, biased (31) | arrivals a phase (16) | arrivals to come (16) ---------------

namespace {

struct MBarrier {
  std::uint64_t& word;
  static constexpr std::int64_t kBias = std::int64_t{1} << 30;

  unsigned pending() const { return word & 0xFFFF; }
  unsigned arrivals() const { return word >> 16 & 0xFFFF; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(word >> 32 & 0x7FFF'FFFF) - kBias; }
  unsigned phase() const { return static_cast<unsigned>(word >> 63); }
  void set(unsigned phase, std::int64_t bytes, unsigned arrivals, unsigned pending) {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = arrivals;
    }
    word = std::uint64_t{phase} << 63 | static_cast<std::uint64_t>(bytes + kBias) << 32 | arrivals << 16 | pending;
  }
};

}  // namespace

void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  MBarrier{*barrier}.set(0, 0, arrivals, arrivals);
}
void mbarrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  MBarrier now{*barrier};
  now.set(now.phase(), now.bytes() + bytes, now.arrivals(), now.pending() - 1);
}
bool mbarrier_complete(std::uint64_t* barrier, std::uint32_t parity) {
  if (MBarrier{*barrier}.phase() != parity) return true;
  yield();
  return false;
}
void complete_bytes(std::uint64_t& barrier, std::uint32_t bytes) {
  MBarrier now{barrier};
  now.set(now.phase(), now.bytes() - bytes, now.arrivals(), now.pending());
}

}  // namespace anyep::emulation
