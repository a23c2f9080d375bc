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
#include <exception>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "low_latency_draw.h"
#include "low_latency_pair_kernels.h"
#include "protocol/word.h"
#include "stream_graph.h"
#include "support/mirror.h"

namespace anyep::test {
namespace {

constexpr int kPairsPerGraph = 50, kGraphs = 8, kEagerPairs = 64;
constexpr int kReplaysPerEagerPair = 2, kReplaysPerLook = 64;
constexpr std::int64_t kPairs = 10'000, kMostPairsPerLife = 50'000;

/// What one life of an engine does: every rank draws the same.
struct Life {
  std::vector<PairDraw> captured, eager;
  std::int64_t low_latency_bytes = 0;

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

/// One rank: its engine, memory for two pairs in flight, the graphs.
class SoakRank {
 public:
  SoakRank(Bootstrap& bootstrap, int num_gpus, const Life& life) {
    Topology topology = Topology::discover(bootstrap);
    topology.device = topology.rank % num_gpus;
    rank_ = topology.rank;
    must(cudaSetDevice(topology.device));
    must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    load_pair_kernels();
    for (const auto* pairs : {&life.captured, &life.eager}) {
      for (const PairDraw& pair : *pairs) bytes_ = std::max(bytes_, PairPlaces(call_of(pair), nullptr).bytes());
    }
    void* memory = nullptr;
    must(cudaMalloc(&memory, kSets * bytes_ + sizeof(Findings) + sizeof(std::uint32_t)));
    base_ = static_cast<std::byte*>(memory);
    must(cudaMemsetAsync(base_, 0xFF, kSets * bytes_, stream_));
    must(cudaMemsetAsync(findings(), 0, sizeof(Findings) + sizeof(std::uint32_t), stream_));
    must(cudaStreamSynchronize(stream_));
    // Last: from here on kernels of other ranks on this GPU may wait for this one, and so would calls that wait for the GPU.
    Budget budget;
    budget.rows_bytes = std::int64_t{8} << 20;
    budget.low_latency_bytes = life.low_latency_bytes;
    Tuning tuning = Tuning::from_environment();
    tuning.timeout = std::chrono::seconds(20);
    engine_.emplace(Engine::create(budget, topology, tuning, bootstrap));
  }
  ~SoakRank() {
    graphs_.clear();
    engine_.reset();
    (void)cudaFree(base_);
    (void)cudaStreamDestroy(stream_);
  }
  SoakRank(const SoakRank&) = delete;
  SoakRank& operator=(const SoakRank&) = delete;

  Engine& engine() { return *engine_; }

  void capture(const std::vector<PairDraw>& pairs) {
    for (int graph = 0; graph < kGraphs; ++graph) {
      graphs_.push_back(std::make_unique<StreamGraph>(stream_, [&] {
        next_replay(replay(), stream_);
        const auto* const first = pairs.data() + graph * kPairsPerGraph;
        for (int i = 0; i < kPairsPerGraph;) i += put(first + i, kPairsPerGraph - i);
      }));
    }
  }
  void replay_graph(int graph) { graphs_[static_cast<std::size_t>(graph)]->replay(); }
  /// One pair by itself, or two in flight together; how many.
  int put(const PairDraw* pairs, int count) {
    const bool both =
        count > 1 && pairs[0].dispatch_hook && pairs[0].combine_hook && pairs[1].dispatch_hook && pairs[1].combine_hook;
    if (both) {
      put_two(pairs[0], pairs[1]);
    } else {
      put_one(pairs[0]);
    }
    return both ? 2 : 1;
  }
  /// What the op before has left is damaged before it is checked, and mended behind.
  void put_damaged(const PairDraw& pair, Field field) {
    const One one = place(pair, 0);
    prepare_pair(one.call, one.memory, stream_);
    std::optional<Pending> pending = dispatch(one);
    receive(pending, one, 2);
    if (field != Field::kOut) damage(one.call, one.memory, field, stream_);
    check_dispatched(one.call, one.memory, stream_);
    const bool checked_only = field == Field::kRow || field == Field::kScale;  // overwritten by the check
    if (field != Field::kOut && !checked_only) damage(one.call, one.memory, field, stream_);
    pending = combine(one);
    receive(pending, one, 3);
    if (field == Field::kOut) damage(one.call, one.memory, field, stream_);
    check_combined(one.call, one.memory, stream_);
  }

  Findings look() {
    Findings found;
    must(cudaMemcpyAsync(&found, findings(), sizeof found, cudaMemcpyDeviceToHost, stream_));
    must(cudaStreamSynchronize(stream_));
    engine_->check();
    return found;
  }

 private:
  static constexpr std::size_t kSets = 2;
  struct One {
    const PairDraw* pair;
    PairCall call;
    PairMemory memory;
  };

  PairCall call_of(const PairDraw& pair) const {
    PairCall call = pair.call;
    call.rank = rank_;
    return call;
  }
  Findings* findings() const { return reinterpret_cast<Findings*>(base_ + kSets * bytes_); }
  std::uint32_t* replay() const { return reinterpret_cast<std::uint32_t*>(base_ + kSets * bytes_ + sizeof(Findings)); }
  One place(const PairDraw& pair, std::size_t set) const {
    One one{&pair, call_of(pair), {}};
    one.memory = PairPlaces(one.call, base_ + set * bytes_).memory();
    one.memory.findings = findings();
    one.memory.replay = replay();
    return one;
  }

  std::optional<Pending> dispatch(const One& one) {
    LowLatencyOptions options;
    options.hook = one.pair->dispatch_hook;
    options.num_sms = one.pair->dispatch_sms;
    options.wire = one.call.wire;
    options.round_scale = one.call.round_scale;
    Routing routing = routing_view(one.call, one.memory);
    routing.weights = {};
    return engine_->low_latency_dispatch(one.pair->shape(), x_view(one.call, one.memory), routing,
                                         slabs_view(one.call, one.memory), {stream_}, options);
  }
  std::optional<Pending> combine(const One& one) {
    LowLatencyOptions options;
    options.hook = one.pair->combine_hook;
    options.num_sms = one.pair->combine_sms;
    return engine_->low_latency_combine(one.pair->shape(), answers_view(one.call, one.memory),
                                        routing_view(one.call, one.memory), out_view(one.call, one.memory), {stream_},
                                        options);
  }
  /// @param place where this rank may be late between a hook's halves
  void receive(std::optional<Pending>& pending, const One& one, std::uint32_t place) {
    if (place == 2 ? one.pair->dispatch_hook : one.pair->combine_hook) linger(one.call, one.memory, place, stream_);
    (void)pending->receive({stream_});
    pending.reset();
  }

  void put_one(const PairDraw& pair) {
    const One one = place(pair, 0);
    prepare_pair(one.call, one.memory, stream_);
    std::optional<Pending> pending = dispatch(one);
    receive(pending, one, 2);
    check_dispatched(one.call, one.memory, stream_);
    pending = combine(one);
    receive(pending, one, 3);
    check_combined(one.call, one.memory, stream_);
  }
  void put_two(const PairDraw& first, const PairDraw& second) {
    const One a = place(first, 0), b = place(second, 1);
    prepare_pair(a.call, a.memory, stream_);
    prepare_pair(b.call, b.memory, stream_);
    std::optional<Pending> of_a = dispatch(a), of_b = dispatch(b);
    receive(of_a, a, 2);
    check_dispatched(a.call, a.memory, stream_);
    of_a = combine(a);
    receive(of_b, b, 2);
    check_dispatched(b.call, b.memory, stream_);
    of_b = combine(b);
    receive(of_a, a, 3);
    check_combined(a.call, a.memory, stream_);
    receive(of_b, b, 3);
    check_combined(b.call, b.memory, stream_);
  }

  int rank_ = 0;
  cudaStream_t stream_ = nullptr;
  std::size_t bytes_ = 0;
  std::byte* base_ = nullptr;
  std::optional<Engine> engine_;
  std::vector<std::unique_ptr<StreamGraph>> graphs_;
};

std::string text_of(const Findings& found) {
  char text[160];
  std::snprintf(text, sizeof text,
                "%llu wrong; first: field %u of the pair with salt %08x, [%d][%d][%d] = %llx, not %llx", found.wrong,
                static_cast<unsigned>(found.field), found.salt, found.at, found.row, found.column, found.got,
                found.want);
  return text;
}

class GpuLowLatencySoak : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  }
  struct Totals {
    std::int64_t pairs = 0, graph_pairs = 0;
    unsigned long long rows = 0, tokens = 0;
  };

  /// One thread per rank, each with an engine. A rank that throws fails the test and holds up nobody at `all`: the others
  /// find it gone.
  template <class Body>
  static void with_ranks(int ranks, const Life& life, const Body& body) {
    const LocalGroup group(ranks);
    std::barrier<> all(ranks);
    LocalGroup::run_threads(ranks, [&](int rank) {
      try {
        const auto bootstrap = group.member(rank);
        SoakRank me(*bootstrap, num_gpus(), life);
        body(me, rank, all);
        all.arrive_and_wait();
        me.engine().close();
        all.arrive_and_wait();  // memory is given back when nobody waits
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
        all.arrive_and_drop();
      }
    });
  }

  /// Pairs until there are `wanted`, the same on every rank.
  static Totals live(SoakRank& me, const Life& life, std::int64_t wanted, std::barrier<>& all, std::uint64_t seed) {
    me.capture(life.captured);
    all.arrive_and_wait();  // graphs are made while no kernel waits
    std::mt19937_64 random(seed);
    Totals totals;
    std::size_t next_eager = 0;
    for (int launch = 0; totals.pairs < wanted; ++launch) {
      // In turn at first, so that each has run when the epochs wrap.
      me.replay_graph(launch < 2 * kGraphs ? launch % kGraphs : static_cast<int>(random() % kGraphs));
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
    with_ranks(ranks, life, [&](SoakRank& me, int rank, std::barrier<>& all) {
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
  with_ranks(ranks, life, [&](SoakRank& me, int, std::barrier<>&) {
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
