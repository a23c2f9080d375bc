#include "cli/team.h"

#include <anyep/error.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "bench/support/samples.h"

namespace anyep::cli {
namespace {

constexpr std::size_t kTextBytes = 4096;

/// Room for one text per rank.
class Texts {
 public:
  explicit Texts(int num_ranks) : memory_(static_cast<std::size_t>(num_ranks) * kTextBytes) {}
  void set(int rank, const std::string& text) const {
    std::memcpy(at(rank), text.c_str(), std::min(text.size() + 1, kTextBytes - 1));
  }
  std::string get(int rank) const { return at(rank); }

 private:
  char* at(int rank) const {
    return reinterpret_cast<char*>(memory_.data()) + static_cast<std::size_t>(rank) * kTextBytes;
  }
  SharedMemory memory_;
};

std::string how_it_ended(int status) {
  if (WIFSIGNALED(status))
    return fmt::format("was killed by signal {} ({})", WTERMSIG(status), strsignal(WTERMSIG(status)));
  if (WIFEXITED(status)) return fmt::format("ended with status {}", WEXITSTATUS(status));
  return fmt::format("ended with wait status {}", status);
}

}  // namespace

SharedMemory::SharedMemory(std::size_t bytes) : bytes_(std::max<std::size_t>(bytes, 1)) {
  void* address = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(address);
}

SharedMemory::~SharedMemory() {
  munmap(data_, bytes_);
}

Board::Board(int num_ranks, int num_series, int capacity)
    : num_ranks_(num_ranks),
      num_series_(num_series),
      capacity_(capacity),
      memory_(index(num_ranks, 0) * (sizeof(Series) + static_cast<std::size_t>(capacity) * sizeof(double))) {}

std::size_t Board::index(int rank, int series) const {
  return static_cast<std::size_t>(rank * num_series_ + series);
}

Board::Series& Board::head(int rank, int series) const {
  return reinterpret_cast<Series*>(memory_.data())[index(rank, series)];
}

double* Board::numbers(int rank, int series) const {
  std::byte* const first = memory_.data() + index(num_ranks_, 0) * sizeof(Series);
  return reinterpret_cast<double*>(first) + index(rank, series) * static_cast<std::size_t>(capacity_);
}

void Board::add(int rank, int series, double value) {
  Series& mine = head(rank, series);
  if (mine.count >= static_cast<std::uint64_t>(capacity_)) return;
  numbers(rank, series)[mine.count++] = value;
}

std::vector<double> Board::values(int rank, int series) const {
  const double* const first = numbers(rank, series);
  return {first, first + head(rank, series).count};
}

std::vector<double> Board::slowest(int series) const {
  std::vector<std::vector<double>> ranks;
  for (int rank = 0; rank < num_ranks_; ++rank) ranks.push_back(values(rank, series));
  return bench::slowest(ranks);
}

double Board::sum(int series) const {
  double total = 0;
  for (int rank = 0; rank < num_ranks_; ++rank) {
    for (const double value : values(rank, series)) total += value;
  }
  return total;
}

double Board::largest(int series) const {
  double most = 0;
  for (int rank = 0; rank < num_ranks_; ++rank) {
    for (const double value : values(rank, series)) most = std::max(most, value);
  }
  return most;
}

std::vector<std::string> run_team(const TeamOptions& options, const std::function<void(int, Bootstrap&)>& body) {
  LocalGroup group(options.num_ranks);
  const Texts texts(options.num_ranks);
  const auto guarded = [&](int rank) {
    try {
      body(rank, *group.member(rank));
    } catch (const std::exception& error) {
      texts.set(rank, *error.what() != '\0' ? error.what() : "an exception without text");
    }
  };
  std::vector<int> statuses(static_cast<std::size_t>(options.num_ranks), 0);
  if (options.threads) {
    LocalGroup::run_threads(options.num_ranks, guarded);
  } else {
    statuses = LocalGroup::run_processes(options.num_ranks, guarded);
  }
  std::vector<std::string> failures;
  for (int rank = 0; rank < options.num_ranks; ++rank) {
    const int status = statuses[static_cast<std::size_t>(rank)];
    const std::string text = texts.get(rank);
    if (!text.empty()) {
      failures.push_back(fmt::format("rank {}: {}", rank, text));
    } else if (status != 0) {
      failures.push_back(fmt::format("rank {} {}", rank, how_it_ended(status)));
    }
  }
  return failures;
}

}  // namespace anyep::cli
