#include "support/world.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <system_error>

#include "support/properties.h"
#include "support/rank_run.h"

namespace anyep::test {
namespace {

using Word = std::atomic<std::uint32_t>;

/// Zeroed words that threads and forked processes share.
class SharedWords {
 public:
  explicit SharedWords(std::size_t count) : bytes_(count * sizeof(Word) + 1) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    words_ = new (memory) Word[count]();
  }
  SharedWords(const SharedWords&) = delete;
  SharedWords& operator=(const SharedWords&) = delete;
  ~SharedWords() { munmap(words_, bytes_); }
  Word* words() const { return words_; }

 private:
  std::size_t bytes_;
  Word* words_;
};

/// A file in memory through which one process hands bytes to its parent.
class Mailbox {
 public:
  Mailbox() : descriptor_(memfd_create("results", MFD_CLOEXEC)) {
    if (descriptor_ < 0) throw std::system_error(errno, std::generic_category(), "memfd_create");
  }
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;
  ~Mailbox() { ::close(descriptor_); }

  void send(std::span<const std::byte> bytes) const {
    while (!bytes.empty()) {
      const ssize_t written = write(descriptor_, bytes.data(), bytes.size());
      if (written < 0) throw std::system_error(errno, std::generic_category(), "write");
      bytes = bytes.subspan(static_cast<std::size_t>(written));
    }
  }
  Bytes receive() const {
    struct stat status {};
    if (fstat(descriptor_, &status) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
    Bytes bytes(static_cast<std::size_t>(status.st_size));
    for (std::size_t at = 0; at < bytes.size();) {
      const ssize_t count = pread(descriptor_, bytes.data() + at, bytes.size() - at, static_cast<off_t>(at));
      if (count <= 0) throw std::system_error(errno, std::generic_category(), "pread");
      at += static_cast<std::size_t>(count);
    }
    return bytes;
  }

 private:
  int descriptor_;
};

Outputs run_threads(const Scenario& scenario, bool on_gpus) {
  const LocalGroup group(scenario.num_ranks);
  const SharedWords words(Returned::num_words(scenario));
  Outputs outputs(static_cast<std::size_t>(scenario.num_ranks));
  LocalGroup::run_threads(scenario.num_ranks, [&](int rank) {
    RankRun run(scenario, rank, Returned(words.words(), scenario.num_ranks), on_gpus ? gpu_mirror(rank) : nullptr);
    outputs[static_cast<std::size_t>(rank)] = run.play(group);
  });
  return outputs;
}

Outputs run_processes(const Scenario& scenario) {
  const LocalGroup group(scenario.num_ranks);
  const SharedWords words(Returned::num_words(scenario));
  const std::vector<Mailbox> mailboxes(static_cast<std::size_t>(scenario.num_ranks));
  const std::vector<int> statuses = LocalGroup::run_processes(scenario.num_ranks, [&](int rank) {
    RankRun run(scenario, rank, Returned(words.words(), scenario.num_ranks));
    mailboxes[static_cast<std::size_t>(rank)].send(run.play(group).serialised());
  });
  Outputs outputs;
  for (std::size_t rank = 0; rank < mailboxes.size(); ++rank) {
    outputs.push_back(RankOutputs::parsed(mailboxes[rank].receive()));
    if (statuses[rank] != 0) outputs.back().put_text(0, "failed", "wait status " + std::to_string(statuses[rank]));
  }
  return outputs;
}

}  // namespace

const char* name_of(World world) {
  switch (world) {
    case World::kOracle:
      return "Oracle";
    case World::kThreads:
      return "Threads";
    case World::kProcesses:
      return "Processes";
    case World::kGpus:
      return "Gpus";
  }
  return "Unknown";
}

Outputs run(World world, const Scenario& scenario) {
  switch (world) {
    case World::kOracle:
      return oracle_outputs(scenario);
    case World::kThreads:
      return run_threads(scenario, false);
    case World::kProcesses:
      return run_processes(scenario);
    case World::kGpus:
      return run_threads(scenario, true);
  }
  return {};
}

std::vector<World> engine_worlds() {
  std::vector<World> all = {World::kThreads, World::kProcesses};
  if (num_gpus() > 0) all.push_back(World::kGpus);
  return all;
}

std::vector<World> worlds() {
  std::vector<World> all = engine_worlds();
  all.insert(all.begin(), World::kOracle);
  return all;
}

void expect_conforms(World world, const Scenario& scenario) {
  const Outputs expected = oracle_outputs(scenario);
  if (world == World::kOracle) {
    EXPECT_EQ(broken_property(scenario, expected), "");
    return;
  }
  const Outputs got = run(world, scenario);
  if (world == World::kGpus && scenario.num_ranks > kMostRanksOnGpus) {
    for (const RankOutputs& rank : got)
      EXPECT_THAT(rank.text(0, "failed"), testing::HasSubstr("this version serves 1..8"));
    return;
  }
  const std::string differs = difference(expected, got);
  if (differs.empty()) return;
  std::string story;
  for (std::size_t i = 0; i < scenario.steps.size(); ++i) {
    story += std::to_string(i) + " " + name_of(scenario.steps[i]) + (i + 1 < scenario.steps.size() ? ", " : "");
  }
  ADD_FAILURE() << name_of(world) << " of " << scenario.num_ranks << ": " << story << "\n" << differs;
}

}  // namespace anyep::test
