// Period of a dispatch + combine pair: graphs of 100 pairs, replayed on every GPU at once; the slowest rank, median of the
// replays. So many, since the ranks' start is a few microseconds apart, which the slowest one waits. Three sets of inputs in
// turn; combine takes a slab of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "low_latency_world.h"

namespace anyep::test {

struct FillParams {
  std::uint16_t* to;
  std::size_t count;
  unsigned salt;
};
static __global__ void fill_bf16(const __grid_constant__ FillParams p) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < p.count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const unsigned mixed = (static_cast<unsigned>(i) * 2654435761u ^ p.salt) >> 8;
    p.to[i] = static_cast<std::uint16_t>((mixed & 0x8000u) | (124 + (mixed >> 20) % 4) << 7 | (mixed & 0x7fu));
  }
}

static const cuda::Kernel<FillParams> kFill(fill_bf16, "fill_bf16");

class Bench {
 public:
  static constexpr int kSets = 3, kPairs = 100, kHidden = 7168, kTopK = 8, kExperts = 256;
  struct Mode {
    bool fp8 = true, hook = false, early = false, dispatch = true, combine = true;
    int num_sms = 0;
  };

  explicit Bench(int num_ranks)
      : world_(num_ranks, ll::kRegions * static_cast<unsigned>(num_ranks) *
                              ll::region_bytes_for(kHidden, kExperts / num_ranks, kTopK, kMost)) {
    for (int r = 0; r < num_ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(world_.at(r).device));
      Data data;
      const std::size_t rows = static_cast<std::size_t>(kExperts) * kMost;
      data.slab = device_memory<std::byte>(rows * kHidden * 2);
      data.y = device_memory<std::uint16_t>(rows * kHidden);
      data.scales = device_memory<std::uint32_t>(rows * kHidden / 128);
      data.counts = device_memory<std::int32_t>(kExperts);
      data.range = device_memory<std::int64_t>(kExperts);
      for (Set& set : data.sets) {
        set.source = device_memory<std::int32_t>(rows);
        set.rows = device_memory<std::int32_t>(static_cast<std::size_t>(num_ranks) * kMost * kTopK);
        set.x = device_memory<std::uint16_t>(static_cast<std::size_t>(kMost) * kHidden);
        set.ids = device_memory<std::int64_t>(static_cast<std::size_t>(kMost) * kTopK);
        set.weights = device_memory<float>(static_cast<std::size_t>(kMost) * kTopK);
        set.out = device_memory<std::uint16_t>(static_cast<std::size_t>(kMost) * kHidden);
        set.range = device_memory<std::int64_t>(kExperts);
        kFill({.blocks = 512, .threads = 256},
              {set.x, static_cast<std::size_t>(kMost) * kHidden, static_cast<unsigned>(r)});
        std::mt19937_64 random(static_cast<unsigned>(r * 100 + (&set - data.sets)));
        std::vector<std::int64_t> ids;
        std::vector<float> weights(static_cast<std::size_t>(kMost) * kTopK, 0.125f);
        for (int t = 0; t < kMost; ++t) {
          std::vector<std::int64_t> all(kExperts);
          for (int e = 0; e < kExperts; ++e) all[static_cast<std::size_t>(e)] = e;
          for (int k = 0; k < kTopK; ++k) {
            std::swap(all[static_cast<std::size_t>(k)],
                      all[static_cast<std::size_t>(k) + random() % static_cast<unsigned>(kExperts - k)]);
            ids.push_back(all[static_cast<std::size_t>(k)]);
          }
        }
        CHECK_CUDA(cudaMemcpy(set.ids, ids.data(), ids.size() * 8, cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaMemcpy(set.weights, weights.data(), weights.size() * 4, cudaMemcpyHostToDevice));
      }
      kFill({.blocks = 512, .threads = 256}, {data.y, rows * kHidden, static_cast<unsigned>(r) + 77});
      CHECK_CUDA(cudaEventCreate(&data.from));
      CHECK_CUDA(cudaEventCreate(&data.to));
      CHECK_CUDA(cudaDeviceSynchronize());
      data_.push_back(data);
    }
  }

  int num_ranks() const { return world_.num_ranks(); }
  bool gpu_per_rank() const { return world_.num_gpus() == world_.num_ranks(); }

  /// Microseconds per step; negative: a wait failed.
  double period(int tokens, const Mode& mode, int replays = 9) {
    const int ranks = world_.num_ranks();
    std::vector<cudaGraphExec_t> graphs(static_cast<std::size_t>(ranks));
    if (!mode.dispatch) {  // combine alone needs a dispatch of each set before
      for (int set = 0; set < kSets; ++set) {
        for (int r = 0; r < ranks; ++r) dispatch(r, tokens, mode, set, false);
      }
      world_.synchronize();
    }
    for (int r = 0; r < ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(world_.at(r).device));
      cudaGraph_t graph;
      CHECK_CUDA(cudaStreamBeginCapture(world_.at(r).stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < kPairs; ++i) {
        if (mode.dispatch) dispatch(r, tokens, mode, i % kSets, mode.early);
        if (mode.combine) combine(r, tokens, mode, i % kSets, mode.early);
      }
      CHECK_CUDA(cudaStreamEndCapture(world_.at(r).stream, &graph));
      CHECK_CUDA(cudaGraphInstantiate(&graphs[static_cast<std::size_t>(r)], graph, 0));
      CHECK_CUDA(cudaGraphDestroy(graph));
      CHECK_CUDA(cudaGraphUpload(graphs[static_cast<std::size_t>(r)], world_.at(r).stream));
    }
    world_.synchronize();
    std::vector<float> slowest;
    for (int replay = -2; replay < replays && world_.failed() < 0; ++replay) {
      std::vector<float> times(static_cast<std::size_t>(ranks));
      std::vector<std::thread> threads;
      std::atomic<int> ready{0};
      for (int r = 0; r < ranks; ++r) {
        threads.emplace_back([&, r] {
          Data& data = data_[static_cast<std::size_t>(r)];
          CHECK_CUDA(cudaSetDevice(world_.at(r).device));
          for (++ready; ready < ranks;) {
          }
          CHECK_CUDA(cudaEventRecord(data.from, world_.at(r).stream));
          CHECK_CUDA(cudaGraphLaunch(graphs[static_cast<std::size_t>(r)], world_.at(r).stream));
          CHECK_CUDA(cudaEventRecord(data.to, world_.at(r).stream));
          CHECK_CUDA(cudaStreamSynchronize(world_.at(r).stream));
          CHECK_CUDA(cudaEventElapsedTime(&times[static_cast<std::size_t>(r)], data.from, data.to));
        });
      }
      for (std::thread& thread : threads) thread.join();
      if (replay >= 0) slowest.push_back(*std::max_element(times.begin(), times.end()) * 1e3f / kPairs);
    }
    for (cudaGraphExec_t graph : graphs) CHECK_CUDA(cudaGraphExecDestroy(graph));
    if (world_.failed() >= 0) {
      world_.print_records();
      world_.reset();
      return -1;
    }
    std::sort(slowest.begin(), slowest.end());
    return slowest[slowest.size() / 2];
  }

 private:
  static constexpr int kMost = 512;
  struct Set {
    std::uint16_t *x, *out;
    std::int64_t *ids, *range;
    std::int32_t *source, *rows;
    float* weights;
  };
  struct Data {
    std::byte* slab;
    std::uint16_t* y;
    std::uint32_t* scales;
    std::int32_t* counts;
    std::int64_t* range;
    Set sets[kSets];
    cudaEvent_t from, to;
  };

  ll::CallParams call_of(int r, int tokens, const Mode& mode, int set, unsigned kind) {
    Shape shape;
    shape.num_experts = kExperts;
    shape.top_k = kTopK;
    shape.hidden = kHidden;
    shape.max_tokens = std::max(tokens, 128);
    ll::CallParams call = world_.call(r, shape, kind);
    const Set& at = data_[static_cast<std::size_t>(r)].sets[set];
    call.hook = mode.hook;
    call.routing.experts = at.ids;
    call.routing.weights = at.weights;
    call.routing.num_tokens = tokens;
    return call;
  }
  int sms(const Mode& mode) const {
    return mode.num_sms > 0 ? mode.num_sms : 132 * world_.num_gpus() / world_.num_ranks();
  }
  template <class Launch>
  void in_halves(const Mode& mode, ll::CallParams& call, Launch&& launch) {
    if (!mode.hook) return launch();
    call.halves = ll::kSend;
    launch();
    call.halves = ll::kReceive;
    launch();
  }
  void dispatch(int r, int tokens, const Mode& mode, int set, bool early) {
    Data& data = data_[static_cast<std::size_t>(r)];
    ll::DispatchParams p;
    p.call = call_of(r, tokens, mode, set, 4);
    p.wire = mode.fp8 ? Wire::kFP8 : Wire::kBF16;
    p.x = reinterpret_cast<const std::byte*>(data.sets[set].x);
    p.x_row_stride = kHidden * 2;
    p.slab = data.slab;
    p.scales = data.scales;
    const std::int64_t rows = std::int64_t{world_.num_ranks()} * p.call.max_tokens;
    p.scale_expert_stride = rows * (kHidden / 128);
    p.scale_row_stride = 1;
    p.scale_column_stride = rows;
    p.counts = data.counts;
    p.source = data.sets[set].source;
    p.range = data.sets[set].range;
    p.rows = data.sets[set].rows;
    CHECK_CUDA(cudaSetDevice(world_.at(r).device));
    in_halves(mode, p.call, [&] { ll::launch_dispatch(p, sms(mode), early, world_.at(r).stream); });
  }
  void combine(int r, int tokens, const Mode& mode, int set, bool early) {
    Data& data = data_[static_cast<std::size_t>(r)];
    ll::CombineParams p;
    p.call = call_of(r, tokens, mode, set, 5);
    p.x = reinterpret_cast<const std::byte*>(data.y);
    p.x_row_stride = kHidden * 2;
    p.x_expert_stride = p.x_row_stride * world_.num_ranks() * p.call.max_tokens;
    p.rows = data.sets[set].rows;
    p.out = reinterpret_cast<std::byte*>(data.sets[set].out);
    p.out_row_stride = kHidden * 2;
    CHECK_CUDA(cudaSetDevice(world_.at(r).device));
    in_halves(mode, p.call, [&] { ll::launch_combine(p, sms(mode), early, world_.at(r).stream); });
  }

  World world_;
  std::vector<Data> data_;
};

/// Prints a line per number of tokens.
inline int bench(int num_ranks, const std::vector<int>& tokens_per_rank) {
  Bench bench(num_ranks);
  struct Column {
    const char* name;
    Bench::Mode mode;
  };
  std::vector<Column> columns = {{"fp8 pair", {}},  {"fp8 disp", {}},  {"comb", {}},
                                 {"bf16 pair", {}}, {"bf16 disp", {}}, {"hook pair", {}}};
  columns[1].mode.combine = columns[4].mode.combine = false;
  columns[2].mode.dispatch = false;
  columns[3].mode.fp8 = columns[4].mode.fp8 = false;
  columns[5].mode.hook = true;
  for (Column& column : columns) column.mode.early = bench.gpu_per_rank();
  std::printf("us per step, %d ranks%s\n%6s", bench.num_ranks(), bench.gpu_per_rank() ? ", dependent launch" : "", "T");
  for (const Column& column : columns) std::printf(" %10s", column.name);
  std::printf("\n");
  bool right = true;
  for (const int tokens : tokens_per_rank) {
    std::printf("%6d", tokens);
    for (const Column& column : columns) {
      const double us = bench.period(tokens, column.mode);
      right = right && us > 0;
      std::printf(" %10.2f", us);
      std::fflush(stdout);
    }
    std::printf("\n");
  }
  return right ? 0 : 1;
}

}  // namespace anyep::test
