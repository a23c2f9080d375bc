#include <algorithm>
#include <map>
#include <memory>

#include "bench/gpu/company.h"
#include "bench/gpu/low_latency.h"
#include "bench/gpu/runs.h"
#include "bench/probes/check.h"
#include "bench/support/content.h"

namespace anyep::bench {
namespace {

constexpr std::uint64_t kContentSeed = 0x51ed;
constexpr int kPairsPerGraph = 20, kReplaysPerRound = 10, kReplaysDropped = 3;
/// Two turns each: an engine's epochs wrap after 1000 (decision 0006), and four turns then clear regions, which at 1 token takes ten times
/// as long as the pair. That happens once in 2^32 turns, not in one of a hundred replays.
constexpr int kPairsBeforeWrap = 510;
/// Rows of the decode step: FP8 rows with their scales, rounded up to lines; BF16 rows.
constexpr int kStepFp8Bytes = 7424, kStepBf16Bytes = 14336;

std::string name_of_step(probes::StepForm form, int bytes, int blocks) {
  return (form == probes::StepForm::kTight ? "tight" : "step") + std::to_string(bytes) + " " + std::to_string(blocks);
}

class LowLatencyRun {
 public:
  LowLatencyRun(const Bench& bench, const Point& point);
  double run();

 private:
  struct Item {
    std::string dtype, mode;
    GpuLowLatency* one;
    std::unique_ptr<Graph> graph;
    std::string name() const { return dtype + mode; }
  };
  void add_graph(const std::string& dtype, const std::string& mode, GpuLowLatency* one,
                 const std::function<void()>& put);
  void measure_graphs(int replays);
  void measure_steps();
  void measure_eager();
  void measure_parts();
  void measure_pending();
  double wrong();
  void report(double wrong);

  const Bench& bench_;
  const Point& point_;
  workload::Batch batch_;
  RandomContent content_;
  std::map<std::string, std::unique_ptr<LowLatencyData>> data_;
  std::map<std::string, std::unique_ptr<GpuLowLatency>> cases_;
  std::vector<Item> graphs_;
  std::unique_ptr<Company> company_;
  std::vector<std::string> others_;
  Series series_;
};

LowLatencyRun::LowLatencyRun(const Bench& bench, const Point& point)
    : bench_(bench),
      point_(point),
      batch_(point.batch(bench.num_ranks)),
      content_(point.hidden, bench.num_ranks, point.tokens, kContentSeed) {
  for (const std::string& dtype : point.dtypes) {
    data_[dtype] = std::make_unique<LowLatencyData>(
        batch_, bench.rank, point.hidden, dtype == "fp8" ? Wire::kFP8 : Wire::kBF16, content_, point.max_tokens);
    cases_[dtype] = std::make_unique<GpuLowLatency>(*bench.engine, *data_[dtype], point.sms, bench.timer->stream());
  }
  if (point.product) company_ = std::make_unique<Company>(*bench.timer);
}

void LowLatencyRun::add_graph(const std::string& dtype, const std::string& mode, GpuLowLatency* one,
                              const std::function<void()>& put) {
  Item item{dtype, mode, one, nullptr};
  item.graph = std::make_unique<Graph>(bench_.timer->stream(), [&] {
    for (int i = 0; i < kPairsPerGraph; ++i) put();
  });
  graphs_.push_back(std::move(item));
}

void LowLatencyRun::measure_graphs(int replays) {
  for (int i = 0; i < replays; ++i) {
    for (const Item& item : graphs_) {
      series_.add(item.name(), bench_.timer->replayed(item.graph->get(), kPairsPerGraph));
    }
    measure_steps();
  }
  bench_.engine->check();
}

void LowLatencyRun::measure_steps() {
  const int rows = static_cast<int>(point_.tokens);
  if (rows > probes::Step::kMostRows) return;
  for (const int bytes : {kStepFp8Bytes, kStepBf16Bytes}) {
    for (const int blocks : Probes::step_blocks(rows, bench_.num_ranks, bench_.num_gpus)) {
      for (const auto form : {probes::StepForm::kCopied, probes::StepForm::kTight}) {
        series_.add(name_of_step(form, bytes, blocks), bench_.probes->step(form, bytes, rows, blocks));
      }
    }
  }
}

void LowLatencyRun::measure_eager() {
  for (auto& [dtype, one] : cases_) {
    std::vector<double> us = bench_.timer->queued([&, one = one.get()](int) {
      for (int i = 0; i < kPairsPerGraph; ++i) one->pair();
    });
    std::vector<double> host = bench_.timer->host_us();
    for (double& value : us) value /= kPairsPerGraph;
    for (double& value : host) value /= kPairsPerGraph;
    series_.add(dtype + "eager", us);
    series_.add("host" + dtype + "eager", bench_.timer->meeting().largest(bench_.rank, host));
  }
  bench_.engine->check();
}

/// Halves by hooks, each between events of its own: launches and events included, so their sum exceeds the pair's period.
void LowLatencyRun::measure_parts() {
  for (auto& [dtype, pointer] : cases_) {
    GpuLowLatency* const one = pointer.get();
    const auto receive = [one](int) { one->receive(); };
    const auto send_dispatch = [one](int) { one->dispatch_send(); };
    const auto send_combine = [one](int) { one->combine_send(); };
    const auto combine = [one](int) { one->combine(); };
    const auto dispatch = [one](int) { one->dispatch(); };
    series_.add(dtype + "dispatch", bench_.timer->queued(dispatch, {}, combine));
    series_.add(dtype + "combine", bench_.timer->queued(combine, dispatch));
    series_.add(dtype + "dispatch_send", bench_.timer->queued(send_dispatch, {}, receive));
    series_.add(dtype + "dispatch_recv", bench_.timer->queued(receive, send_dispatch));
    series_.add(dtype + "combine_send", bench_.timer->queued(send_combine, {}, receive));
    series_.add(dtype + "combine_recv", bench_.timer->queued(receive, send_combine));
  }
  bench_.engine->check();
}

/// What a matrix product takes between a call with a hook and its hook, once the send half has ended, and what it takes alone.
void LowLatencyRun::measure_pending() {
  const auto beside = [&](const std::string& name) {
    check(cudaStreamSynchronize(bench_.timer->stream()), "cudaStreamSynchronize");
    series_.add(name, company_->alone());
  };
  for (auto& [dtype, pointer] : cases_) {
    GpuLowLatency* const one = pointer.get();
    beside("alone" + dtype);
    one->dispatch_send();
    beside("pending_dispatch" + dtype);
    one->receive();
    one->combine_send();
    beside("pending_combine" + dtype);
    one->receive();
  }
  bench_.engine->check();
}

double LowLatencyRun::wrong() {
  double all = 0;
  for (auto& [dtype, one] : cases_) {
    for (const bool hooks : {false, true}) {
      if (hooks && !point_.wants("hook") && !point_.wants("parts")) continue;
      bench_.timer->meeting().barrier();
      all += bench_.timer->meeting().sum(bench_.rank, static_cast<double>(one->wrong(hooks)));
    }
  }
  return all;
}

double LowLatencyRun::run() {
  double all = wrong();
  if (company_) {  // everything else is another point's
    for (int round = 0; round < bench_.rounds; ++round) measure_pending();
    all += wrong();
    report(all);
    return all;
  }
  for (int i = 1; i <= kPairsBeforeWrap; ++i) {
    cases_.begin()->second->pair();
    // Ranks that share a process must not fill the queue of one GPU.
    if (i % kPairsPerGraph == 0) check(cudaStreamSynchronize(bench_.timer->stream()), "cudaStreamSynchronize");
  }
  for (auto& [dtype, pointer] : cases_) {
    GpuLowLatency* const one = pointer.get();
    if (point_.wants("graph")) add_graph(dtype, "graph", one, [one] { one->pair(); });
    if (point_.wants("hook")) add_graph(dtype, "hook", one, [one] { one->pair_by_hooks(); });
  }
  measure_graphs(kReplaysDropped);  // yardsticks too: whatever is done for the first time
  series_ = Series();
  for (int round = 0; round < bench_.rounds; ++round) {
    measure_graphs(kReplaysPerRound);
    if (point_.wants("eager")) measure_eager();
    if (point_.wants("parts")) measure_parts();
  }
  all += wrong();
  report(all);
  return all;
}

void LowLatencyRun::report(double wrong) {
  const auto base = [&](const std::string& who, const std::string& op, const std::string& dtype) {
    Line line;
    line.text("who", who).text("kind", "ll").text("op", op).text("dtype", dtype).shape(point_, bench_.num_ranks);
    return line.number("max_tokens", static_cast<double>(data_.begin()->second->max_tokens()));
  };
  const double wire_rows =
      bench_.timer->meeting().largest(bench_.rank, static_cast<double>(data_.begin()->second->wire_rows()));
  const auto pair = [&](const std::string& dtype, const std::string& mode) {
    const std::vector<double>& us = series_.of(dtype + mode);
    if (us.empty()) return;
    Line line = base("anyep", "pair", dtype).text("mode", mode).number("wire_rows", wire_rows);
    bench_.report(line.number("wrong", wrong).samples("us", us).samples("host_us", series_.of("host" + dtype + mode)));
  };
  for (const std::string& dtype : point_.dtypes) {
    for (const char* const mode : {"graph", "hook", "eager"}) pair(dtype, mode);
    for (const char* const part :
         {"dispatch", "combine", "dispatch_send", "dispatch_recv", "combine_send", "combine_recv"}) {
      const std::vector<double>& us = series_.of(dtype + part);
      if (us.empty()) continue;
      bench_.report(base("anyep", part, dtype).text("mode", "parts").number("wrong", wrong).samples("us", us));
    }
  }
  for (const std::string& dtype : point_.dtypes) {
    for (const char* const op : {"pending_dispatch", "pending_combine"}) {
      const std::vector<double>& us = series_.of(op + dtype);
      if (us.empty()) continue;
      Line line = base("anyep", op, dtype).text("mode", "hook").text("beside", "product").number("wrong", wrong);
      bench_.report(line.samples("us", us).samples("alone_us", series_.of("alone" + dtype)));
    }
  }
  for (const int bytes : {kStepFp8Bytes, kStepBf16Bytes}) {
    for (const int blocks : Probes::step_blocks(static_cast<int>(point_.tokens), bench_.num_ranks, bench_.num_gpus)) {
      for (const auto form : {probes::StepForm::kCopied, probes::StepForm::kTight}) {
        const std::vector<double>& us = series_.of(name_of_step(form, bytes, blocks));
        if (us.empty()) continue;
        Line line = base("probe", "step", bytes == kStepFp8Bytes ? "fp8" : "bf16");
        line.text("form", form == probes::StepForm::kTight ? "tight" : "copied");
        line.number("row_bytes", bytes).number("blocks", blocks).number("wrong", 0);
        bench_.report(line.samples("us", us));
      }
    }
  }
}

}  // namespace

double run_low_latency(const Bench& bench, const Point& point) {
  return LowLatencyRun(bench, point).run();
}

}  // namespace anyep::bench
