#include <algorithm>
#include <map>
#include <memory>

#include "bench/gpu/company.h"
#include "bench/gpu/high_throughput.h"
#include "bench/gpu/runs.h"
#include "bench/support/content.h"

namespace anyep::bench {
namespace {

constexpr std::uint64_t kContentSeed = 0x51ed;

/// One operation in one form.
struct Item {
  std::string op, dtype, memory, name;
  GpuHighThroughput* one;
  const HighThroughputData* data;
};

/// A yardstick at one number of SMs.
struct Pattern {
  std::string op, dtype, name;
  probes::Order order;
  int sms, row_bytes;
};

/// The fastest pattern with at most so many SMs is among these.
std::vector<int> sms_to_try(int most) {
  std::vector<int> sms;
  for (const int count : {8, 10, 12, 14, 16, 20, 24, 48}) {
    if (count < most) sms.push_back(count);
  }
  if (sms.size() > 2) sms.erase(sms.begin(), sms.end() - 2);
  sms.push_back(most);
  return sms;
}

class HighThroughputRun {
 public:
  HighThroughputRun(const Bench& bench, const Point& point);
  double run();

 private:
  void add_patterns();
  void add_items();
  void measure_round();
  void measure_in_company(const Item& item);
  void warm_up();
  double wrong(const Item& item);
  void call(const Item& item, int i) const;
  void report();

  const Bench& bench_;
  const Point& point_;
  workload::Batch batch_;
  RandomContent content_;
  std::map<std::string, std::unique_ptr<HighThroughputData>> data_;
  std::map<std::string, std::unique_ptr<GpuHighThroughput>> cases_;
  std::vector<Item> items_;
  std::vector<Pattern> patterns_;
  std::unique_ptr<Company> company_;
  Series series_;
  std::map<std::string, double> wrong_;
};

HighThroughputRun::HighThroughputRun(const Bench& bench, const Point& point)
    : bench_(bench),
      point_(point),
      batch_(point.batch(bench.num_ranks)),
      content_(point.hidden, bench.num_ranks, point.tokens, kContentSeed) {
  bench_.probes->set_routing(batch_);
  add_patterns();
  add_items();
  if (point.product) company_ = std::make_unique<Company>(*bench.timer);
}

void HighThroughputRun::add_patterns() {
  const auto add = [&](const std::string& op, const std::string& dtype, probes::Order order, int sms, int row_bytes) {
    const char* const way = order == probes::Order::kTickets ? "tickets" : "strides";
    patterns_.push_back({op, dtype, op + dtype + way + std::to_string(sms), order, sms, row_bytes});
  };
  const int hidden = static_cast<int>(point_.hidden);
  std::vector<probes::Order> orders = {probes::Order::kTickets};
  if (bench_.num_ranks > 2) orders.push_back(probes::Order::kStrides);  // what four and eight ranks are compared with
  const bool fp8 = std::find(point_.dtypes.begin(), point_.dtypes.end(), "fp8") != point_.dtypes.end();
  for (const probes::Order order : orders) {
    for (const int sms : sms_to_try(point_.sms)) {
      add("push", "bf16", order, sms, 2 * hidden);
      if (fp8 && hidden % 16 == 0) add("push", "fp8", order, sms, hidden);
      if (point_.wants("combine")) add("gather", "bf16", order, sms, 2 * hidden);
    }
  }
}

void HighThroughputRun::add_items() {
  for (const std::string& dtype : point_.dtypes) {
    const RowType type = dtype == "fp8" ? RowType::kFP8 : RowType::kBF16;
    data_[dtype] = std::make_unique<HighThroughputData>(batch_, bench_.rank, point_.hidden, type, content_);
    for (const std::string& memory : point_.memories) {
      auto& one = cases_[dtype + memory];
      one = std::make_unique<GpuHighThroughput>(*bench_.engine, *data_[dtype],
                                                memory == "window" ? Memory::kWindow : Memory::kCaller, point_.sms,
                                                bench_.timer->stream());
      for (const std::string& op : point_.ops) {
        if (op == "dispatch_ahead" && memory != "window") continue;
        if (op == "combine" && dtype != point_.dtypes.front()) continue;  // answers are BF16, whatever was dispatched
        items_.push_back(
            {op, op == "combine" ? "bf16" : dtype, memory, op + dtype + memory, one.get(), data_[dtype].get()});
      }
    }
  }
}

void HighThroughputRun::call(const Item& item, int i) const {
  if (item.op == "dispatch") {
    item.one->dispatch(i);
  } else if (item.op == "dispatch_ahead") {
    item.one->dispatch_ahead(i);
  } else if (item.op == "dispatch_cached") {
    item.one->dispatch_cached(i);
  } else {
    item.one->combine(i);
  }
}

double HighThroughputRun::wrong(const Item& item) {
  bench_.timer->meeting().barrier();
  const std::int64_t mine = item.op == "dispatch"          ? item.one->wrong_dispatch()
                            : item.op == "dispatch_ahead"  ? item.one->wrong_dispatch_ahead()
                            : item.op == "dispatch_cached" ? item.one->wrong_dispatch_cached()
                                                           : item.one->wrong_combine();
  return bench_.timer->meeting().sum(bench_.rank, static_cast<double>(mine));
}

void HighThroughputRun::measure_round() {
  for (const Pattern& pattern : patterns_) {
    series_.add(pattern.name, pattern.op == "push"
                                  ? bench_.probes->push(pattern.row_bytes, pattern.order, pattern.sms)
                                  : bench_.probes->gather(pattern.row_bytes, pattern.order, pattern.sms));
  }
  for (const Item& item : items_) {
    if (company_) {
      measure_in_company(item);
      continue;
    }
    std::vector<double> host;
    series_.add(item.name, bench_.timer->queued([&](int i) {
      call(item, i);
      if ((item.op == "dispatch" || item.op == "dispatch_ahead") && i >= Timer::kDropped)
        host.push_back(item.one->host_us());
    }));
    if (host.empty()) host = bench_.timer->host_us();
    series_.add("host" + item.name, bench_.timer->meeting().largest(bench_.rank, host));
    if (point_.idle) series_.add("idle" + item.name, bench_.timer->from_idle([&](int i) { call(item, i); }));
    bench_.engine->check();
  }
}

/// Times of a point with company are those beside it; `quiet` without, in the same round.
void HighThroughputRun::measure_in_company(const Item& item) {
  series_.add("quiet" + item.name, bench_.timer->queued([&](int i) { call(item, i); }));
  series_.add(item.name, company_->beside([&](int i) { call(item, i); }));
  series_.add("beside" + item.name, company_->with_calls());
  series_.add("alone" + item.name, company_->alone());
  bench_.engine->check();
}

/// A batch of each that does not count: calls that queue up hold more rows at a time than one, and where that exceeds the window,
/// it grows now (docs/gpu.md).
void HighThroughputRun::warm_up() {
  for (const Item& item : items_) (void)bench_.timer->queued([&](int i) { call(item, i); });
  bench_.engine->check();
}

double HighThroughputRun::run() {
  double all = 0;
  for (const Item& item : items_) all += wrong_[item.name] = wrong(item);
  warm_up();
  for (int round = 0; round < bench_.rounds; ++round) measure_round();
  for (const Item& item : items_) {
    const double after = wrong(item);
    wrong_[item.name] += after;
    all += after;
  }
  report();
  return all;
}

void HighThroughputRun::report() {
  for (const Pattern& pattern : patterns_) {
    Line line;
    line.text("who", "probe").text("kind", "ht").text("op", pattern.op).text("dtype", pattern.dtype);
    line.shape(point_, bench_.num_ranks).number("probe_sms", pattern.sms);
    line.text("order", pattern.order == probes::Order::kTickets ? "tickets" : "strides");
    bench_.report(line.number("wrong", 0).samples("us", series_.of(pattern.name)));
  }
  for (const Item& item : items_) {
    Meeting& meeting = bench_.timer->meeting();
    const auto most = [&](std::int64_t mine) { return meeting.largest(bench_.rank, static_cast<double>(mine)); };
    const bool fp8 = item.dtype == "fp8";
    Line line;
    line.text("who", "anyep").text("kind", "ht").text("op", item.op).text("dtype", item.dtype);
    line.text("memory", item.memory).shape(point_, bench_.num_ranks);
    line.number("wire_rows", most(std::max(item.data->sent_rows(), item.data->received_rows())));
    line.number("logical_rows", most(item.data->num_rows()));
    line.number("row_bytes",
                static_cast<double>(fp8 ? point_.hidden + (point_.hidden + 127) / 128 * 4 : 2 * point_.hidden));
    line.number("wrong", wrong_[item.name]).samples("us", series_.of(item.name));
    line.samples("host_us", series_.of("host" + item.name)).samples("idle_us", series_.of("idle" + item.name));
    if (company_) {
      line.text("beside", "product").samples("beside_us", series_.of("beside" + item.name));
      line.samples("alone_us", series_.of("alone" + item.name)).samples("quiet_us", series_.of("quiet" + item.name));
    }
    bench_.report(line);
  }
}

}  // namespace

double run_high_throughput(const Bench& bench, const Point& point) {
  return HighThroughputRun(bench, point).run();
}

void run_copies(const Bench& bench, const std::vector<int>& sms, const std::vector<int>& row_bytes) {
  for (const int bytes : row_bytes) {
    for (const int count : sms) {
      for (const auto direction : {probes::Direction::kPush, probes::Direction::kPull}) {
        Line line;
        line.text("who", "probe").text("kind", "ht").text("op", "ceiling");
        line.text("order", direction == probes::Direction::kPush ? "push" : "pull");
        line.number("row_bytes", bytes).number("ranks", bench.num_ranks).number("probe_sms", count);
        bench.report(line.number("wrong", 0).samples("gbs", {bench.probes->copy_gbs(bytes, direction, count)}));
      }
    }
  }
}

}  // namespace anyep::bench
