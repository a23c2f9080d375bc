// Dispatches that the host launches before it knows the number of rows: room, refusals, captures.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gpu_ranks.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

constexpr std::uint16_t kUntouched = 0xABAB;

class GpuFresh : public GpuRanks {
 protected:
  static Shape rows_shape() {
    Shape shape;
    shape.hidden = GpuRank::kHidden;
    return shape;
  }
  static void fill(GpuRank& me, const TensorView& x) {
    must(cudaMemsetAsync(x.data, kUntouched & 0xFF, static_cast<std::size_t>(x.num_elements()) * 2, me.stream()));
  }
  /// Is every element of rows first.. as fill() left it?
  static bool untouched(GpuRank& me, const TensorView& x, std::int64_t first) {
    std::vector<std::uint16_t> rest(static_cast<std::size_t>((x.shape[0] - first) * x.shape[1]));
    must(cudaMemcpyAsync(rest.data(), x.as<std::uint16_t>() + first * x.shape[1], rest.size() * 2,
                         cudaMemcpyDeviceToHost, me.stream()));
    must(cudaStreamSynchronize(me.stream()));
    return std::all_of(rest.begin(), rest.end(), [](std::uint16_t element) { return element == kUntouched; });
  }
};

// Some ranks in one call and some in two, call after call, without a wait for the end in between.
TEST_P(GpuFresh, RanksDifferInTheirCalls) {
  with_ranks([](GpuRank& me, int rank) {
    for (int call = 0; call < 60; ++call) {
      if ((call + rank) % 3 == 0) {
        me.launch();
      } else {
        me.launch_fresh();
      }
      if (call % 10 == 9) {
        EXPECT_EQ(me.finish(), "") << "call " << call;
      }
    }
    me.engine().close();
  });
}

// The room that was not needed is there for others as soon as the call returns: the next call's rows lie right behind.
TEST_P(GpuFresh, UnusedRoomComesBackAtOnce) {
  with_ranks([](GpuRank& me, int) {
    const Fresh one = me.dispatch_fresh(), next = me.dispatch_fresh();
    const TensorView x = one.rows.view().x, behind = next.rows.view().x;
    EXPECT_EQ(x.shape[0], one.handle.num_rows());
    EXPECT_LE(x.shape[0], me.engine().rows_ahead(GpuRank::kTokens));
    EXPECT_EQ(behind.as<std::byte>() - x.as<std::byte>(), x.num_elements() * 2);  // rows of 4 KiB end where blocks do
    next.event.wait();
    EXPECT_EQ(me.exchange(), "");
    me.engine().close();
  });
}

// Rows that the caller means to be enough, and that are not: the surplus is dropped, nothing is written behind them, and the
// event says so.
TEST_P(GpuFresh, ASurplusIsDroppedAndNamed) {
  with_ranks([](GpuRank& me, int) {
    const OwnedRows rows = me.engine().make_rows(GpuRank::kTokens, rows_shape());
    const TensorView whole = rows.view().x;
    fill(me, whole);
    Rows few;
    few.x = whole;
    few.x.shape[0] = 10;
    const Fresh fresh = me.dispatch_into(few, Surplus::kDropped);
    EXPECT_TRUE(fresh.dispatched);
    try {
      fresh.event.wait();
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kCapacity);
      EXPECT_EQ(error.have, 10u);
      EXPECT_EQ(error.need, static_cast<std::uint64_t>(fresh.handle.num_rows()));
    }
    EXPECT_TRUE(untouched(me, whole, 10));
    EXPECT_EQ(me.exchange(), "");
    me.engine().close();
  });
}

// A guess that was too small moves nothing; a dispatch with room does its work, and it was one call to the peers.
TEST_P(GpuFresh, TooLittleRoomMovesNothing) {
  with_ranks([](GpuRank& me, int rank) {
    for (int call = 0; call < 6; ++call) {
      const OwnedRows rows = me.engine().make_rows(10, rows_shape());
      fill(me, rows.view().x);
      Rows few;
      few.x = rows.view().x;
      if ((call + rank) % 2 != 0) {  // the peers see no difference
        me.launch();
        EXPECT_EQ(me.finish(), "");
        continue;
      }
      Fresh fresh = me.dispatch_into(few, Surplus::kMovesLater);
      EXPECT_FALSE(fresh.dispatched);
      EXPECT_TRUE(untouched(me, rows.view().x, 0));
      me.launch_with(std::move(fresh.handle));
      EXPECT_EQ(me.finish(), "");
    }
    me.engine().close();
  });
}

// Rows are asked for in mid-call, when the counts are on their way: they come or do not. The dispatches that follow find their own
// places, not those of a route that none was behind.
TEST_P(GpuFresh, RowsAreMadeWhileTheCountsAreOnTheirWay) {
  with_ranks([](GpuRank& me, int rank) {
    for (int call = 0; call < 12; ++call) {
      if ((call + rank) % 2 != 0) {  // the peers see no difference
        Fresh fresh = me.dispatch_into([] { return Rows(); });
        EXPECT_FALSE(fresh.dispatched);
        me.launch_with(std::move(fresh.handle));
        EXPECT_EQ(me.finish(), "");
      } else {
        OwnedRows rows;
        Fresh fresh = me.dispatch_into([&] {
          rows = me.engine().make_rows_ahead(me.engine().rows_ahead(GpuRank::kTokens), rows_shape());
          Rows out;
          out.x = rows.view().x;
          return out;
        });
        EXPECT_TRUE(fresh.dispatched);
        EXPECT_EQ(me.exchange_back(std::move(fresh.handle), rows.view().x), "") << "call " << call;
      }
      me.launch_fresh();
      EXPECT_EQ(me.finish(), "");
    }
    me.engine().close();
  });
}

TEST_P(GpuFresh, ACaptureCannotWaitForNumbers) {
  with_ranks([](GpuRank& me, int) {
    me.take_worst_case_rows();
    Rows out;
    out.x = me.worst_case_rows().view().x;
    must(cudaStreamBeginCapture(me.stream(), cudaStreamCaptureModeThreadLocal));
    try {
      (void)me.dispatch_into(out, Surplus::kMovesLater);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code, ErrorCode::kUnsupported);
      EXPECT_THAT(error.what(), testing::HasSubstr("surplus"));
    }
    cudaGraph_t graph = nullptr;
    must(cudaStreamEndCapture(me.stream(), &graph));
    must(cudaGraphDestroy(graph));
    EXPECT_EQ(me.exchange(), "");  // every rank has refused the same call
    me.engine().close();
  });
}

using GpuFreshOfPeers = GpuRanks;

// A rank that refuses its route is named at once by peers whose dispatch is behind theirs already.
TEST_P(GpuFreshOfPeers, ARefusedRouteIsNamedAtOnce) {
  with_ranks([](GpuRank& me, int rank) {
    if (rank == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));  // the others are waiting
      me.engine().refuse(Op::kRoute, "the test says so");
      std::this_thread::sleep_for(kLimit / 4);  // alive: its end would tell them too
    } else {
      const auto begin = std::chrono::steady_clock::now();
      try {
        me.launch_fresh();
        (void)me.finish();
        ADD_FAILURE() << "no error";
      } catch (const Error& error) {
        EXPECT_EQ(error.code, ErrorCode::kAborted);
        EXPECT_THAT(error.what(), testing::HasSubstr("the test says so"));
      }
      EXPECT_LT(std::chrono::steady_clock::now() - begin, kLimit / 2);
      EXPECT_TRUE(me.computes());
    }
  });
}

// Who makes the rows may fail: the call does, and the peers hear why.
TEST_P(GpuFreshOfPeers, AnErrorOfWhoMakesRowsIsNamedToo) {
  with_ranks([](GpuRank& me, int rank) {
    try {
      if (rank == 0) {
        (void)me.dispatch_into([]() -> Rows { throw Error(ErrorCode::kCapacity, "no rows, says the test"); });
      } else {
        me.launch_fresh();
        (void)me.finish();
      }
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code, rank == 0 ? ErrorCode::kCapacity : ErrorCode::kAborted);
      EXPECT_THAT(error.what(), testing::HasSubstr("no rows, says the test"));
    }
    EXPECT_TRUE(me.computes());
    std::this_thread::sleep_for(kLimit / 4);  // alive: its end would tell them too
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuFresh, testing::Values(1, 2, 4), testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(Ranks, GpuFreshOfPeers, testing::Values(2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
