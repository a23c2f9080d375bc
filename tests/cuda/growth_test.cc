// How a window grows: no piece is granted before every peer has mapped it. Without a GPU: memory is a list of ranges here.
#include "cuda/memory/growth.h"

#include <anyep/error.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <atomic>
#include <random>
#include <thread>

#include "bootstrap/memfd.h"
#include "bootstrap/packet.h"
#include "core/check.h"
#include "tests/unit/bootstrap_world.h"
#include "tests/unit/thrown.h"

namespace anyep::cuda {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr WindowShape kShape{4 * kMiB, 1024 * kMiB, 2 * kMiB};

class ListedWindow final : public Window {
 public:
  ListedWindow() {
    bytes_ = kShape.bytes;
    reserved_ = kShape.reserved;
  }
  Ticket add(std::uint64_t offset, std::uint64_t bytes) override {
    const std::lock_guard lock(mutex);
    if (out_of_memory) core::throw_resource("create", "cuMemCreate", 0, bytes);
    pieces.push_back({offset, bytes});
    return {bootstrap::make_memfd("test-piece", bytes), {}};
  }
  void import(std::uint64_t offset, std::uint64_t bytes, const Ticket& ticket) override {
    bootstrap::check_memfd(ticket.fd.get(), bytes);
    std::this_thread::sleep_for(delay);
    const std::lock_guard lock(mutex);
    if (out_of_memory) core::throw_resource("create", "cuMemMap", 0, bytes);
    pieces.push_back({offset, bytes});
  }

  std::mutex mutex;
  std::vector<Piece> pieces;
  bool out_of_memory = false;
  std::chrono::milliseconds delay{0};
};

/// Ranks of as many processes, in one: each has objects of its own for all windows.
struct World {
  explicit World(int num_ranks) : windows(static_cast<std::size_t>(num_ranks)) {
    std::vector<bootstrap::UniqueFd> inboxes, ends;
    for (int rank = 0; rank < num_ranks; ++rank) {
      auto [inbox, end] = make_inbox();
      inboxes.push_back(std::move(inbox));
      ends.push_back(std::move(end));
    }
    for (std::size_t rank = 0; rank < windows.size(); ++rank) {
      Growth::Links links;
      links.inbox = std::move(inboxes[rank]);
      links.outboxes.resize(windows.size());
      std::vector<std::shared_ptr<Window>> all;
      for (std::size_t peer = 0; peer < windows.size(); ++peer) {
        windows[rank].push_back(std::make_shared<ListedWindow>());
        all.push_back(windows[rank].back());
        if (peer != rank) links.outboxes[peer] = bootstrap::UniqueFd(::fcntl(ends[peer].get(), F_DUPFD_CLOEXEC, 0));
      }
      growths.push_back(std::make_unique<Growth>(static_cast<int>(rank), all, kShape, std::move(links)));
    }
    strangers_end = std::move(ends[0]);
  }
  ListedWindow& view(std::size_t rank, std::size_t of) { return *windows[rank][of]; }

  std::vector<std::vector<std::shared_ptr<ListedWindow>>> windows;  ///< [rank][of]
  std::vector<std::unique_ptr<Growth>> growths;
  bootstrap::UniqueFd strangers_end;  ///< of rank 0's inbox
};

bool nobody(int) {
  return false;
}

TEST(CudaGrowth, APieceIsGrantedWhenEveryPeerHasMappedIt) {
  World world(3);
  world.view(2, 1).delay = 50ms;
  const Piece piece = world.growths[1]->grow(100 * kMiB, test::in(10s), nobody);
  EXPECT_EQ(piece.offset, kShape.bytes);
  EXPECT_EQ(piece.bytes, 100 * kMiB);
  for (std::size_t rank = 0; rank < 3; ++rank) {
    ASSERT_EQ(world.view(rank, 1).pieces.size(), 1u) << "rank " << rank;
    EXPECT_EQ(world.view(rank, 1).pieces[0].offset, piece.offset);
    EXPECT_EQ(world.view(rank, 1).pieces[0].bytes, piece.bytes);
    EXPECT_TRUE(world.view(rank, 0).pieces.empty());
  }
  EXPECT_EQ(world.growths[1]->room(), kShape.reserved - kShape.bytes - 100 * kMiB);
}

TEST(CudaGrowth, PiecesAreNotSmallAndFollowEachOther) {
  World world(2);
  const Piece first = world.growths[0]->grow(1, test::in(10s), nobody);
  EXPECT_EQ(first.bytes, 64 * kMiB);
  const Piece second = world.growths[0]->grow(64 * kMiB + 1, test::in(10s), nobody);
  EXPECT_EQ(second.offset, first.offset + first.bytes);
  EXPECT_EQ(second.bytes, 66 * kMiB);
}

TEST(CudaGrowth, RanksGrowAtTheSameTime) {
  World world(4);
  std::vector<std::thread> ranks;
  std::atomic<int> grown = 0;
  for (std::size_t rank = 0; rank < 4; ++rank) {
    ranks.emplace_back([&, rank] {
      for (int round = 0; round < 5; ++round) {
        world.growths[rank]->grow(kMiB, test::in(20s), nobody);
        ++grown;
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_EQ(grown, 20);
  for (std::size_t of = 0; of < 4; ++of) EXPECT_EQ(world.view(3, of).pieces.size(), 5u);
}

TEST(CudaGrowth, APeerThatCannotMapItIsNamedAndThePieceIsNotGranted) {
  World world(3);
  world.view(2, 0).out_of_memory = true;
  const Error error = test::thrown([&] { world.growths[0]->grow(kMiB, test::in(10s), nobody); });
  EXPECT_EQ(error.code, ErrorCode::kResource);
  EXPECT_THAT(error.peers, ElementsAre(2));
  world.view(2, 0).out_of_memory = false;
  // Rank 1 has mapped the piece that was not granted: the next one lies elsewhere.
  EXPECT_EQ(world.growths[0]->grow(kMiB, test::in(10s), nobody).offset, kShape.bytes + 64 * kMiB);
}

TEST(CudaGrowth, OwnMemoryThatRunsOutAsksNobody) {
  World world(2);
  world.view(0, 0).out_of_memory = true;
  EXPECT_EQ(test::thrown([&] { world.growths[0]->grow(kMiB, test::in(10s), nobody); }).code, ErrorCode::kResource);
  EXPECT_TRUE(world.view(1, 0).pieces.empty());
}

TEST(CudaGrowth, ASilentPeerIsNamedAtTheDeadline) {
  World world(3);
  world.view(1, 0).delay = 600ms;
  const Error error = test::thrown([&] { world.growths[0]->grow(kMiB, test::in(100ms), nobody); });
  EXPECT_EQ(error.code, ErrorCode::kTimeout);
  EXPECT_THAT(error.peers, ElementsAre(1));
  // Its late answer is not taken for one about the next piece.
  world.view(1, 0).delay = 0ms;
  const Piece next = world.growths[0]->grow(kMiB, test::in(10s), nobody);
  EXPECT_EQ(world.view(1, 0).pieces.back().offset, next.offset);
}

TEST(CudaGrowth, AGonePeerIsNotWaitedFor) {
  World world(3);
  world.growths[2].reset();
  const auto begin = test::Clock::now();
  world.growths[0]->grow(kMiB, test::in(10s), [](int peer) { return peer == 2; });
  EXPECT_LT(test::since(begin), 5s);
}

TEST(CudaGrowth, MoreThanTheAddressesIsCapacity) {
  World world(2);
  const Error error = test::thrown([&] { world.growths[0]->grow(2048 * kMiB, test::in(10s), nobody); });
  EXPECT_EQ(error.code, ErrorCode::kCapacity);
  EXPECT_EQ(error.need, 2048 * kMiB);
  EXPECT_EQ(error.have, kShape.reserved - kShape.bytes);
  EXPECT_EQ(test::thrown([&] { world.growths[0]->grow(UINT64_MAX, test::in(10s), nobody); }).code,
            ErrorCode::kCapacity);
  // What is left may be smaller than the least piece.
  world.growths[0]->grow(1000 * kMiB, test::in(10s), nobody);
  EXPECT_EQ(world.growths[0]->grow(kMiB, test::in(10s), nobody).bytes, 20 * kMiB);
  EXPECT_EQ(world.growths[0]->room(), 0u);
}

TEST(CudaGrowth, StrangeAndOversizedPacketsDoNoHarm) {
  World world(2);
  std::mt19937 random(3);
  for (const std::size_t bytes : {1u, 8u, 96u, 104u, 4000u}) {
    for (int round = 0; round < 20; ++round) {
      std::vector<std::byte> garbage(bytes);
      for (std::byte& byte : garbage) byte = static_cast<std::byte>(random());
      (void)control::send_packet(world.strangers_end.get(), garbage);
      std::this_thread::sleep_for(100us);
    }
  }
  EXPECT_EQ(world.growths[1]->grow(kMiB, test::in(10s), nobody).bytes, 64 * kMiB);
  EXPECT_EQ(world.view(0, 1).pieces.size(), 1u);
}

TEST(CudaGrowth, NothingStaysBehind) {
  { World warm_up(2); }
  const test::Holdings before;
  for (int round = 0; round < 20; ++round) {
    World world(3);
    world.growths[0]->grow(kMiB, test::in(10s), nobody);
  }
  EXPECT_EQ(test::Holdings(), before);
}

}  // namespace
}  // namespace anyep::cuda
