// Low-latency pairs of random shapes by the hundred thousand, most of them in replayed graphs, checked on the device bit for bit.
// ANYEP_SOAK multiplies their number: 50 makes a million, with 2 and with 4 ranks. Every life of an engine goes through the wrap of
// its epochs and the turns behind it in which words and packets are cleared (decision 0006).
#include <anyep/bootstrap.h>
#include <anyep/engine.h>
#include <anyep/plan.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "company.h"
#include "low_latency_draw.h"
#include "low_latency_rank.h"
#include "protocol/word.h"
#include "support/mirror.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

constexpr int kPairsPerGraph = 50, kGraphs = 8, kEagerPairs = 64;
constexpr int kReplaysPerEagerPair = 2, kReplaysPerLook = 64;
constexpr std::int64_t kPairs = 10'000, kMostPairsPerLife = 50'000;

/// What one life of an engine does: every rank draws the same.
struct Life {
  std::vector<PairDraw> captured, eager;
  std::int64_t low_latency_bytes = 0;

  std::vector<PairDraw> pairs() const {
    std::vector<PairDraw> all = captured;
    all.insert(all.end(), eager.begin(), eager.end());
    return all;
  }

  Life(int num_ranks, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    DrawLimits limits;
    limits.num_ranks = num_ranks;
    const auto draw = [&] {
      PairDraw pair = draw_pair(random, limits);
      low_latency_bytes = std::max(low_latency_bytes, low_latency_bytes_for(pair.shape(), num_ranks));
      return pair;
    };
    for (int i = 0; i < kGraphs * kPairsPerGraph; ++i) captured.push_back(draw());
    for (int i = 0; i < kEagerPairs; ++i) eager.push_back(draw());
  }
};

class GpuLowLatencySoak : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  }
  struct Totals {
    std::int64_t pairs = 0, graph_pairs = 0;
    unsigned long long rows = 0, tokens = 0;
  };

  /// One thread per rank, each with an engine.
  template <class Body>
  static void with_ranks(int ranks, const Life& life, const Body& body) {
    with_threads(ranks, [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
      LowLatencyRank me(bootstrap, num_gpus(), life.pairs(), life.low_latency_bytes);
      body(me, rank, all);
      all.arrive_and_wait();
      me.engine().close();
      all.arrive_and_wait();  // memory is given back when nobody waits
    });
  }

  /// Pairs until there are `wanted`, the same on every rank.
  static Totals live(LowLatencyRank& me, const Life& life, std::int64_t wanted, std::barrier<>& all,
                     std::uint64_t seed) {
    std::vector<std::unique_ptr<StreamGraph>> graphs;
    for (int graph = 0; graph < kGraphs; ++graph) {
      graphs.push_back(me.capture(life.captured.data() + graph * kPairsPerGraph, kPairsPerGraph));
    }
    all.arrive_and_wait();  // graphs are made while no kernel waits
    std::mt19937_64 random(seed);
    Totals totals;
    std::size_t next_eager = 0;
    for (int launch = 0; totals.pairs < wanted; ++launch) {
      // In turn at first, so that each has run when the epochs wrap.
      graphs[launch < 2 * kGraphs ? static_cast<std::size_t>(launch) % kGraphs : random() % kGraphs]->replay();
      totals.pairs += kPairsPerGraph;
      totals.graph_pairs += kPairsPerGraph;
      if (launch % kReplaysPerEagerPair == 0) {
        totals.pairs += me.put(&life.eager[next_eager], 1);
        next_eager = (next_eager + 1) % life.eager.size();
      }
      if (launch % kReplaysPerLook != 0) continue;
      if (const Findings found = me.look(); found.wrong != 0) break;
    }
    const Findings found = me.look();
    EXPECT_EQ(found.wrong, 0u) << text_of(found);
    if (found.wrong == 0) {
      EXPECT_EQ(found.pairs, static_cast<unsigned long long>(totals.pairs));
    }
    totals.rows = found.rows;
    totals.tokens = found.tokens;
    return totals;
  }

  /// The epoch after so many turns of a new engine, and whether the turns that clear are behind it.
  static bool is_past_the_wrap(std::int64_t turns) {
    std::uint32_t epoch = protocol::kFirstEpoch;
    for (std::int64_t i = 0; i < turns; ++i) {
      const std::uint32_t next = protocol::next_epoch(epoch);
      if (next < epoch) return turns - i > 2 * 4 * 2;  // both ops of a pair, four regions, once more
      epoch = next;
    }
    return false;
  }
};

TEST_P(GpuLowLatencySoak, RandomPairsThroughTheWrap) {
  const int ranks = GetParam();
  const char* const soak = std::getenv("ANYEP_SOAK");
  const auto wanted =
      static_cast<std::int64_t>(static_cast<double>(kPairs) * (soak == nullptr ? 1.0 : std::stod(soak)));
  const std::int64_t lives = std::max<std::int64_t>(2, (wanted + kMostPairsPerLife - 1) / kMostPairsPerLife);
  Totals sum;
  for (std::int64_t i = 0; i < lives; ++i) {
    const auto seed = static_cast<std::uint64_t>(i * 16 + ranks);
    const Life life(ranks, seed);
    std::vector<Totals> totals(static_cast<std::size_t>(ranks));
    with_ranks(ranks, life, [&](LowLatencyRank& me, int rank, std::barrier<>& all) {
      totals[static_cast<std::size_t>(rank)] = live(me, life, std::max<std::int64_t>(wanted / lives, 1000), all, seed);
    });
    if (HasFailure()) break;
    EXPECT_TRUE(is_past_the_wrap(2 * totals[0].pairs)) << totals[0].pairs << " pairs end before the wrap";
    EXPECT_GE(totals[0].graph_pairs, totals[0].pairs * 9 / 10);
    for (const Totals& one : totals) {
      sum.rows += one.rows;
      sum.tokens += one.tokens;
    }
    sum.pairs += totals[0].pairs;
    sum.graph_pairs += totals[0].graph_pairs;
  }
  EXPECT_GT(sum.rows, static_cast<unsigned long long>(sum.pairs));
  std::printf(
      "  %lld pairs on %d ranks, %lld in graphs, %llu rows and %llu tokens checked; %lld engines, each through the "
      "wrap\n",
      static_cast<long long>(sum.pairs), ranks, static_cast<long long>(sum.graph_pairs), sum.rows, sum.tokens,
      static_cast<long long>(lives));
}

// Every kind of field, in pairs that have rows everywhere.
TEST_P(GpuLowLatencySoak, TheCheckerSeesOneWrongBit) {
  const int ranks = GetParam();
  Life life(ranks, 99);
  PairDraw pair;
  pair.call.num_ranks = ranks;
  pair.call.num_experts = ranks;
  pair.call.top_k = ranks;
  pair.call.hidden = 640;
  pair.call.max_tokens = 40;
  pair.call.wire = Wire::kFP8;
  for (int rank = 0; rank < ranks; ++rank) pair.call.tokens[rank] = 40;
  life.captured = {};
  life.eager = {pair};
  life.low_latency_bytes = low_latency_bytes_for(pair.shape(), ranks);
  with_ranks(ranks, life, [&](LowLatencyRank& me, int, std::barrier<>&) {
    EXPECT_EQ(me.put(&pair, 1), 1);
    unsigned long long before = me.look().wrong;
    EXPECT_EQ(before, 0u);
    for (const Field field : {Field::kCounts, Field::kRange, Field::kSource, Field::kRow, Field::kScale, Field::kOut}) {
      me.put_damaged(pair, field);
      const unsigned long long now = me.look().wrong;
      EXPECT_EQ(now, before + 1) << "field " << static_cast<int>(field);
      before = now;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuLowLatencySoak, testing::Values(2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
