// LocalGroup with ranks as threads, and the callback bootstrap.
#include <gmock/gmock.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "tests/unit/bootstrap_world.h"
#include "tests/unit/thrown.h"

namespace anyep {
namespace {

using namespace test;
using testing::ElementsAre;
using testing::HasSubstr;

std::byte pattern(int rank, std::size_t at, int exchange) {
  return static_cast<std::byte>(
      (static_cast<std::size_t>(rank) * 31 + at * 7 + static_cast<std::size_t>(exchange) * 3) % 251);
}

void check_exchange(Bootstrap& bootstrap, std::size_t bytes, int exchange) {
  std::vector<std::byte> mine(bytes), all(bytes * static_cast<std::size_t>(bootstrap.num_ranks()));
  for (std::size_t at = 0; at < bytes; ++at) mine[at] = pattern(bootstrap.rank(), at, exchange);
  bootstrap.all_gather(mine, all, in(20s));
  for (int rank = 0; rank < bootstrap.num_ranks(); ++rank) {
    for (std::size_t at = 0; at < bytes; ++at) {
      ASSERT_EQ(all[static_cast<std::size_t>(rank) * bytes + at], pattern(rank, at, exchange)) << rank << " " << at;
    }
  }
}

int gather_int(Bootstrap& bootstrap, int mine, Deadline deadline) {
  std::vector<int> all(static_cast<std::size_t>(bootstrap.num_ranks()));
  bootstrap.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)), deadline);
  int sum = 0;
  for (const int value : all) sum += value;
  return sum;
}

TEST(BootstrapLocal, GathersAnySizeInRankOrder) {
  for (const int num_ranks : {1, 2, 5}) {
    const LocalGroup group(num_ranks);
    LocalGroup::run_threads(num_ranks, [&](int rank) {
      const auto bootstrap = group.member(rank);
      EXPECT_EQ(bootstrap->rank(), rank);
      EXPECT_EQ(bootstrap->num_ranks(), num_ranks);
      int exchange = 0;
      for (const std::size_t bytes : {0, 1, 7, 8, 4095, 4096, 4097, 3 * 4096, 20001}) {
        check_exchange(*bootstrap, bytes, exchange++);
      }
    });
  }
}

TEST(BootstrapLocal, SurvivesRandomDelaysAndManyRounds) {
  const unsigned seed = std::random_device{}();
  RecordProperty("seed", std::to_string(seed));
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  const int num_ranks = 4;
  const LocalGroup group(num_ranks);
  LocalGroup::run_threads(num_ranks, [&](int rank) {
    std::mt19937 random(seed + static_cast<unsigned>(rank));
    const auto bootstrap = group.member(rank);
    for (int exchange = 0; exchange < 200; ++exchange) {
      if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
      check_exchange(*bootstrap, static_cast<std::size_t>(exchange * 37 % 9000), exchange);
    }
  });
}

TEST(BootstrapLocal, SeveralBootstrapsOfARankGoOnInStep) {
  const LocalGroup group(3);
  LocalGroup::run_threads(3, [&](int rank) {
    const auto first = group.member(rank);
    check_exchange(*first, 100, 1);
    const auto second = group.member(rank);
    check_exchange(*second, 5000, 2);
    check_exchange(*first, 10, 3);
    check_exchange(*second, 10, 4);
  });
}

TEST(BootstrapLocal, TimeoutNamesTheMissingRanks) {
  const LocalGroup group(4);
  std::array<Error, 2> errors = {Error(ErrorCode::kInternal, ""), Error(ErrorCode::kInternal, "")};
  const auto start = Clock::now();
  LocalGroup::run_threads(2, [&](int index) {
    const auto bootstrap = group.member(2 * index);  // ranks 0 and 2 come, 1 and 3 do not
    errors[static_cast<std::size_t>(index)] = thrown([&] { gather_int(*bootstrap, 1, in(150ms)); });
  });
  EXPECT_GE(since(start), 150ms);
  EXPECT_LT(since(start), 2s);
  for (const Error& error : errors) {
    EXPECT_EQ(error.code, ErrorCode::kTimeout);
    EXPECT_THAT(error.peers, ElementsAre(1, 3));
    EXPECT_THAT(error.what(), HasSubstr("ranks 1, 3 did not come"));
    EXPECT_GE(error.elapsed_ns, 150'000'000U);
  }
  EXPECT_EQ(errors[1].rank, 2);
}

TEST(BootstrapLocal, APastDeadlineStillSucceedsWhenAllAreThere) {
  const LocalGroup group(2);
  const auto late = group.member(1);
  LocalGroup::run_threads(2, [&](int rank) {
    if (rank == 0) {
      const auto bootstrap = group.member(0);
      EXPECT_EQ(gather_int(*bootstrap, 1, in(20s)), 3);
    } else {
      std::this_thread::sleep_for(50ms);
      EXPECT_EQ(gather_int(*late, 2, in(-1s)), 3);
    }
  });
}

// Rank 1 is late: rank 0 has given up once. Both then begin anew, and no post of the first attempt is taken for new.
TEST(BootstrapLocal, AfterATimeoutTheNextExchangeTakesNothingOld) {
  const LocalGroup group(2);
  std::atomic<bool> failed = false;
  LocalGroup::run_threads(2, [&](int rank) {
    const auto bootstrap = group.member(rank);
    if (rank == 0) {
      for (int failure = 0; failure < 3; ++failure) {
        EXPECT_EQ(thrown([&] { gather_int(*bootstrap, 100, in(20ms)); }).code, ErrorCode::kTimeout);
      }
      failed = true;
      EXPECT_EQ(gather_int(*bootstrap, 1, in(20s)), 3);
    } else {
      while (!failed) std::this_thread::yield();
      EXPECT_EQ(gather_int(*bootstrap, 2, in(20s)), 3);
    }
    check_exchange(*bootstrap, 9000, 5);
  });
}

TEST(BootstrapLocal, ARankThatBeganAnewAbortsTheOthers) {
  const LocalGroup group(2);
  std::atomic<bool> failed = false;
  LocalGroup::run_threads(2, [&](int rank) {
    auto bootstrap = group.member(rank);
    check_exchange(*bootstrap, 8, 1);
    if (rank == 0) {
      EXPECT_EQ(thrown([&] { gather_int(*bootstrap, 1, in(50ms)); }).code, ErrorCode::kTimeout);
      failed = true;
      EXPECT_EQ(gather_int(*bootstrap, 1, in(20s)), 3);
    } else {
      while (!failed) std::this_thread::yield();
      const Error error = thrown([&] { gather_int(*bootstrap, 2, in(20s)); });
      EXPECT_EQ(error.code, ErrorCode::kAborted);
      EXPECT_THAT(error.peers, ElementsAre(0));
      EXPECT_EQ(gather_int(*bootstrap, 2, in(20s)), 3);
    }
  });
}

TEST(BootstrapLocal, DifferentSizesAreAMismatch) {
  const LocalGroup group(2);
  std::atomic<int> mismatches = 0;
  LocalGroup::run_threads(2, [&](int rank) {
    const auto bootstrap = group.member(rank);
    std::vector<std::byte> mine(rank == 0 ? 8 : 16), all(2 * mine.size());
    const Error error = thrown([&] { bootstrap->all_gather(mine, all, in(300ms)); });
    if (error.code == ErrorCode::kMismatch) ++mismatches;
  });
  EXPECT_GE(mismatches, 1);  // the other one may only see that the first has gone
}

TEST(BootstrapLocal, TwoThreadsThatActAsOneRankAreFound) {
  const LocalGroup group(2);
  std::array<Error, 2> errors = {Error(ErrorCode::kInternal, ""), Error(ErrorCode::kInternal, "")};
  LocalGroup::run_threads(2, [&](int index) {
    const auto bootstrap = group.member(0);  // rank 1 never comes
    errors[static_cast<std::size_t>(index)] = thrown([&] { gather_int(*bootstrap, 1, in(5s)); });
  });
  for (const Error& error : errors) {
    EXPECT_EQ(error.code, ErrorCode::kMismatch) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("act as rank 0"));
  }
}

TEST(BootstrapLocal, SurvivorsFormAGroupWhileOthersAreStuckInTheOldOne) {
  const LocalGroup group(4);
  std::atomic<bool> formed = false;
  LocalGroup::run_threads(4, [&](int rank) {
    if (rank == 1) {  // stays in the old group
      const auto old = group.member(1);
      const Error error = thrown([&] { gather_int(*old, 1, in(400ms)); });
      EXPECT_EQ(error.code, ErrorCode::kTimeout);
      EXPECT_TRUE(formed);
      return;
    }
    const std::vector<int> gone = {1};
    const auto rest = group.member_without(rank, gone);
    EXPECT_EQ(rest->num_ranks(), 3);
    EXPECT_EQ(rest->rank(), rank == 0 ? 0 : rank - 1);
    check_exchange(*rest, 6000, 1);
    const std::vector<int> more = {3, 1};
    if (rank == 3) return;
    const auto two = group.member_without(rank, more);
    EXPECT_EQ(two->num_ranks(), 2);
    check_exchange(*two, 6000, 2);
    formed = true;
  });
}

// Rank 2 leaves the pair alone: a fast pair must not overwrite what rank 2 has still to read.
TEST(BootstrapLocal, ASubgroupDoesNotDisturbTheSlowReadersOfAnother) {
  const LocalGroup group(3);
  LocalGroup::run_threads(3, [&](int rank) {
    const std::vector<int> gone = {2};
    const auto all = group.member(rank);
    const auto pair = rank < 2 ? group.member_without(rank, gone) : nullptr;
    for (int repeat = 0; repeat < 200; ++repeat) {
      check_exchange(*all, 9000, repeat);
      for (int more = 0; pair != nullptr && more < repeat % 4; ++more) check_exchange(*pair, 9000, more);
    }
  });
}

TEST(BootstrapLocal, BadArgumentsAreNamed) {
  EXPECT_EQ(thrown([] { LocalGroup{0}; }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([] { LocalGroup{-1}; }).code, ErrorCode::kArgument);
  EXPECT_THAT(thrown([] { LocalGroup{1025}; }).what(), HasSubstr("1024"));
  const LocalGroup group(4);
  EXPECT_THAT(thrown([&] { group.member(4); }).what(), HasSubstr("0..3"));
  EXPECT_EQ(thrown([&] { group.member(-1); }).argument, "rank");
  const std::vector<int> self = {2}, outside = {7};
  EXPECT_EQ(thrown([&] { group.member_without(2, self); }).argument, "gone");
  EXPECT_EQ(thrown([&] { group.member_without(2, outside); }).got, "7");
  const auto bootstrap = group.member(0);
  std::vector<std::byte> mine(4), all(15);
  EXPECT_EQ(thrown([&] { bootstrap->all_gather(mine, all, in(1s)); }).code, ErrorCode::kArgument);
}

TEST(BootstrapLocal, AMovedGroupWorksAndTheOldObjectSaysSo) {
  LocalGroup old(2);
  const LocalGroup group = std::move(old);
  EXPECT_EQ(group.num_ranks(), 2);
  EXPECT_EQ(thrown([&] { old.member(0); }).code, ErrorCode::kState);  // NOLINT: the state after a move is the claim
}

TEST(BootstrapLocal, ThreadsRethrowTheLowestRanksException) {
  try {
    LocalGroup::run_threads(4, [](int rank) {
      if (rank >= 2) throw std::runtime_error("rank " + std::to_string(rank));
    });
    ADD_FAILURE() << "nothing was thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "rank 2");
  }
}

TEST(BootstrapLocal, GroupsLeaveNothingBehind) {
  const auto round = [] {
    const LocalGroup group(3);
    LocalGroup::run_threads(3, [&](int rank) { check_exchange(*group.member(rank), 100, 0); });
  };
  round();
  const Holdings before;
  for (int repeat = 0; repeat < 100; ++repeat) round();
  EXPECT_EQ(Holdings(), before);
}

TEST(BootstrapCallback, PassesBytesToTheCallersFunction) {
  CallbackBootstrap bootstrap(1, 3, [](std::span<const std::byte> mine, std::span<std::byte> all) {
    for (std::size_t rank = 0; rank < 3; ++rank) std::memcpy(all.data() + rank * mine.size(), mine.data(), mine.size());
  });
  EXPECT_EQ(bootstrap.rank(), 1);
  EXPECT_EQ(gather_int(bootstrap, 7, in(1s)), 21);
  std::vector<std::byte> mine(4), all(11);
  EXPECT_EQ(thrown([&] { bootstrap.all_gather(mine, all, in(1s)); }).code, ErrorCode::kArgument);
}

TEST(BootstrapCallback, BadArgumentsAreNamed) {
  const auto nothing = [](std::span<const std::byte>, std::span<std::byte>) {};
  EXPECT_THAT(thrown([&] { CallbackBootstrap(4, 4, nothing); }).what(), HasSubstr("0..3"));
  EXPECT_EQ(thrown([&] { CallbackBootstrap(0, 0, nothing); }).code, ErrorCode::kArgument);
  EXPECT_EQ(thrown([&] { CallbackBootstrap(0, 1, nullptr); }).argument, "all_gather");
}

}  // namespace
}  // namespace anyep
