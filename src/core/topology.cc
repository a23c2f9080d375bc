#include "core/topology.h"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "core/check.h"
#include "core/limits.h"
#include "core/parse.h"
#include "core/tuning.h"

namespace anyep::core {
namespace {

constexpr std::string_view kOp = "discover";

[[noreturn]] void refuse(ErrorCode code, int rank, const std::vector<int>& peers, std::string_view text) {
  Error error(code, fmt::format("{}: {}", kOp, text));
  error.op = kOp;
  error.rank = rank;
  error.peers = peers;
  throw error;
}

std::uint32_t page_bytes() {
  const long bytes = ::sysconf(_SC_PAGESIZE);
  return bytes > 0 ? static_cast<std::uint32_t>(bytes) : 4096;
}

std::string link_text(const char* path) {
  std::array<char, 128> text{};
  const ssize_t length = ::readlink(path, text.data(), text.size());
  return length > 0 ? std::string(text.data(), static_cast<std::size_t>(length)) : std::string();
}

// Format before content: a stranger's bytes must not be taken for numbers.
void check_format(std::span<const Introduction> all, int rank) {
  for (std::size_t peer = 0; peer < all.size(); ++peer) {
    const std::vector<int> who = {static_cast<int>(peer)};
    if (all[peer].magic != Introduction::kMagic) {
      refuse(ErrorCode::kCorrupt, rank, who,
             fmt::format("what rank {} sent is no introduction of an AnyEP rank", peer));
    }
    if (all[peer].version != Introduction::kVersion) {
      refuse(ErrorCode::kMismatch, rank, who,
             fmt::format("rank {} speaks format {}, this rank {}. Use one build of AnyEP on all ranks", peer,
                         all[peer].version, Introduction::kVersion));
    }
    if (all[peer].checksum != all[peer].expected_checksum()) {
      refuse(ErrorCode::kCorrupt, rank, who, fmt::format("the introduction of rank {} is damaged", peer));
    }
    if (all[peer].library_text() != all[0].library_text()) {
      refuse(ErrorCode::kMismatch, rank, who,
             fmt::format("rank 0 uses AnyEP {}, rank {} uses {}. Use one build on all ranks",
                         quoted(all[0].library_text()), peer, quoted(all[peer].library_text())));
    }
  }
}

void check_ranks(std::span<const Introduction> all, int rank) {
  std::vector<std::int64_t> claimed_by(all.size(), -1);  // entry by claimed rank
  for (std::size_t entry = 0; entry < all.size(); ++entry) {
    const std::int32_t claim = all[entry].rank;
    if (claim < 0 || static_cast<std::size_t>(claim) >= all.size()) {
      refuse(ErrorCode::kMismatch, rank, {static_cast<int>(entry)},
             fmt::format("process {} claims rank {}, not in 0..{}", all[entry].pid, claim, all.size() - 1));
    }
    std::int64_t& first = claimed_by[static_cast<std::size_t>(claim)];
    if (first >= 0) {
      refuse(ErrorCode::kMismatch, rank, {claim},
             fmt::format("rank {} is claimed by two processes, {} and {}. Give each its own rank", claim,
                         all[static_cast<std::size_t>(first)].pid, all[entry].pid));
    }
    first = static_cast<std::int64_t>(entry);
  }
  for (std::size_t entry = 0; entry < all.size(); ++entry) {
    if (all[entry].rank != static_cast<int>(entry)) {
      refuse(ErrorCode::kMismatch, rank, {all[entry].rank},
             fmt::format("the all-gather put rank {} in place {}. It must give the ranks in order", all[entry].rank,
                         entry));
    }
  }
}

}  // namespace

std::string_view Introduction::library_text() const {
  return {library, ::strnlen(library, sizeof(library))};
}

std::uint64_t Introduction::expected_checksum() const {
  return digest({reinterpret_cast<const char*>(this), offsetof(Introduction, checksum)});
}

std::uint64_t digest(std::string_view bytes) noexcept {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3;
  return hash;
}

int usable_cores() noexcept {
  // Kernels refuse a mask that is smaller than theirs; 8192 processors is the largest that Linux is built for.
  constexpr int kMostProcessors = 8192;
  cpu_set_t* const set = CPU_ALLOC(kMostProcessors);
  int count = 0;
  if (set != nullptr) {
    const std::size_t bytes = CPU_ALLOC_SIZE(kMostProcessors);
    CPU_ZERO_S(bytes, set);
    if (::sched_getaffinity(0, bytes, set) == 0) count = CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
  }
  if (count == 0) count = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(count, 1);
}

std::uint64_t host_digest() {
  std::string text;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), text);
  if (text.empty()) {  // no /proc: the host's name is the next best
    std::array<char, 256> name{};
    ::gethostname(name.data(), name.size() - 1);
    text = name.data();
  }
  text += '\n' + link_text("/proc/self/ns/mnt") + '\n' + link_text("/proc/self/ns/pid");
  return digest(text);
}

void check_rank(std::string_view op, int rank, int num_ranks) {
  if (num_ranks < 1 || num_ranks > kMaxRanks) {
    throw_argument(op, "num_ranks", fmt::format("{}", num_ranks), fmt::format("1..{}", kMaxRanks));
  }
  if (rank < 0 || rank >= num_ranks) {
    throw_argument(op, "rank", fmt::format("{}", rank), fmt::format("0..{}", num_ranks - 1));
  }
}

Introduction introduce_self(int rank, int num_ranks) {
  Introduction self;
  self.rank = rank;
  self.num_ranks = num_ranks;
  self.cores = usable_cores();
  self.pid = ::getpid();
  self.host = host_digest();
  self.page_bytes = page_bytes();
  std::strncpy(self.library, version(), sizeof(self.library) - 1);
  self.checksum = self.expected_checksum();
  return self;
}

void check_introductions(std::span<const Introduction> all, int rank) {
  check_format(all, rank);
  for (std::size_t peer = 0; peer < all.size(); ++peer) {
    if (all[peer].num_ranks == static_cast<int>(all.size())) continue;
    refuse(ErrorCode::kMismatch, rank, {static_cast<int>(peer)},
           fmt::format("process {} in place {} says that the group has {} ranks, {} were gathered", all[peer].pid, peer,
                       all[peer].num_ranks, all.size()));
  }
  check_ranks(all, rank);
}

}  // namespace anyep::core

namespace anyep {

int Topology::num_nodes() const {
  int highest = -1;
  for (const RankInfo& info : ranks) highest = std::max(highest, info.node);
  return highest + 1;
}

int Topology::ranks_on_host() const {
  ANYEP_CHECK(rank >= 0 && rank < num_ranks(), "a topology holds its own rank");
  const std::uint64_t host = ranks[static_cast<std::size_t>(rank)].host;
  return static_cast<int>(std::ranges::count(ranks, host, &RankInfo::host));
}

Topology Topology::discover(Bootstrap& bootstrap, Deadline deadline) {
  const int rank = bootstrap.rank();
  const int num_ranks = bootstrap.num_ranks();
  core::check_rank(core::kOp, rank, num_ranks);
  const core::Introduction self = core::introduce_self(rank, num_ranks);
  std::vector<core::Introduction> all(static_cast<std::size_t>(num_ranks));
  bootstrap.all_gather(std::as_bytes(std::span(&self, 1)), std::as_writable_bytes(std::span(all)), deadline);
  core::check_introductions(all, rank);

  Topology topology;
  topology.rank = rank;
  std::vector<std::uint64_t> hosts;  // in order of their first rank: the node's number
  for (const core::Introduction& peer : all) {
    const auto found = std::ranges::find(hosts, peer.host);
    const int node = static_cast<int>(found - hosts.begin());
    if (found == hosts.end()) hosts.push_back(peer.host);
    topology.ranks.push_back({peer.host, peer.pid, node, std::max(peer.cores, 1), peer.page_bytes});
  }
  return topology;
}

Topology Topology::discover(Bootstrap& bootstrap) {
  const Tuning tuning = Tuning::from_environment();
  return discover(bootstrap, std::chrono::steady_clock::now() + core::scaled(tuning.startup_timeout, tuning));
}

Topology Topology::one_host(int num_ranks, int rank) {
  core::check_rank("one_host", rank, num_ranks);
  Topology topology;
  topology.rank = rank;
  const core::Introduction self = core::introduce_self(rank, num_ranks);
  topology.ranks.assign(static_cast<std::size_t>(num_ranks), {self.host, self.pid, 0, self.cores, self.page_bytes});
  return topology;
}

}  // namespace anyep
