// Who the ranks are: host, process, node and capabilities of each.
#pragma once

#include <anyep/bootstrap.h>
#include <anyep/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace anyep {

struct RankInfo {
  std::uint64_t host = 0;  ///< digest of boot id and namespaces: equal = can share memory
  std::int64_t pid = 0;
  int node = 0;   ///< 0..num_nodes-1; ranks that can address each other's memory
  int cores = 1;  ///< processors this process may use
  std::uint32_t page_bytes = 4096;
};

struct ANYEP_API Topology {
  int rank = 0;
  int device = -1;  ///< this rank's GPU, as the CUDA runtime counts them here; -1 = a CPU rank
  std::vector<RankInfo> ranks;

  int num_ranks() const { return static_cast<int>(ranks.size()); }
  int num_nodes() const;
  /// Ranks on this rank's host.
  int ranks_on_host() const;

  /// Collective. @throws Error kArgument for a rank outside the group, kMismatch when two processes claim one rank or the
  /// group's size differs, kTimeout at the deadline.
  static Topology discover(Bootstrap&, Deadline);
  static Topology discover(Bootstrap&);  ///< within Tuning's start-up limit
  /// `num_ranks` ranks of this host, for plans and tests without a group.
  static Topology one_host(int num_ranks, int rank = 0);
};

}  // namespace anyep
