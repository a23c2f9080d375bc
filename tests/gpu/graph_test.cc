// Captured and replayed graphs of high throughput: inputs that change between replays, several graphs, eager calls in between.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "gpu_ranks.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

class GpuGraph : public GpuRanks {
 protected:
  template <class Body>
  static void with_ranks(const Body& body) {
    GpuRanks::with_ranks([&](GpuRank& me, int) {
      body(me);
      must(cudaStreamSynchronize(me.stream()));
      me.engine().close();
    });
  }
};

TEST_P(GpuGraph, ReplaysFollowTheirInputs) {
  with_ranks([](GpuRank& me) {
    EXPECT_EQ(me.exchange(), "");
    me.take_worst_case_rows();
    const StreamGraph graph(me.stream(), [&] { me.launch_without_host(); });
    for (unsigned replay = 0; replay < 20; ++replay) {
      me.change_inputs(replay);
      graph.replay();
      EXPECT_EQ(me.compare(), "") << "replay " << replay;
    }
    for (int replay = 0; replay < 50; ++replay) graph.replay();  // no host between them
    EXPECT_EQ(me.compare(), "");
  });
}

TEST_P(GpuGraph, SeveralGraphsAndEagerCallsTakeTurns) {
  with_ranks([](GpuRank& me) {
    me.take_worst_case_rows();
    const auto body = [&] { me.launch_without_host(); };
    const StreamGraph one(me.stream(), body), two(me.stream(), body);
    for (unsigned round = 0; round < 6; ++round) {
      me.change_inputs(round);
      one.replay();
      two.replay();
      one.replay();
      EXPECT_EQ(me.compare(), "");
      EXPECT_EQ(me.exchange(), "");
      two.replay();
      must(cudaStreamSynchronize(me.stream()));
    }
  });
}

// Captured as one; eager ones, launched early where a rank has its GPU alone, take turns with the replays.
TEST_P(GpuGraph, RouteAndDispatchAsOne) {
  with_ranks([](GpuRank& me) {
    me.take_worst_case_rows();
    const StreamGraph graph(me.stream(), [&] { me.launch_without_host(GpuRank::Together::kYes); });
    const StreamGraph apart(me.stream(), [&] { me.launch_without_host(); });
    for (unsigned round = 0; round < 10; ++round) {
      me.change_inputs(round);
      graph.replay();
      apart.replay();
      graph.replay();
      EXPECT_EQ(me.compare(), "") << "round " << round;
      me.launch_fresh();
      EXPECT_EQ(me.finish(), "") << "round " << round;
      me.launch_without_host(GpuRank::Together::kYes);
      EXPECT_EQ(me.compare(), "") << "round " << round;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuGraph, testing::Values(1, 2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
