// Ranks as threads with company: the words that it shares with the host, meeting points that a failed rank does not block.
#pragma once

#include <anyep/bootstrap.h>
#include <gtest/gtest.h>

#include <barrier>
#include <chrono>
#include <exception>
#include <new>
#include <stdexcept>
#include <thread>

#include "company_kernels.h"
#include "protocol/platform.h"
#include "stream_graph.h"

namespace anyep::test {

/// CompanyWords in pinned memory that every GPU reaches.
class SharedWords {
 public:
  SharedWords() {
    void* memory = nullptr;
    must(cudaHostAlloc(&memory, sizeof(CompanyWords), cudaHostAllocPortable | cudaHostAllocMapped));
    words_ = new (memory) CompanyWords();
  }
  ~SharedWords() {
    stop();  // where a rank failed before it said so
    (void)cudaFreeHost(words_);
  }
  SharedWords(const SharedWords&) = delete;
  SharedWords& operator=(const SharedWords&) = delete;

  CompanyWords* get() const { return words_; }
  std::uint32_t gave_up() const { return protocol::Shared(words_->gave_up).load(protocol::kAcquire); }
  void stop() const { protocol::Shared(words_->stop).store(1, protocol::kRelease); }
  /// Until so many blocks hold their SM. @throws std::runtime_error after two seconds
  void await_started(std::uint32_t blocks) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    while (protocol::Shared(words_->started).load(protocol::kAcquire) < blocks) {
      if (std::chrono::steady_clock::now() > end) throw std::runtime_error("the company has not started");
      std::this_thread::yield();
    }
  }

 private:
  CompanyWords* words_ = nullptr;
};

/// One thread per rank. One that throws fails the test and holds up nobody at the barrier.
template <class Body>
void with_threads(int ranks, const Body& body) {
  const LocalGroup group(ranks);
  std::barrier<> all(ranks);
  LocalGroup::run_threads(ranks, [&](int rank) {
    try {
      body(*group.member(rank), rank, all);
    } catch (const std::exception& error) {
      ADD_FAILURE() << "rank " << rank << ": " << error.what();
      all.arrive_and_drop();
    }
  });
}

}  // namespace anyep::test
