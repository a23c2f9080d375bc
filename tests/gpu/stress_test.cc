// Many exchanges of random shapes back to back, checked on the device. ANYEP_SOAK multiplies their number.
#include <anyep/bootstrap.h>
#include <anyep/engine.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "stress_kernels.h"
#include "support/mirror.h"

namespace anyep::test {
namespace {

constexpr int kMostTokens = 512, kMostHidden = 2048, kMostTopK = 8;

void must(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

template <class T>
T* device_array(std::size_t count) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, count * sizeof(T)));
  return static_cast<T*>(memory);
}

/// One rank: random exchanges, the same shapes on every rank but for the tokens.
class StressRank {
 public:
  StressRank(Bootstrap& bootstrap, int num_gpus) {
    Topology topology = Topology::discover(bootstrap);
    topology.device = topology.rank % num_gpus;
    must(cudaSetDevice(topology.device));
    must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    ids_ = device_array<std::int64_t>(kMostTokens * kMostTopK);
    x_ = device_array<std::uint16_t>(static_cast<std::size_t>(kMostTokens) * kMostHidden);
    copy_ = device_array<std::uint16_t>(static_cast<std::size_t>(kMostTokens) * kMostHidden * 8);
    out_ = device_array<std::uint16_t>(static_cast<std::size_t>(kMostTokens) * kMostHidden);
    wrong_ = device_array<std::uint64_t>(1);
    must(cudaMemsetAsync(wrong_, 0, 8, stream_));
    must(cudaStreamSynchronize(stream_));
    // Last: from here on kernels of other ranks on this GPU may wait for this one, and so would calls that wait for the GPU.
    Budget budget;
    budget.rows_bytes = std::int64_t{96} << 20;
    Tuning tuning = Tuning::from_environment();
    tuning.timeout = std::chrono::seconds(20);
    engine_.emplace_back(Engine::create(budget, topology, tuning, bootstrap));
  }
  ~StressRank() {
    for (void* memory : {static_cast<void*>(ids_), static_cast<void*>(x_), static_cast<void*>(copy_),
                         static_cast<void*>(out_), static_cast<void*>(wrong_)}) {
      (void)cudaFree(memory);
    }
  }
  StressRank(const StressRank&) = delete;
  StressRank& operator=(const StressRank&) = delete;

  Engine& engine() { return engine_.front(); }

  /// @param planted damage one received element of this exchange
  void exchange(std::uint64_t seed, bool planted) {
    Engine& engine = engine_.front();
    std::mt19937_64 random(seed);
    const auto below = [&](std::uint64_t limit) { return static_cast<int>(random() % limit); };
    Exchange e;
    e.rank = engine.rank();
    e.num_ranks = engine.num_ranks();
    e.top_k = 1 + below(kMostTopK);
    e.num_experts = std::max(e.top_k, 1 + below(64));
    e.hidden = 8 * (1 + below(below(4) == 0 ? kMostHidden / 8 : 32));
    e.percent_unused = below(3) == 0 ? below(101) : 0;
    e.salt = static_cast<std::uint32_t>(random());
    const int most = below(4) == 0 ? kMostTokens : 64;
    std::vector<int> tokens;
    for (int rank = 0; rank < e.num_ranks; ++rank)
      tokens.push_back(below(8) == 0 ? 0 : below(static_cast<std::uint64_t>(most) + 1));
    e.num_tokens = tokens[static_cast<std::size_t>(e.rank)];
    e.wrong = wrong_;
    Options options;
    options.num_sms = 1 + below(20);
    const bool gathers = below(2) == 0, worst_case = below(2) == 0;
    const bool again = below(3) == 0;  // the handle serves a second dispatch and combine

    fill_exchange(e, ids_, x_, stream_);
    Routing routing;
    routing.experts = TensorView::dense(ids_, DType::kI64, {e.num_tokens, e.top_k});
    const Handle handle = engine.route(Shape{e.num_experts, e.top_k}, routing, {stream_}, options);
    std::int64_t rows = 0;
    for (const int each : tokens) rows += each;
    if (!worst_case) rows = handle.num_rows();
    for (int round = 0; round < (again ? 2 : 1); ++round) {
      const OwnedRows received = engine.make_rows(rows, Shape{e.num_experts, 0, e.hidden});
      Rows in, out;
      in.x = TensorView::dense(x_, DType::kBF16, {e.num_tokens, e.hidden});
      out.x = received.view().x;
      must(cudaMemsetAsync(out.x.data, 0xFF, static_cast<std::size_t>(rows) * static_cast<std::size_t>(e.hidden) * 2,
                           stream_));
      (void)engine.dispatch(in, handle, out, {stream_}, options);
      if (planted && handle.num_rows() > 0) damage(out.x.as<std::uint16_t>(), stream_);
      check_received(e, out.x.as<std::uint16_t>(), handle.rows_until().as<std::int32_t>(),
                     handle.source().as<std::int32_t>(), stream_);
      CombineInput back;
      back.x = out.x;
      if (!gathers) {
        must(cudaMemcpyAsync(copy_, out.x.data, static_cast<std::size_t>(rows) * static_cast<std::size_t>(e.hidden) * 2,
                             cudaMemcpyDeviceToDevice, stream_));
        back.x.data = copy_;
      }
      Rows sums;
      sums.x = TensorView::dense(out_, DType::kBF16, {e.num_tokens, e.hidden});
      must(cudaMemsetAsync(out_, 0xFF, static_cast<std::size_t>(e.num_tokens) * static_cast<std::size_t>(e.hidden) * 2,
                           stream_));
      (void)engine.combine(back, handle, sums, {stream_}, options);
      if (!planted) check_combined(e, ids_, out_, stream_);
      operations += 2;
    }
    ++operations;
  }

  std::uint64_t wrong() {
    std::uint64_t count = 0;
    must(cudaMemcpyAsync(&count, wrong_, 8, cudaMemcpyDeviceToHost, stream_));
    must(cudaStreamSynchronize(stream_));
    return count;
  }

  std::int64_t operations = 0;

 private:
  std::vector<Engine> engine_;
  cudaStream_t stream_ = nullptr;
  std::int64_t* ids_ = nullptr;
  std::uint16_t *x_ = nullptr, *copy_ = nullptr, *out_ = nullptr;
  std::uint64_t* wrong_ = nullptr;
};

class GpuStress : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (num_gpus() == 0) GTEST_SKIP() << "no GPU";
  }
};

TEST_P(GpuStress, RandomShapesBackToBack) {
  const char* const soak = std::getenv("ANYEP_SOAK");
  const int exchanges = static_cast<int>(2000 * (soak == nullptr ? 1.0 : std::stod(soak)));
  const LocalGroup group(GetParam());
  std::vector<std::int64_t> operations(static_cast<std::size_t>(GetParam()));
  LocalGroup::run_threads(GetParam(), [&](int rank) {
    const auto bootstrap = group.member(rank);
    StressRank me(*bootstrap, num_gpus());
    for (int i = 0; i < exchanges; ++i) me.exchange(static_cast<std::uint64_t>(i) + 1, false);
    EXPECT_EQ(me.wrong(), 0u) << "rank " << rank;
    operations[static_cast<std::size_t>(rank)] = me.operations;
    me.engine().close();
  });
  RecordProperty("operations", std::to_string(operations[0]));
  printf("  %lld operations of each rank\n", static_cast<long long>(operations[0]));
}

TEST_P(GpuStress, TheCheckerSeesOneWrongElement) {
  const LocalGroup group(GetParam());
  std::vector<std::uint64_t> wrong(static_cast<std::size_t>(GetParam()));
  LocalGroup::run_threads(GetParam(), [&](int rank) {
    const auto bootstrap = group.member(rank);
    StressRank me(*bootstrap, num_gpus());
    for (int i = 0; i < 8; ++i) me.exchange(static_cast<std::uint64_t>(i) + 1, true);
    wrong[static_cast<std::size_t>(rank)] = me.wrong();
    me.engine().close();
  });
  for (const std::uint64_t count : wrong) EXPECT_GE(count, 1u);
}

INSTANTIATE_TEST_SUITE_P(Ranks, GpuStress, testing::Values(1, 2, 4), testing::PrintToStringParamName());

}  // namespace
}  // namespace anyep::test
