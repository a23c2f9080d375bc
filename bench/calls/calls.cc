// The C++ calls that bench/python_cost.py compares Python calls with, timed one by one in the same process. A C interface, since
// ctypes loads it. Functions return 0, or -1 with the reason in anyep_calls_error().
#include <anyep/engine.h>
#include <anyep/plan.h>
#include <anyep/workload.h>

#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "bench/support/budget.h"
#include "bench/support/high_throughput_case.h"
#include "bench/support/low_latency_case.h"
#include "bench/support/memory_copy.h"

namespace {

using namespace anyep;

thread_local std::string last_error;

/// Writes every rank's bytes, in rank order, to `all`.
using AllGather = void (*)(const void* mine, std::int64_t bytes, void* all);

struct Request {
  int rank, num_ranks, num_experts, top_k;
  std::int64_t tokens, hidden;
  std::uint64_t seed;
};

/// One engine with both modes: dispatch into the window, combine from memory of the caller.
class Calls {
 public:
  Calls(const Request& request, AllGather all_gather)
      : bootstrap_(request.rank, request.num_ranks,
                   [all_gather](std::span<const std::byte> mine, std::span<std::byte> all) {
                     all_gather(mine.data(), static_cast<std::int64_t>(mine.size()), all.data());
                   }),
        engine_(make_engine(request)),
        content_(request.hidden, request.num_ranks, request.tokens, request.seed) {
    workload::Request drawn;
    drawn.profile = workload::parse_profile("uniform");
    drawn.seed = request.seed;
    drawn.num_experts = request.num_experts;
    drawn.top_k = request.top_k;
    drawn.num_ranks = request.num_ranks;
    drawn.tokens_per_rank = request.tokens;
    const workload::Batch batch = workload::generate(drawn);
    rows_.emplace(batch, request.rank, request.hidden, bench::RowType::kBF16, content_);
    window_.emplace(engine_, *rows_, bench::Memory::kWindow);
    caller_.emplace(engine_, *rows_, bench::Memory::kCaller);
    slabs_.emplace(batch, request.rank, request.hidden, Wire::kBF16, content_);
    pair_.emplace(engine_, *slabs_);
  }

  /// `us`: [count][3], microseconds of route, dispatch, combine.
  void high_throughput(std::int64_t count, double* us) {
    for (std::int64_t i = 0; i < count; ++i) {
      const double start = bench::now_us();
      window_->route();
      const double routed = bench::now_us();
      window_->dispatch_cached();
      const double dispatched = bench::now_us();
      caller_->combine();
      const double combined = bench::now_us();
      us[3 * i] = routed - start;
      us[3 * i + 1] = dispatched - routed;
      us[3 * i + 2] = combined - dispatched;
    }
  }

  /// `us`: [count][2], microseconds of dispatch and combine.
  void low_latency(std::int64_t count, double* us) {
    for (std::int64_t i = 0; i < count; ++i) {
      const double start = bench::now_us();
      pair_->dispatch();
      const double dispatched = bench::now_us();
      pair_->combine();
      us[2 * i] = dispatched - start;
      us[2 * i + 1] = bench::now_us() - dispatched;
    }
  }

  /// Wrong elements of the last calls' results.
  std::int64_t wrong() const {
    return window_->wrong_dispatch() + caller_->wrong_combine() + pair_->wrong_dispatch() + pair_->wrong_combine();
  }

  void close() { engine_.close(); }

 private:
  Engine make_engine(const Request& request) {
    Shape shape;
    shape.num_experts = request.num_experts;
    shape.top_k = request.top_k;
    shape.hidden = request.hidden;
    shape.max_tokens = request.tokens;
    const std::int64_t rows = bench::most_rows_bytes(request.num_ranks, request.tokens, 2 * request.hidden);
    const Budget budget{bench::rows_bytes_for(4 * rows, request.num_ranks),
                        low_latency_bytes_for(shape, request.num_ranks), request.num_experts, false};
    return Engine::create(budget, Topology::discover(bootstrap_), Tuning::from_environment(), bootstrap_);
  }

  CallbackBootstrap bootstrap_;
  Engine engine_;
  bench::RandomContent content_;
  std::optional<bench::HighThroughputData> rows_;
  std::optional<bench::HighThroughputCase> window_, caller_;
  std::optional<bench::LowLatencyData> slabs_;
  std::optional<bench::LowLatencyCase> pair_;
};

template <class Body>
std::int64_t guarded(Body&& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* anyep_calls_error() {
  return last_error.c_str();
}

/// Collective; nullptr on failure.
Calls* anyep_calls_open(const Request* request, AllGather all_gather) {
  Calls* made = nullptr;
  guarded([&] {
    made = std::make_unique<Calls>(*request, all_gather).release();
    return 0;
  });
  return made;
}

std::int64_t anyep_calls_high_throughput(Calls* calls, std::int64_t count, double* us) {
  return guarded([&] {
    calls->high_throughput(count, us);
    return 0;
  });
}

std::int64_t anyep_calls_low_latency(Calls* calls, std::int64_t count, double* us) {
  return guarded([&] {
    calls->low_latency(count, us);
    return 0;
  });
}

/// Wrong elements, or -1.
std::int64_t anyep_calls_wrong(const Calls* calls) {
  return guarded([&] { return calls->wrong(); });
}

/// Collective.
std::int64_t anyep_calls_close(Calls* calls) {
  const std::unique_ptr<Calls> owned(calls);
  return guarded([&] {
    owned->close();
    return 0;
  });
}

}  // extern "C"
#pragma GCC visibility pop
