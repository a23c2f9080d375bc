// Ranks as threads or as processes for the tests of this folder, and what a process holds.
#pragma once

#include <anyep/bootstrap.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace anyep::test {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

inline Deadline in(std::chrono::nanoseconds time) {
  return Clock::now() + time;
}

inline std::chrono::milliseconds since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start);
}

/// Failed expectations of a child print there, and make its exit status 1.
inline void must_hold() {
  if (testing::Test::HasFailure()) throw std::runtime_error("an expectation failed in this process");
}

/// Runs the ranks as processes; each must end with status 0, except those in `killed`: by SIGKILL.
inline void run_world(int num_ranks, const std::function<void(int rank)>& body, const std::vector<int>& killed = {}) {
  const std::vector<int> ended = LocalGroup::run_processes(num_ranks, [&](int rank) {
    body(rank);
    must_hold();
  });
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int status = ended[static_cast<std::size_t>(rank)];
    if (std::find(killed.begin(), killed.end(), rank) != killed.end()) {
      EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "rank " << rank << ": status " << status;
    } else {
      EXPECT_EQ(status, 0) << "rank " << rank;
    }
  }
}

inline std::size_t entries_of(const std::filesystem::path& folder) {
  const std::filesystem::directory_iterator all(folder);
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

/// What must be the same before and after.
struct Holdings {
  std::size_t descriptors = entries_of("/proc/self/fd");
  std::size_t threads = entries_of("/proc/self/task");
  std::size_t shared_mappings = count_shared_mappings();

  /// Of memfds and of shared anonymous memory; private ones come and go with the allocator.
  static std::size_t count_shared_mappings() {
    std::ifstream maps("/proc/self/maps");
    std::size_t count = 0;
    for (std::string line; std::getline(maps, line);) {
      const std::size_t space = line.find(' ');
      if (space != std::string::npos && line.size() > space + 4 && line[space + 4] == 's') ++count;
    }
    return count;
  }
  friend bool operator==(const Holdings&, const Holdings&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Holdings& h) {
    return out << h.descriptors << " descriptors, " << h.threads << " threads, " << h.shared_mappings
               << " shared mappings";
  }
};

/// A folder of its own as TMPDIR while it lives.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string path = (std::filesystem::temp_directory_path() / "anyep-test-XXXXXX").string();
    if (::mkdtemp(path.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = path;
    const char* const old = std::getenv("TMPDIR");
    if (old != nullptr) old_ = old;
    ::setenv("TMPDIR", path_.c_str(), 1);
  }
  ~TemporaryFolder() {
    if (old_.empty()) {
      ::unsetenv("TMPDIR");
    } else {
      ::setenv("TMPDIR", old_.c_str(), 1);
    }
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  std::string old_;
};

}  // namespace anyep::test
