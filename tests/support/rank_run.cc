#include "support/rank_run.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

namespace anyep::test {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr auto kOpLimit = std::chrono::seconds(20);
/// How long a test waits for what must happen by itself.
constexpr auto kPatience = std::chrono::seconds(10);

template <class Condition>
bool becomes_true(std::chrono::nanoseconds limit, const Condition& condition) {
  const auto until = Clock::now() + limit;
  while (!condition()) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

}  // namespace

RankRun::RankRun(const Scenario& scenario, int rank, const Returned& returned, std::unique_ptr<Mirror> mirror)
    : scenario_(scenario),
      rank_(rank),
      returned_(returned),
      mirror_(mirror != nullptr ? std::move(mirror) : std::make_unique<Mirror>()),
      kept_(scenario.steps.size()) {}

RankOutputs RankRun::play(const LocalGroup& group) {
  int step = 0;
  try {
    create_engines(group);
    for (; step < static_cast<int>(scenario_.steps.size()); ++step) {
      const Step& each = scenario_.steps[static_cast<std::size_t>(step)];
      begin(step, each.pace);
      std::visit([&](const auto& what) { play(step, what); }, each.what);
    }
    if (scenario_.counts_ids) {
      outputs_.put_text(step, "ids out of range", std::to_string(engines_[0]->ids_out_of_range()));
    }
    put_missing_sources();
    for (auto& each : engines_) each->close();
  } catch (const std::exception& error) {
    outputs_.put_text(step, "failed", error.what());
  }
  return std::move(outputs_);
}

void RankRun::create_engines(const LocalGroup& group) {
  Budget budget;
  budget.rows_bytes = scenario_.rows_bytes;
  budget.low_latency_bytes = scenario_.low_latency_bytes();
  Tuning tuning = Tuning::from_environment();
  tuning.timeout = kOpLimit;
  tuning.startup_timeout = 3 * kOpLimit;
  tuning.close_timeout = kOpLimit;
  tuning.exact_combine = scenario_.exact_combine;
  tuning.checked = tuning.checked || scenario_.checked;
  patience_ = std::chrono::duration_cast<std::chrono::nanoseconds>(kPatience * tuning.time_scale);
  const auto bootstrap = group.member(rank_);
  Topology topology = Topology::discover(*bootstrap);
  topology.device = mirror_->device();
  for (int i = 0; i < scenario_.num_engines; ++i) {
    engines_.emplace_back(Engine::create(budget, topology, tuning, *bootstrap));
  }
}

void RankRun::begin(int step, const Pace& pace) {
  if (scenario_.jitter != 0) {
    const std::uint64_t random =
        mix(scenario_.jitter, static_cast<std::uint64_t>(step), static_cast<std::uint64_t>(rank_));
    if (random % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random / 3 % 2000));
  }
  if (pace.delayed == rank_) std::this_thread::sleep_for(milliseconds(pace.delay_ms));
  if (pace.held == rank_) {
    const bool released = becomes_true(patience_, [&] { return returned_.has(step, pace.until); });
    outputs_.put_text(step, "released", released ? "by the other rank" : "after a long time");
  }
}

void RankRun::put_error(int step, const Error& error) {
  if (error.code != ErrorCode::kCapacity) throw error;
  outputs_.put_text(step, "error",
                    std::string(anyep::name_of(error.code)) + " need " + std::to_string(error.need) + " have " +
                        std::to_string(error.have));
}

void RankRun::issue(int step, Finish finish, const Call& call) {
  const Pace& pace = scenario_.steps[static_cast<std::size_t>(step)].pace;
  const bool gated = pace.after_manual;
  Event gate;
  Options options;
  options.num_sms = scenario_.num_sms;
  options.wait = finish == Finish::kWait;
  if (pace.after_step >= 0) options.after.push_back(kept(pace.after_step).event);
  if (gated) {
    gate = Event::manual();
    options.after.push_back(gate);
  }
  kept(step).in.seal();
  mirror_->upload(kept(step).in);
  mirror_->upload(kept(step).out);
  try {
    kept(step).event = call(options);
  } catch (const Error& error) {
    put_error(step, error);
  }
  returned_.set(step, rank_);
  if (gated) {
    std::this_thread::sleep_for(milliseconds(2));
    outputs_.put_text(step, "before the event", kept(step).event.done() ? "done" : "waiting");
    gate.complete();
  }
  if (finish != Finish::kLater) complete(step, finish);
}

void RankRun::complete(int step, Finish finish) {
  Kept& mine = kept(step);
  if (finish == Finish::kPoll && !becomes_true(patience_, [&] { return mine.event.done(); })) {
    throw std::runtime_error("the op does not complete while its caller only looks");
  }
  try {
    mine.event.wait();
  } catch (const Error& error) {
    put_error(step, error);
  }
  mirror_->download(mine.in);
  mirror_->download(mine.out);
  if (mine.record) mine.record();
  for (const Tensors* tensors : {&mine.in, &mine.out}) {
    if (const std::string what = tensors->damage(); !what.empty()) outputs_.put_text(step, "damage", what);
  }
}

void RankRun::play(int step, const ReceiveStep& what) {
  kept(what.step).event = kept(what.step).pending->receive(stream());
  returned_.set(step, rank_);
  complete(what.step, Finish::kEvent);
}

void RankRun::play(int, const WaitStep& what) {
  complete(what.step, Finish::kEvent);
}

void RankRun::play(int step, const BarrierStep&) {
  engine(step).barrier(stream());
}

void RankRun::play(int step, const ZeroStep&) {
  engine(step).barrier(stream());
  const auto zero = [&](Mode mode, std::int64_t bytes) {
    const TensorView memory = engine(step).memory(mode, 0, static_cast<std::size_t>(bytes));
    mirror_->zero(memory);
  };
  zero(Mode::kHighThroughput, scenario_.rows_bytes);
  zero(Mode::kLowLatency, scenario_.low_latency_bytes());
  engine(step).barrier(stream());
}

void RankRun::play(int step, const CloseStep&) {
  engine(step).close();
}

}  // namespace anyep::test
