#include "cli/decode.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "bench/support/low_latency_case.h"
#include "bench/support/memory_copy.h"
#include "cli/table.h"
#include "cli/text_content.h"
#include "core/routing.h"

namespace anyep::cli {
namespace {

constexpr int kMicroBatches = 2;

LowLatencyOptions hooked(Wire wire) {
  LowLatencyOptions options;
  options.hook = true;
  options.wire = wire;
  return options;
}

/// One micro-batch of one rank; its memory serves all steps.
class MicroBatch {
 public:
  MicroBatch(const Job& job, int rank, Engine& engine)
      : job_(job),
        rank_(rank),
        engine_(engine),
        shape_(decode_shape(job)),
        block_(core::expert_block(shape_.num_experts, engine.num_ranks(), rank)),
        slabs_(block_.count, engine.num_ranks(), shape_.max_tokens, shape_.hidden, Wire::kFP8),
        answers_(bench::Buffer::untouched(
            static_cast<std::size_t>(block_.count * slabs_.rows_per_expert() * shape_.hidden * 2))),
        sums_(static_cast<std::size_t>(shape_.max_tokens * shape_.hidden)) {}

  /// Takes the tokens from `first` on.
  void load(std::int64_t first) {
    const std::vector<std::int64_t> tokens(static_cast<std::size_t>(engine_.num_ranks()), shape_.max_tokens);
    data_.reset();
    content_.reset();
    batch_ = job_.text.route(first, tokens);
    content_ = std::make_unique<TextContent>(job_.text, job_.experts, batch_, first);
    data_ = std::make_unique<bench::LowLatencyData>(batch_, rank_, shape_.hidden, Wire::kFP8, *content_);
  }
  Pending send() {
    return engine_.low_latency_dispatch(shape_, data_->x(), data_->routing(), slabs_.view(), {}, hooked(Wire::kFP8));
  }
  void answer();
  Pending send_back() {
    return engine_.low_latency_combine(shape_, answers_view(), data_->routing(), out(), {}, hooked(Wire::kBF16));
  }
  std::int64_t wrong() const { return data_->wrong_slabs(slabs_.view()) + data_->wrong_sums(sums_.data()); }
  std::int64_t compared() const { return (num_pairs_ + data_->num_tokens()) * shape_.hidden; }
  std::int64_t wire_rows() const { return data_->wire_rows(); }
  std::int64_t num_pairs() const { return num_pairs_; }

 private:
  ExpertSlabs answers_view() const {
    ExpertSlabs view = slabs_.view();
    view.x = TensorView::dense(answers_.data(), DType::kBF16, view.x.shape);
    view.scales = {};
    return view;
  }
  TensorView out() { return TensorView::dense(sums_.data(), DType::kBF16, {data_->num_tokens(), shape_.hidden}); }

  const Job& job_;
  int rank_;
  Engine& engine_;
  Shape shape_;
  core::ExpertBlock block_;
  bench::SlabMemory slabs_;
  bench::Buffer answers_;
  std::vector<std::uint16_t> sums_;
  workload::Batch batch_;
  std::unique_ptr<TextContent> content_;
  std::unique_ptr<bench::LowLatencyData> data_;
  std::int64_t num_pairs_ = 0;
};

void MicroBatch::answer() {
  const ExpertSlabs& slabs = slabs_.view();
  const std::int64_t rows = slabs_.rows_per_expert(), hidden = shape_.hidden;
  std::vector<float> x(static_cast<std::size_t>(hidden)), sum(x.size());
  num_pairs_ = 0;
  for (int expert = 0; expert < block_.count; ++expert) {
    const std::int32_t count = slabs.counts.as<std::int32_t>()[expert];
    for (std::int64_t row = 0; row < count; ++row) {
      const std::int64_t index = expert * rows + row;
      const float* const scales = slabs.scales.as<float>() + expert * slabs.scales.strides[0] + row;
      dequantise({slabs.x.as<std::uint8_t>() + index * hidden, scales, slabs.scales.strides[2]}, x);
      std::fill(sum.begin(), sum.end(), 0.0F);
      job_.experts.add_answer(block_.first + expert, x, 1.0F, sum);
      round_row(sum, answers_.as<std::uint16_t>() + index * hidden);
    }
    num_pairs_ += count;
  }
}

/// Adds up the time of calls of one kind within a step.
class StepClock {
 public:
  template <class F>
  auto operator()(Series series, F&& call) {
    const double start = bench::now_us();
    struct Stop {
      StepClock& clock;
      Series series;
      double start;
      ~Stop() { clock.us_[series] += bench::now_us() - start; }
    } stop{*this, series, start};
    return call();
  }
  void write(int rank, Board& board) {
    for (const Series series : {kDispatchSend, kDispatchReceive, kDecodeExperts, kCombineSend, kCombineReceive}) {
      board.add(rank, series, us_[series]);
      us_[series] = 0;
    }
  }

 private:
  double us_[kNumSeries] = {};
};

/// Sends of one micro-batch overlap with the experts of the other: at most two operations wait for their hooks.
void run_step(MicroBatch& a, MicroBatch& b, StepClock& clock) {
  Pending dispatch_a = clock(kDispatchSend, [&] { return a.send(); });
  Pending dispatch_b = clock(kDispatchSend, [&] { return b.send(); });
  clock(kDispatchReceive, [&] { dispatch_a.receive().wait(); });
  clock(kDecodeExperts, [&] { a.answer(); });
  Pending combine_a = clock(kCombineSend, [&] { return a.send_back(); });
  clock(kDispatchReceive, [&] { dispatch_b.receive().wait(); });
  clock(kDecodeExperts, [&] { b.answer(); });
  Pending combine_b = clock(kCombineSend, [&] { return b.send_back(); });
  clock(kCombineReceive, [&] { combine_a.receive().wait(); });
  clock(kCombineReceive, [&] { combine_b.receive().wait(); });
}

}  // namespace

Shape decode_shape(const Job& job) {
  Shape shape;
  shape.num_experts = job.options.model.num_experts;
  shape.top_k = job.options.model.top_k;
  shape.hidden = job.options.model.hidden;
  shape.max_tokens = job.options.decode_tokens;
  return shape;
}

void run_decode(const Job& job, int rank, Engine& engine, Board& board) {
  if (job.options.decode_steps == 0) return;
  const bool shows = rank == 0 && job.options.show_progress;
  Progress progress = shows ? Progress("decode", job.options.decode_steps) : Progress::quiet();
  MicroBatch a(job, rank, engine), b(job, rank, engine);
  StepClock clock;
  const std::int64_t batch_tokens = job.options.decode_tokens * engine.num_ranks();
  for (int step = 0; step < job.options.decode_steps; ++step) {
    a.load(kMicroBatches * step * batch_tokens);
    b.load((kMicroBatches * step + 1) * batch_tokens);
    engine.barrier();
    const double start = bench::now_us();
    run_step(a, b, clock);
    board.add(rank, kDecodeStep, bench::now_us() - start);
    clock.write(rank, board);
    board.add(rank, kDecodeWireRows, static_cast<double>(a.wire_rows() + b.wire_rows()));
    board.add(rank, kPairs, static_cast<double>(a.num_pairs() + b.num_pairs()));
    board.add(rank, kCompared, static_cast<double>(a.compared() + b.compared()));
    board.add(rank, kWrong, static_cast<double>(a.wrong() + b.wrong()));
    progress.show(step + 1, "steps of two micro-batches");
  }
  progress.finish();
}

}  // namespace anyep::cli
