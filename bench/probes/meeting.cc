#include "bench/probes/meeting.h"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

namespace anyep::bench {
namespace {

constexpr auto kPatience = std::chrono::seconds(60);
/// Polls before a rank lets others have its core: some tens of microseconds.
constexpr unsigned kPolls = 1 << 14;

}  // namespace

struct Meeting::Shared {
  alignas(128) std::atomic<std::uint32_t> arrived{0};
  alignas(128) std::atomic<std::uint32_t> round{0};
  alignas(128) std::atomic<bool> left{false};
};

Meeting::Meeting(int num_ranks) : num_ranks_(num_ranks) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  size_ = sizeof(Shared) + ranks * (kMostNumbers * sizeof(double) + kMostBytes);
  void* const memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  shared_ = new (memory) Shared;
}

Meeting::~Meeting() {
  munmap(shared_, size_);
}

double* Meeting::numbers(int rank) const {
  return reinterpret_cast<double*>(shared_ + 1) + static_cast<std::size_t>(rank) * kMostNumbers;
}

std::byte* Meeting::bytes(int rank) const {
  return reinterpret_cast<std::byte*>(numbers(num_ranks_)) + static_cast<std::size_t>(rank) * kMostBytes;
}

void Meeting::barrier() {
  const std::uint32_t round = shared_->round.load(std::memory_order_acquire);
  if (shared_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(num_ranks_)) {
    shared_->arrived.store(0, std::memory_order_relaxed);
    shared_->round.store(round + 1, std::memory_order_release);
    return;
  }
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  for (unsigned polls = 1; shared_->round.load(std::memory_order_acquire) == round; ++polls) {
    if (shared_->left.load(std::memory_order_relaxed)) throw std::runtime_error("another rank has given up");
    if (polls % kPolls != 0) continue;
    if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("a rank has not come for a minute");
    sched_yield();
  }
}

void Meeting::leave() noexcept {
  shared_->left.store(true, std::memory_order_relaxed);
}

std::vector<std::byte> Meeting::gather(int rank, std::span<const std::byte> mine) {
  if (mine.size() > kMostBytes) throw std::length_error("Meeting::gather: too many bytes");
  std::memcpy(bytes(rank), mine.data(), mine.size());
  barrier();
  std::vector<std::byte> all(mine.size() * static_cast<std::size_t>(num_ranks_));
  for (int from = 0; from < num_ranks_; ++from) {
    std::memcpy(all.data() + static_cast<std::size_t>(from) * mine.size(), bytes(from), mine.size());
  }
  barrier();
  return all;
}

std::vector<double> Meeting::largest(int rank, std::span<const double> mine) {
  if (mine.size() > kMostNumbers) throw std::length_error("Meeting::largest: too many numbers");
  std::copy(mine.begin(), mine.end(), numbers(rank));
  barrier();
  std::vector<double> most(mine.begin(), mine.end());
  for (int from = 0; from < num_ranks_; ++from) {
    for (std::size_t i = 0; i < most.size(); ++i) most[i] = std::max(most[i], numbers(from)[i]);
  }
  barrier();
  return most;
}

double Meeting::sum(int rank, double mine) {
  *numbers(rank) = mine;
  barrier();
  double total = 0;
  for (int from = 0; from < num_ranks_; ++from) total += *numbers(from);
  barrier();
  return total;
}

}  // namespace anyep::bench
