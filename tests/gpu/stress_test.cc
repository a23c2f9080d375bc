// Exchanges of random shapes, most of them in replayed graphs, checked on the device bit for bit. ANYEP_SOAK multiplies their
// number: 10 makes a hundred thousand operations with each number of ranks.
//
// Eager exchanges wait on the host, for counts and in combine, so that it and the GPU take turns: those are the fewer.
#include <anyep/bootstrap.h>
#include <anyep/engine.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "company.h"
#include "exchange_draw.h"
#include "exchange_kernels.h"
#include "replay.h"
#include "support/mirror.h"
#include "support/stream_graph.h"

namespace anyep::test {
namespace {

constexpr std::int64_t kOperations = 10'000;
constexpr int kGraphs = 8, kExchangesPerGraph = 20, kReplaysPerLook = 16;

template <class T>
T* device_array(std::size_t count) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, count * sizeof(T)));
  return static_cast<T*>(memory);
}

class StressRank {
 public:
  StressRank(Bootstrap& bootstrap, int num_gpus) {
    Topology topology = Topology::discover(bootstrap);
    topology.device = topology.rank % num_gpus;
    must(cudaSetDevice(topology.device));
    must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    constexpr std::size_t kMostElements = std::size_t{Exchange::kMostTokens} * ExchangeDraw::kMostHidden;
    memory_.ids = device_array<std::int64_t>(Exchange::kMostTokens * ExchangeDraw::kMostTopK);
    memory_.x = device_array<std::uint16_t>(kMostElements);
    memory_.out = device_array<std::uint16_t>(kMostElements);
    copy_ = device_array<std::uint16_t>(kMostElements * Exchange::kMaxRanks);
    memory_.findings = device_array<Findings>(1);
    replay_ = device_array<std::uint32_t>(1);
    memory_.replay = replay_;
    must(cudaMemsetAsync(memory_.findings, 0, sizeof(Findings), stream_));
    must(cudaMemsetAsync(replay_, 0, sizeof *replay_, stream_));
    must(cudaStreamSynchronize(stream_));
    load_exchange_kernels();
    load_replay_kernel();
    // Last: from here on kernels of other ranks on this GPU may wait for this one, and so would calls that wait for the GPU.
    Budget budget;
    budget.rows_bytes = std::int64_t{96} << 20;
    Tuning tuning = Tuning::from_environment();
    tuning.timeout = std::chrono::seconds(20);
    engine_.emplace_back(Engine::create(budget, topology, tuning, bootstrap));
  }
  ~StressRank() {
    handles_.clear();
    captured_rows_ = OwnedRows();
    engine_.clear();
    for (void* memory :
         {static_cast<void*>(memory_.ids), static_cast<void*>(memory_.x), static_cast<void*>(copy_),
          static_cast<void*>(memory_.out), static_cast<void*>(memory_.findings), static_cast<void*>(replay_)}) {
      (void)cudaFree(memory);
    }
    (void)cudaStreamDestroy(stream_);
  }
  StressRank(const StressRank&) = delete;
  StressRank& operator=(const StressRank&) = delete;

  Engine& engine() { return engine_.front(); }
  ExchangeDraw draw(std::uint64_t seed) { return draw_exchange(seed, engine().num_ranks(), engine().rank()); }

  enum class Damage { kNone, kRows, kSums };
  void exchange(const ExchangeDraw& draw, Damage planted) {
    const Handle handle = route(draw);
    const std::int64_t rows = draw.worst_case ? draw.most_rows() : handle.num_rows();
    for (int round = 0; round < (draw.again ? 2 : 1); ++round) {
      const OwnedRows received = engine().make_rows(rows, Shape{draw.e.num_experts, 0, draw.e.hidden});
      there_and_back(draw, handle, received.view().x, planted);
    }
  }

  /// Graphs bring something else in every replay, into rows that they share.
  std::unique_ptr<StreamGraph> capture(const std::vector<ExchangeDraw>& draws) {
    if (captured_rows_.num_rows() == 0) {
      captured_rows_ =
          engine().make_rows(Exchange::kMostTokens * engine().num_ranks(), Shape{1, 0, ExchangeDraw::kMostHidden});
    }
    return std::make_unique<StreamGraph>(stream_, [&] {
      next_replay(replay_, stream_);
      for (const ExchangeDraw& draw : draws) {
        handles_.push_back(route(draw));
        const TensorView rows =
            TensorView::dense(captured_rows_.view().x.data, DType::kBF16, {draw.most_rows(), draw.e.hidden});
        for (int round = 0; round < (draw.again ? 2 : 1); ++round) {
          there_and_back(draw, handles_.back(), rows, Damage::kNone);
        }
      }
    });
  }

  Findings look() {
    finish(stream_);
    Findings found;
    must(cudaMemcpyAsync(&found, memory_.findings, sizeof found, cudaMemcpyDeviceToHost, stream_));
    finish(stream_);
    engine().check();
    return found;
  }

 private:
  static Options options_of(const ExchangeDraw& draw) {
    Options options;
    options.num_sms = draw.num_sms;
    return options;
  }
  TensorView of_tokens(const ExchangeDraw& draw, std::uint16_t* data) const {
    return TensorView::dense(data, DType::kBF16, {draw.e.tokens[draw.e.rank], draw.e.hidden});
  }

  Handle route(const ExchangeDraw& draw) {
    prepare_exchange(draw.e, memory_, stream_);
    Routing routing;
    routing.experts = TensorView::dense(memory_.ids, DType::kI64, {draw.e.tokens[draw.e.rank], draw.e.top_k});
    return engine().route(Shape{draw.e.num_experts, draw.e.top_k}, routing, {stream_}, options_of(draw));
  }

  void there_and_back(const ExchangeDraw& draw, const Handle& handle, const TensorView& rows, Damage planted) {
    const auto bytes = static_cast<std::size_t>(rows.num_elements()) * 2;
    Rows in, received, sums;
    in.x = of_tokens(draw, memory_.x);
    received.x = rows;
    sums.x = of_tokens(draw, memory_.out);
    if (bytes > 0) must(cudaMemsetAsync(rows.data, 0xFF, bytes, stream_));
    (void)engine().dispatch(in, handle, received, {stream_}, options_of(draw));
    ExchangeMemory memory = memory_;
    memory.rows = rows.as<std::uint16_t>();
    memory.rows_until = handle.rows_until().as<std::int32_t>();
    memory.source = handle.source().as<std::int32_t>();
    if (planted == Damage::kRows && handle.num_rows() > 0) damage(memory.rows, stream_);
    check_received(draw.e, memory, stream_);
    CombineInput back;
    back.x = rows;
    if (!draw.gathers) {
      if (bytes > 0) must(cudaMemcpyAsync(copy_, rows.data, bytes, cudaMemcpyDeviceToDevice, stream_));
      back.x.data = copy_;
    }
    const auto sum_bytes = static_cast<std::size_t>(sums.x.num_elements()) * 2;
    if (sum_bytes > 0) must(cudaMemsetAsync(memory_.out, 0xFF, sum_bytes, stream_));
    (void)engine().combine(back, handle, sums, {stream_}, options_of(draw));
    if (planted == Damage::kSums && sums.x.num_elements() > 0) damage(memory_.out, stream_);
    if (planted != Damage::kRows) check_sums(draw.e, memory, stream_);
  }

  std::vector<Engine> engine_;
  cudaStream_t stream_ = nullptr;
  ExchangeMemory memory_;
  std::uint16_t* copy_ = nullptr;
  std::uint32_t* replay_ = nullptr;
  OwnedRows captured_rows_;
  std::vector<Handle> handles_;  ///< of graphs
};

class GpuStress : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  }

  /// Operations until there are `wanted`, the same on every rank.
  static std::int64_t run(StressRank& me, std::barrier<>& all, std::int64_t wanted) {
    std::vector<std::unique_ptr<StreamGraph>> graphs;
    std::vector<std::int64_t> in_graph;
    std::uint64_t seed = 0;
    for (int graph = 0; graph < kGraphs; ++graph) {
      std::vector<ExchangeDraw> draws;
      for (int i = 0; i < kExchangesPerGraph; ++i) draws.push_back(me.draw(++seed));
      std::int64_t operations = 0;
      for (const ExchangeDraw& draw : draws) operations += draw.operations();
      in_graph.push_back(operations);
      graphs.push_back(me.capture(draws));
    }
    all.arrive_and_wait();  // graphs are made while no kernel waits
    std::int64_t operations = 0;
    for (int launch = 0; operations < wanted; ++launch) {
      const auto graph = static_cast<std::size_t>(launch) % kGraphs;
      graphs[graph]->replay();
      const ExchangeDraw eager = me.draw(++seed);
      me.exchange(eager, StressRank::Damage::kNone);
      operations += in_graph[graph] + eager.operations();
      if (launch % kReplaysPerLook == 0 && me.look().wrong != 0) break;
    }
    const Findings found = me.look();
    EXPECT_EQ(found.wrong, 0u) << text_of(found);
    EXPECT_GT(found.rows, 0u);
    return operations;
  }
};

TEST_P(GpuStress, RandomShapesBackToBack) {
  const char* const soak = std::getenv("ANYEP_SOAK");
  const auto wanted =
      static_cast<std::int64_t>(static_cast<double>(kOperations) * (soak == nullptr ? 1.0 : std::stod(soak)));
  std::int64_t operations = 0;
  const auto begin = std::chrono::steady_clock::now();
  with_threads(GetParam(), [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
    StressRank me(bootstrap, num_gpus());
    const std::int64_t mine = run(me, all, wanted);
    if (rank == 0) operations = mine;
    all.arrive_and_wait();
    me.engine().close();
    all.arrive_and_wait();
  });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_GE(operations, wanted);
  std::printf("  %lld operations of each of %d ranks in %.1f s\n", static_cast<long long>(operations), GetParam(),
              seconds);
}

TEST_P(GpuStress, TheCheckerSeesOneWrongElement) {
  with_threads(GetParam(), [&](Bootstrap& bootstrap, int rank, std::barrier<>& all) {
    StressRank me(bootstrap, num_gpus());
    unsigned long long before = 0;
    for (const auto planted : {StressRank::Damage::kRows, StressRank::Damage::kSums}) {
      for (std::uint64_t i = 1; i <= 8; ++i) me.exchange(me.draw(i), planted);
      const unsigned long long now = me.look().wrong;
      EXPECT_GT(now, before) << "rank " << rank;
      before = now;
    }
    all.arrive_and_wait();
    me.engine().close();
    all.arrive_and_wait();
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuStress, testing::Values(1, 2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
