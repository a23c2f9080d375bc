// The hot loops of CPU ranks, one at a time on one core: what each instruction set gives, in and out of the caches.
//
//     anyep_bench_kernels --benchmark_filter=copy
//
// The argument is the number of rows of 7168 elements that a round walks over: 4 stay in the nearest caches, 4096 do
// not.
#include <benchmark/benchmark.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/fp8.h"
#include "cpu/simd/kernels.h"

namespace {

using namespace anyep::cpu::simd;

constexpr std::int64_t kHidden = 7168;
constexpr int kRanks = 2;

struct Rows {
  explicit Rows(std::int64_t count) : values(static_cast<std::size_t>(count * kHidden)) {
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<std::uint16_t>(0x3f00 + i * 2654435761u % 0xff);
  }
  std::uint16_t* row(std::int64_t index) { return values.data() + index * kHidden; }
  std::vector<std::uint16_t> values;
};

template <class Call>
void run(benchmark::State& state, std::int64_t bytes_per_row, Call&& call) {
  const std::int64_t rows = state.range(0);
  for (auto unused : state) {
    (void)unused;
    for (std::int64_t row = 0; row < rows; ++row) call(row);
    stream_fence();
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) * rows * bytes_per_row);
}

void copy_rows(benchmark::State& state, const Kernels& kernels) {
  Rows from(state.range(0)), to(state.range(0));
  run(state, 2 * kHidden, [&](std::int64_t row) { kernels.copy(to.row(row), from.row(row), 2 * kHidden); });
}

void stream_rows(benchmark::State& state, const Kernels& kernels) {
  Rows from(state.range(0)), to(state.range(0));
  run(state, 2 * kHidden, [&](std::int64_t row) { kernels.stream(to.row(row), from.row(row), 2 * kHidden); });
}

void sum_rows(benchmark::State& state, const Kernels& kernels) {
  Rows from(kRanks * state.range(0)), to(state.range(0));
  run(state, 2 * kHidden, [&](std::int64_t row) {
    const std::array<const void*, kRanks> inputs = {from.row(kRanks * row), from.row(kRanks * row + 1)};
    SumRows sum;
    sum.out = to.row(row);
    sum.rows = inputs.data();
    sum.num_rows = kRanks;
    sum.hidden = kHidden;
    kernels.sum_rows(sum);
  });
}

void weighted_sum(benchmark::State& state, const Kernels& kernels) {
  Rows from(kRanks * state.range(0)), to(state.range(0));
  const std::array<float, kRanks> weights = {0.25F, 0.75F};
  run(state, 2 * kHidden, [&](std::int64_t row) {
    const std::array<const void*, kRanks> inputs = {from.row(kRanks * row), from.row(kRanks * row + 1)};
    WeightedSum sum;
    sum.out = to.row(row);
    sum.rows = inputs.data();
    sum.weights = weights.data();
    sum.num_rows = kRanks;
    sum.hidden = kHidden;
    kernels.weighted_sum(sum);
  });
}

void cast_fp8(benchmark::State& state, const Kernels& kernels) {
  Rows from(state.range(0));
  std::vector<std::uint8_t> to(static_cast<std::size_t>(state.range(0) * kHidden));
  std::vector<float> scales(static_cast<std::size_t>(anyep::core::num_fp8_scales(kHidden)));
  run(state, 2 * kHidden, [&](std::int64_t row) {
    kernels.cast_fp8(
        {.x = from.row(row), .hidden = kHidden, .out = to.data() + row * kHidden, .scales = scales.data()});
  });
}

/// Registers every loop for every instruction set that this machine has.
const bool registered = [] {
  struct Loop {
    const char* name;
    void (*body)(benchmark::State&, const Kernels&);
  };
  for (const Isa isa : {Isa::kBaseline, Isa::kV3, Isa::kV4}) {
    const Kernels* const kernels = kernels_of(isa);
    if (kernels == nullptr) continue;
    for (const Loop& loop : {Loop{"copy", copy_rows}, Loop{"stream", stream_rows}, Loop{"sum_rows", sum_rows},
                             Loop{"weighted_sum", weighted_sum}, Loop{"cast_fp8", cast_fp8}}) {
      const std::string name = std::string(loop.name) + "/" + kernels->name;
      benchmark::RegisterBenchmark(name.c_str(), loop.body, *kernels)->Arg(4)->Arg(4096);
    }
  }
  return true;
}();

}  // namespace
