// Ranks as threads with company: the words that it shares with the host, meeting points that a failed rank does not block.
#pragma once

#include <anyep/bootstrap.h>
#include <gtest/gtest.h>

#include <barrier>
#include <chrono>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../support/stream_graph.h"
#include "company_kernels.h"
#include "protocol/platform.h"

namespace anyep::test {

/// Empty when on every GPU so many blocks of occupy() hold their SM, else how many do.
inline std::string missing(CompanyWords& words, const std::vector<int>& blocks_of_gpu) {
  std::string text;
  bool all = true;
  for (std::size_t gpu = 0; gpu < blocks_of_gpu.size(); ++gpu) {
    int started = 0;
    for (int block = 0; block < blocks_of_gpu[gpu]; ++block) {
      if (protocol::Shared(words.started[gpu][block]).load(protocol::kAcquire) != 0) ++started;
    }
    all = all && started == blocks_of_gpu[gpu];
    text += (gpu == 0 ? " GPU " : ", GPU ") + std::to_string(gpu) + ": " + std::to_string(started) + " of " +
            std::to_string(blocks_of_gpu[gpu]) + " blocks";
  }
  return all ? "" : text;
}

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
  /// Of the blocks that waited to their limit the last one's kernel; empty: none did.
  std::string gave_up() const {
    constexpr const char* kNames[] = {"", "occupy", "pass_around", "meet"};
    return kNames[protocol::Shared(words_->gave_up).load(protocol::kAcquire)];
  }
  void stop() const { protocol::Shared(words_->stop).store(1, protocol::kRelease); }
  /// Until on every GPU so many blocks hold their SM. @throws std::runtime_error after two seconds: how many do
  void await_started(const std::vector<int>& blocks_of_gpu) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    for (std::string text; !(text = missing(*words_, blocks_of_gpu)).empty(); std::this_thread::yield()) {
      if (std::chrono::steady_clock::now() > end) throw std::runtime_error("the company has not started:" + text);
    }
    const bool left = protocol::Shared(words_->stop).load(protocol::kAcquire) != 0;
    if (left) throw std::runtime_error("the company was told to leave before it was used: another rank has failed");
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
