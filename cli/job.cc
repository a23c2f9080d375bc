#include "cli/job.h"

#include <anyep/engine.h>

#include <algorithm>
#include <cstring>

#include "bench/support/budget.h"
#include "bench/support/high_throughput_case.h"
#include "bench/support/memory_copy.h"
#include "cli/decode.h"
#include "cli/table.h"
#include "cli/text_content.h"
#include "core/routing.h"

namespace anyep::cli {
namespace {

constexpr int kCopies = 5;

Options waiting() {
  Options options;
  options.wait = true;
  return options;
}

Engine make_engine(const Job& job, Bootstrap& bootstrap) {
  const JobOptions& options = job.options;
  const std::int64_t hidden = options.model.hidden;
  const int ranks = options.team.num_ranks;
  Budget budget;
  // Dispatched rows, FP8 with scales, and answers, BF16.
  const std::int64_t row_bytes = hidden + (hidden + 127) / 128 * 4 + 2 * hidden;
  budget.rows_bytes = bench::rows_bytes_for(bench::most_rows_bytes(ranks, options.chunk_tokens, row_bytes), ranks);
  budget.low_latency_bytes = low_latency_bytes_for(decode_shape(job), ranks);
  budget.max_experts = std::max(budget.max_experts, options.model.num_experts);
  return Engine::create(budget, Topology::discover(bootstrap), Tuning::from_environment(), bootstrap);
}

/// High throughput of one rank.
class Throughput {
 public:
  Throughput(const Job& job, int rank, Engine& engine, Board& board)
      : job_(job), rank_(rank), engine_(engine), board_(board) {}
  void run_chunk(std::int64_t chunk);

 private:
  void answer(const bench::HighThroughputData& data, const Rows& rows, std::uint16_t* out);
  void time(Series series, double start_us) { board_.add(rank_, series, bench::now_us() - start_us); }

  const Job& job_;
  int rank_;
  Engine& engine_;
  Board& board_;
};

void Throughput::run_chunk(std::int64_t chunk) {
  const std::int64_t hidden = job_.options.model.hidden;
  const workload::Batch batch = job_.text.route(job_.first_token(chunk), job_.tokens_of_chunk(chunk));
  const TextContent content(job_.text, job_.experts, batch, job_.first_token(chunk));
  double start = bench::now_us();
  const bench::HighThroughputData data(batch, rank_, hidden, bench::RowType::kFP8, content);
  time(kPrepare, start);

  engine_.barrier();
  start = bench::now_us();
  const Handle handle = engine_.route(data.shape(), data.routing(), {}, waiting());
  const std::int64_t num_rows = handle.num_rows();
  time(kRoute, start);

  start = bench::now_us();
  const OwnedRows received = engine_.make_rows(num_rows, data.shape());
  engine_.dispatch(data.input(), handle, received.view(), {}, waiting());
  time(kDispatch, start);

  Shape answer_shape = data.shape();
  answer_shape.dtype = DType::kBF16;
  answer_shape.num_scales = 0;
  const OwnedRows answers = engine_.make_rows(num_rows, answer_shape);
  start = bench::now_us();
  answer(data, received.view(), answers.view().x.as<std::uint16_t>());
  time(kExperts, start);

  std::vector<std::uint16_t> sums(static_cast<std::size_t>(data.num_tokens() * hidden));
  CombineInput in;
  in.x = answers.view().x;
  Rows out;
  out.x = TensorView::dense(sums.data(), DType::kBF16, {data.num_tokens(), hidden});
  engine_.barrier();
  start = bench::now_us();
  engine_.combine(in, handle, out, {}, waiting());
  time(kCombine, start);

  board_.add(rank_, kOwnRows, static_cast<double>(data.own_rows()));
  board_.add(rank_, kSentRows, static_cast<double>(data.sent_rows()));
  board_.add(rank_, kReceivedRows, static_cast<double>(data.received_rows()));
  board_.add(rank_, kCompared, static_cast<double>((num_rows + data.num_tokens()) * hidden));
  board_.add(rank_, kWrong, static_cast<double>(data.wrong_rows(received.view()) + data.wrong_sums(sums.data())));
}

/// From ids and weights as dispatch delivered them: local experts, -1 = hosted elsewhere.
void Throughput::answer(const bench::HighThroughputData& data, const Rows& rows, std::uint16_t* out) {
  const std::int64_t hidden = data.hidden(), top_k = data.batch().top_k;
  const int first_expert = core::expert_block(data.batch().num_experts, data.num_ranks(), rank_).first;
  std::vector<float> x(static_cast<std::size_t>(hidden)), sum(x.size());
  std::int64_t pairs = 0;
  for (std::int64_t row = 0; row < rows.x.shape[0]; ++row) {
    dequantise({rows.x.as<std::uint8_t>() + row * hidden, rows.scales.as<float>() + row * data.num_scales()}, x);
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (std::int64_t at = row * top_k; at < (row + 1) * top_k; ++at) {
      const std::int64_t local =
          rows.experts.dtype == DType::kI64 ? rows.experts.as<std::int64_t>()[at] : rows.experts.as<std::int32_t>()[at];
      if (local < 0) continue;
      job_.experts.add_answer(first_expert + static_cast<int>(local), x, rows.weights.as<float>()[at], sum);
      ++pairs;
    }
    round_row(sum, out + row * hidden);
  }
  board_.add(rank_, kPairs, static_cast<double>(pairs));
}

void measure_copies(const Job& job, int rank, Engine& engine, Board& board) {
  bench::MemoryCopy copy(job.options.copy_bytes);
  for (int i = 0; i < kCopies; ++i) {
    for (int method = 0; method < bench::MemoryCopy::kNumMethods; ++method) {
      engine.barrier();
      board.add(rank, kMemcpy + method, copy.copy(method));
    }
  }
}

}  // namespace

Job::Job(JobOptions job_options, workload::TextWorkload job_text)
    : options(std::move(job_options)),
      text(std::move(job_text)),
      experts(options.model.num_experts, options.model.hidden, options.seed) {}

std::int64_t Job::num_chunks() const {
  const std::int64_t of_all = options.chunk_tokens * options.team.num_ranks;
  return (options.tokens + of_all - 1) / of_all;
}

std::int64_t Job::first_token(std::int64_t chunk) const {
  return chunk * options.chunk_tokens * options.team.num_ranks;
}

std::vector<std::int64_t> Job::tokens_of_chunk(std::int64_t chunk) const {
  std::vector<std::int64_t> tokens;
  std::int64_t left = options.tokens - first_token(chunk);
  for (int rank = 0; rank < options.team.num_ranks; ++rank) {
    tokens.push_back(std::clamp<std::int64_t>(left, 0, options.chunk_tokens));
    left -= tokens.back();
  }
  return tokens;
}

workload::Statistics Job::routing() const {
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(options.team.num_ranks), 0);
  for (std::int64_t chunk = 0; chunk < num_chunks(); ++chunk) {
    const std::vector<std::int64_t> of_chunk = tokens_of_chunk(chunk);
    for (std::size_t rank = 0; rank < tokens.size(); ++rank) tokens[rank] += of_chunk[rank];
  }
  return workload::measure(text.route(0, tokens), options.model.num_experts, options.team.num_ranks);
}

std::vector<std::string> run_job(const Job& job, Board& board) {
  return run_team(job.options.team, [&](int rank, Bootstrap& bootstrap) {
    const bool shows = rank == 0 && job.options.show_progress;
    Engine engine = make_engine(job, bootstrap);
    measure_copies(job, rank, engine, board);
    Progress progress = shows ? Progress("high throughput", job.num_chunks()) : Progress::quiet();
    Throughput throughput(job, rank, engine, board);
    for (std::int64_t chunk = 0; chunk < job.num_chunks(); ++chunk) {
      throughput.run_chunk(chunk);
      progress.show(chunk + 1, "calls");
    }
    progress.finish();
    run_decode(job, rank, engine, board);
    engine.close();
  });
}

}  // namespace anyep::cli
