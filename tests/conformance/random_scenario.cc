#include "conformance/random_scenario.h"

#include <algorithm>
#include <array>
#include <utility>

namespace anyep::test {
namespace {

/// Turns of a row or two for the widest rows drawn here and 8 ranks; and room for every row of a scenario.
constexpr std::int64_t kSmallBudget = 8 << 20, kLargeBudget = 256 << 20;

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : seed_(seed) {
    scenario_.num_ranks = static_cast<int>(one_of<std::int64_t>({1, 2, 2, 3, 3, 4, 4, 5, 6, 8}));
    scenario_.seed = seed;
    scenario_.exact_combine = chance(15);
    scenario_.checked = chance(10);
    scenario_.num_sms = static_cast<int>(one_of<std::int64_t>({0, 0, 1, 2, 3}));
    scenario_.rows_bytes = one_of<std::int64_t>({kSmallBudget, kLargeBudget});
    scenario_.jitter = chance(40) ? next() | 1 : 0;
  }

  Scenario scenario() {
    const std::uint64_t groups = 2 + next() % 4;
    for (std::uint64_t i = 0; i < groups; ++i) {
      switch (next() % 4) {
        case 0:
        case 1:
          high_throughput();
          break;
        case 2:
          low_latency();
          break;
        default:
          low_latency_pipeline();
      }
    }
    return scenario_;
  }

 private:
  std::uint64_t next() { return mix(seed_, ++drawn_); }
  bool chance(unsigned percent) { return next() % 100 < percent; }
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(high - low + 1));
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return *(values.begin() + static_cast<std::ptrdiff_t>(next() % values.size()));
  }
  Finish finish() { return one_of({Finish::kWait, Finish::kWait, Finish::kEvent, Finish::kPoll}); }

  Choices choices(std::int64_t most_tokens) {
    const int experts = static_cast<int>(one_of<std::int64_t>({1, 2, between(1, 12), between(1, 64), 256}));
    const int top_k = static_cast<int>(between(1, std::min(experts, chance(20) ? 32 : 8)));
    std::vector<std::int64_t> tokens;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      tokens.push_back(one_of<std::int64_t>({0, 1, most_tokens, between(0, most_tokens), between(0, most_tokens)}));
    }
    const ChoicesShape shape{experts, top_k, tokens};
    const Spice spice{.unused = static_cast<int>(one_of<std::int64_t>({0, 0, 20, 100})),
                      .duplicate = static_cast<int>(one_of<std::int64_t>({0, 10, 50})),
                      .out_of_range = static_cast<int>(scenario_.checked ? 0 : one_of<std::int64_t>({0, 0, 10})),
                      .fits_32_bits = true};
    return chance(15) ? all_to(static_cast<int>(between(0, experts - 1)), shape) : random_choices(next(), shape, spice);
  }

  std::vector<Memory> memory() {
    if (chance(60)) return {};
    std::vector<Memory> per_rank;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      per_rank.push_back(chance(70) ? Memory::kWindow : Memory::kTensor);
    }
    return per_rank;
  }

  void high_throughput() {
    RouteStep route;
    route.choices = choices(40);
    route.ids = one_of({Ids::kInt32, Ids::kInt64});
    route.given = one_of({RouteStep::Given::kExperts, RouteStep::Given::kExperts, RouteStep::Given::kAll});
    const bool ahead = chance(40);
    if (ahead) route.finish = Finish::kLater;
    int handle = scenario_.then(route);
    if (ahead) {
      dispatch(handle, false, ways());
      scenario_.then(WaitStep{handle});
    }
    const std::uint64_t ops = 1 + next() % 4;
    for (std::uint64_t i = 0; i < ops; ++i) {
      if (i > 0 && chance(10)) handle = scenario_.then(AdoptStep{handle});
      const bool adopted = scenario_.steps[static_cast<std::size_t>(handle)].what.index() == 1;
      if (chance(60))
        dispatch(handle, adopted);
      else
        combine(handle);
    }
  }

  /// Each rank has its own.
  std::vector<Ahead> ways() {
    std::vector<Ahead> per_rank;
    for (int rank = 0; rank < scenario_.num_ranks; ++rank) {
      per_rank.push_back(one_of({Ahead::kNo, Ahead::kOwnRows, Ahead::kOwnRows, Ahead::kGivenRows, Ahead::kNoRoom,
                                 Ahead::kBehindRoute, Ahead::kBehindNoRoom}));
    }
    return per_rank;
  }

  void dispatch(int handle, bool adopted, std::vector<Ahead> ahead = {}) {
    DispatchStep step;
    step.handle = handle;
    step.dtype = one_of({DType::kBF16, DType::kF16, DType::kF32, DType::kF8E4M3, DType::kI8, DType::kU8});
    step.hidden =
        16 / static_cast<std::int64_t>(size_of(step.dtype)) * one_of<std::int64_t>({1, 3, between(1, 64), 448});
    const bool one_byte = size_of(step.dtype) == 1;
    if (one_byte && (step.dtype == DType::kF8E4M3 || chance(50))) {
      step.num_scales = static_cast<int>(between(1, 9));
      step.scale_type = one_of({DType::kF32, DType::kI32});
      step.scale_strides = one_of({Strides::kDense, Strides::kColumns, Strides::kPadded, Strides::kBroadcast});
    }
    if (chance(25) && ahead.empty()) step.extra.push_back(between(1, 40));
    step.ahead = std::move(ahead);
    step.with_experts = !adopted && chance(70);
    step.with_weights = chance(80);
    step.out = memory();
    // Windows need a budget for all rows at once.
    if (scenario_.rows_bytes == kSmallBudget) step.out.clear();
    step.finish = finish();
    scenario_.then(step);
  }

  void combine(int handle) {
    CombineStep step;
    step.handle = handle;
    step.dtype = one_of({DType::kBF16, DType::kBF16, DType::kF16, DType::kF32});
    step.hidden = 8 * one_of<std::int64_t>({1, 3, between(1, 64), 896});
    step.num_biases = static_cast<int>(one_of<std::int64_t>({0, 0, 1, 2}));
    step.weights = one_of<std::int64_t>({0, 0, between(1, 32)});
    if (scenario_.rows_bytes == kLargeBudget) step.in = memory();
    step.surplus_rows = one_of<std::int64_t>({0, 0, 3});
    step.finish = finish();
    scenario_.then(step);
  }

  /// `hidden`, or less where slabs of all ranks would pass 8 million elements.
  std::int64_t fitting(const LowLatencyDispatchStep& step, std::int64_t hidden) const {
    const std::int64_t rows = step.choices.num_experts * scenario_.num_ranks * step.max_tokens;
    return rows * hidden <= (8 << 20) ? hidden : 16;
  }

  LowLatencyDispatchStep low_latency_dispatch() {
    LowLatencyDispatchStep step;
    step.max_tokens = one_of<std::int64_t>({1, 4, between(1, 24), 70});
    step.choices = choices(step.max_tokens);
    step.ids = one_of({Ids::kInt32, Ids::kInt64});
    step.wire = one_of({Wire::kBF16, Wire::kFP8, Wire::kUE8M0});
    step.round_scale = step.wire == Wire::kUE8M0 || chance(30);
    step.hidden = fitting(step, 16 * one_of<std::int64_t>({1, 8, between(1, 40), 64}));
    step.statistics = chance(20);
    step.finish = finish();
    return step;
  }

  LowLatencyCombineStep low_latency_combine(int dispatch) {
    LowLatencyCombineStep step;
    step.dispatch = dispatch;
    step.hidden = fitting(scenario_.step<LowLatencyDispatchStep>(dispatch), one_of<std::int64_t>({0, 8, 128, 1024}));
    if (step.hidden >= 128 && chance(50))
      step.wire = Wire::kLogFMT;
    else
      step.zero_copy = chance(30);
    step.statistics = chance(20);
    step.finish = finish();
    return step;
  }

  void low_latency() {
    const int dispatch = scenario_.then(low_latency_dispatch());
    const std::int64_t combines = between(0, 2);
    for (std::int64_t i = 0; i < combines; ++i) scenario_.then(low_latency_combine(dispatch));
  }

  /// Hooks, two open at a time.
  void low_latency_pipeline() {
    std::vector<int> open;
    int received = -1;
    const std::int64_t ops = between(2, 6);
    for (std::int64_t i = 0; i < ops; ++i) {
      if (open.size() == 2 || (!open.empty() && chance(40))) received = receive(open, received);
      if (received >= 0 && chance(50)) {
        LowLatencyCombineStep step = low_latency_combine(received);
        step.hook = true;
        step.zero_copy = false;  // the buffer belongs to one operation at a time
        open.push_back(scenario_.then(step));
      } else {
        LowLatencyDispatchStep step = low_latency_dispatch();
        step.hook = true;
        open.push_back(scenario_.then(step));
      }
    }
    while (!open.empty()) received = receive(open, received);
  }

  /// Receives the older of the open hooks; the latest dispatch that has been received.
  int receive(std::vector<int>& open, int received) {
    const int step = open.front();
    open.erase(open.begin());
    scenario_.then(ReceiveStep{step});
    const What& what = scenario_.steps[static_cast<std::size_t>(step)].what;
    return std::holds_alternative<LowLatencyDispatchStep>(what) ? step : received;
  }

  std::uint64_t seed_, drawn_ = 0;
  Scenario scenario_;
};

}  // namespace

Scenario random_scenario(std::uint64_t seed) {
  return Draw(seed).scenario();
}

}  // namespace anyep::test
