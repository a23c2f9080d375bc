#include <anyep/topology.h>
#include <gmock/gmock.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "core/limits.h"
#include "core/topology.h"
#include "thrown.h"

namespace anyep {
namespace {

using core::Introduction;
using test::thrown;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// What a well-behaved group of `num_ranks` would gather, each rank a process of its own.
std::vector<Introduction> introductions(int num_ranks) {
  std::vector<Introduction> all;
  for (int rank = 0; rank < num_ranks; ++rank) {
    all.push_back(core::introduce_self(rank, num_ranks));
    all.back().pid = 1000 + rank;
  }
  return all;
}

// An all-gather that gives rank `rank` a prepared answer, except for its own entry.
class PreparedBootstrap final : public Bootstrap {
 public:
  PreparedBootstrap(int rank, std::vector<Introduction> all) : rank_(rank), num_ranks_(static_cast<int>(all.size())) {
    for (Introduction& one : all) one.checksum = one.expected_checksum();
    all_ = std::move(all);
  }
  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }
  void all_gather(std::span<const std::byte>, std::span<std::byte> all, Deadline) override {
    ++gathered;
    ASSERT_EQ(all.size(), all_.size() * sizeof(Introduction));
    std::memcpy(all.data(), all_.data(), all.size());
  }

  void claim(int rank, int num_ranks) {
    rank_ = rank;
    num_ranks_ = num_ranks;
  }
  Introduction& entry(std::size_t at) { return all_[at]; }
  int gathered = 0;

 private:
  int rank_;
  int num_ranks_;
  std::vector<Introduction> all_;
};

Error discover_error(int rank, std::vector<Introduction> all) {
  PreparedBootstrap bootstrap(rank, std::move(all));
  return thrown([&] { Topology::discover(bootstrap, Deadline::max()); });
}

TEST(TopologyTest, DiscoverTellsEveryRanksProcessAndHost) {
  auto all = introductions(3);
  all[1].cores = 7;
  PreparedBootstrap bootstrap(2, all);
  const Topology topology = Topology::discover(bootstrap, Deadline::max());
  EXPECT_EQ(topology.rank, 2);
  ASSERT_EQ(topology.num_ranks(), 3);
  EXPECT_EQ(topology.ranks[0].pid, 1000);
  EXPECT_EQ(topology.ranks[1].cores, 7);
  EXPECT_EQ(topology.ranks[2].page_bytes, static_cast<std::uint32_t>(::sysconf(_SC_PAGESIZE)));
  EXPECT_EQ(topology.num_nodes(), 1);
  EXPECT_EQ(topology.ranks_on_host(), 3);
  EXPECT_EQ(bootstrap.gathered, 1);
}

TEST(TopologyTest, HostsAreNodesInOrderOfTheirFirstRank) {
  auto all = introductions(5);
  all[0].host = all[2].host = 77;
  all[1].host = all[4].host = 11;
  all[3].host = 55;
  PreparedBootstrap bootstrap(4, all);
  const Topology topology = Topology::discover(bootstrap, Deadline::max());
  std::vector<int> nodes;
  for (const RankInfo& info : topology.ranks) nodes.push_back(info.node);
  EXPECT_THAT(nodes, ElementsAre(0, 1, 0, 2, 1));
  EXPECT_EQ(topology.num_nodes(), 3);
  EXPECT_EQ(topology.ranks_on_host(), 2);
}

TEST(TopologyTest, ARankOutsideTheGroupIsRefusedBeforeAnythingIsSent) {
  for (const int bad : {-1, 4, 5, std::numeric_limits<int>::max()}) {
    PreparedBootstrap bootstrap(0, introductions(4));
    bootstrap.claim(bad, 4);
    const Error error = thrown([&] { Topology::discover(bootstrap, Deadline::max()); });
    EXPECT_EQ(error.code, ErrorCode::kArgument);
    EXPECT_EQ(error.argument, "rank");
    EXPECT_EQ(error.got, std::to_string(bad));
    EXPECT_EQ(error.allowed, "0..3");
    EXPECT_EQ(bootstrap.gathered, 0);
  }
}

TEST(TopologyTest, AGroupSizeOutsideTheLimitIsRefusedWithTheLimit) {
  for (const int bad : {0, -3, core::kMaxRanks + 1}) {
    PreparedBootstrap bootstrap(0, introductions(1));
    bootstrap.claim(0, bad);
    const Error error = thrown([&] { Topology::discover(bootstrap, Deadline::max()); });
    EXPECT_EQ(error.code, ErrorCode::kArgument);
    EXPECT_EQ(error.argument, "num_ranks");
    EXPECT_EQ(error.allowed, "1..1024");
    EXPECT_EQ(bootstrap.gathered, 0);
  }
}

TEST(TopologyTest, TwoProcessesThatClaimOneRankAreNamedOnAllRanks) {
  auto all = introductions(4);
  all[3].rank = 1;
  for (int rank = 0; rank < 4; ++rank) {
    const Error error = discover_error(rank, all);
    EXPECT_EQ(error.code, ErrorCode::kMismatch);
    EXPECT_EQ(error.rank, rank);
    EXPECT_THAT(error.peers, ElementsAre(1));
    EXPECT_THAT(error.what(), HasSubstr("rank 1 is claimed by two processes, 1001 and 1003"));
  }
}

TEST(TopologyTest, AGroupSizeThatDiffersIsAMismatchOnAllRanks) {
  auto all = introductions(3);
  all[2].num_ranks = 4;
  for (int rank = 0; rank < 3; ++rank) {
    const Error error = discover_error(rank, all);
    EXPECT_EQ(error.code, ErrorCode::kMismatch);
    EXPECT_THAT(error.what(), HasSubstr("process 1002 in place 2 says that the group has 4 ranks, 3 were gathered"));
  }
}

TEST(TopologyTest, AnAllGatherThatSwapsRanksIsNoticed) {
  auto all = introductions(3);
  std::swap(all[0], all[1]);
  const Error error = discover_error(2, all);
  EXPECT_EQ(error.code, ErrorCode::kMismatch);
  EXPECT_THAT(error.what(), HasSubstr("put rank 1 in place 0"));
}

TEST(TopologyTest, AClaimOutsideTheGroupIsAMismatchAndTouchesNoMemory) {
  for (const int bad : {-1, 3, std::numeric_limits<int>::min()}) {
    auto all = introductions(3);
    all[1].rank = bad;
    EXPECT_EQ(discover_error(0, all).code, ErrorCode::kMismatch);
  }
}

TEST(TopologyTest, AnotherLibraryVersionIsAMismatchWithBothTexts) {
  auto all = introductions(2);
  std::strcpy(all[1].library, "9.9.9+other");
  const Error error = discover_error(0, all);
  EXPECT_EQ(error.code, ErrorCode::kMismatch);
  EXPECT_THAT(error.peers, ElementsAre(1));
  EXPECT_THAT(error.what(), HasSubstr("\"9.9.9+other\""));
}

TEST(TopologyTest, AnotherFormatIsAMismatch) {
  auto all = introductions(2);
  all[1].version = Introduction::kVersion + 1;
  EXPECT_EQ(discover_error(0, all).code, ErrorCode::kMismatch);
}

TEST(TopologyTest, AnyFlippedByteIsNoticed) {
  for (std::size_t byte = 0; byte < sizeof(Introduction); ++byte) {
    PreparedBootstrap bootstrap(0, introductions(2));
    reinterpret_cast<unsigned char*>(&bootstrap.entry(1))[byte] ^= 0x40;
    const Error error = thrown([&] { Topology::discover(bootstrap, Deadline::max()); });
    EXPECT_TRUE(error.code == ErrorCode::kCorrupt || error.code == ErrorCode::kMismatch) << byte;
    EXPECT_THAT(error.peers, ElementsAre(1)) << byte;
  }
}

TEST(TopologyTest, ALibraryTextWithoutItsEndIsReadWithinItsBounds) {
  Introduction full;
  std::memset(full.library, 'x', sizeof(full.library));
  EXPECT_EQ(full.library_text().size(), sizeof(full.library));
}

TEST(TopologyTest, OneHostIsAGroupOfThisProcess) {
  const Topology topology = Topology::one_host(4, 3);
  EXPECT_EQ(topology.rank, 3);
  EXPECT_EQ(topology.num_ranks(), 4);
  EXPECT_EQ(topology.num_nodes(), 1);
  EXPECT_EQ(topology.ranks_on_host(), 4);
  EXPECT_EQ(topology.ranks[0].pid, ::getpid());
  EXPECT_EQ(topology.ranks[0].host, core::host_digest());
  EXPECT_EQ(thrown([] { Topology::one_host(4, 4); }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([] { Topology::one_host(0); }).code, ErrorCode::kArgument);
}

TEST(TopologyTest, CoresAreThoseThatTheProcessMayUse) {
  const int cores = core::usable_cores();
  EXPECT_GE(cores, 1);
  std::thread([cores] {
    cpu_set_t all;
    CPU_ZERO(&all);
    ASSERT_EQ(::sched_getaffinity(0, sizeof(all), &all), 0);
    int first = 0;
    while (!CPU_ISSET(first, &all)) ++first;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    ASSERT_EQ(::sched_setaffinity(0, sizeof(one), &one), 0);  // of this thread alone
    EXPECT_EQ(core::usable_cores(), 1);
    EXPECT_LE(core::usable_cores(), cores);
  }).join();
}

}  // namespace
}  // namespace anyep
