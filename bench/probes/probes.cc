#include "bench/probes/probes.h"

#include <algorithm>
#include <stdexcept>

#include "bench/probes/check.h"
#include "bench/support/samples.h"
#include "core/routing.h"

namespace anyep::bench {
namespace {

constexpr std::uint64_t kInputSeed = 100, kRowsSeed = 200;
/// Device words: counters, the check's sum, the steps' epochs.
constexpr std::size_t kCountersAt = 0, kWrongAt = 64, kFailedAt = 128, kEpochsAt = 256,
                      kWordsBytes = kEpochsAt + probes::Step::kMostBlocks * sizeof(std::uint32_t);
constexpr std::size_t kFlagsBytes = 1 << 16;
constexpr std::int64_t kMostStepRowBytes = 14336;

std::size_t size_of_all(std::int64_t bytes) {
  constexpr std::size_t kAlignment = 4096;
  return (static_cast<std::size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
}

template <class T>
DeviceMemory uploaded(const std::vector<T>& values) {
  DeviceMemory memory(std::max<std::size_t>(1, values.size()) * sizeof(T));
  check(cudaMemcpy(memory.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return memory;
}

int tokens_per_range(int num_tokens) {
  return std::max(1, (num_tokens + probes::Places::kRanges - 1) / probes::Places::kRanges);
}

/// Rows of the whole operation become rows of their range.
void make_relative(std::vector<std::int32_t>& places, std::vector<std::int32_t>& before, int num_ranks, int per_range) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  std::vector<bool> started(before.size(), false);
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (places[i] < 0) continue;
    const std::size_t range = i / ranks / static_cast<std::size_t>(per_range) * ranks + i % ranks;
    if (!started[range]) before[range] = places[i];
    started[range] = true;
    places[i] -= before[range];
  }
}

}  // namespace

DeviceMemory::DeviceMemory(std::size_t bytes) {
  check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 16)), "cudaMalloc");
}
DeviceMemory::~DeviceMemory() {
  (void)cudaFree(data_);
}

Probes::Probes(Timer& timer, const ProbeLimits& limits)
    : timer_(&timer), limits_(limits), rank_(timer.rank()), num_ranks_(timer.meeting().num_ranks()) {
  if (num_ranks_ > probes::kMaxRanks) throw std::invalid_argument("probes serve up to 8 ranks");
  std::size_t at = kFlagsBytes;
  const auto take = [&at](std::int64_t bytes) { return std::exchange(at, at + size_of_all(bytes)); };
  data_at_ = take(num_ranks_ * static_cast<std::int64_t>(probes::Step::kMostRows) * kMostStepRowBytes);
  rows_at_ = take(num_ranks_ * limits.tokens * limits.row_bytes);
  copy_at_ = take(limits.copy_bytes);
  copy_to_at_ = take(limits.copy_bytes);
  shared_ = std::make_unique<PeerMemory>(timer.meeting(), rank_, at);
  const std::int64_t input =
      std::max<std::int64_t>(limits.tokens * limits.row_bytes, probes::Step::kMostRows * kMostStepRowBytes);
  x_ = DeviceMemory(static_cast<std::size_t>(input));
  out_ = DeviceMemory(static_cast<std::size_t>(limits.tokens * limits.row_bytes));
  words_ = DeviceMemory(kWordsBytes);
  check(cudaMemset(words_.data(), 0, kWordsBytes), "cudaMemset");
  const auto seed = static_cast<std::uint64_t>(rank_);
  probes::fill(x_.data(), static_cast<std::size_t>(input), kInputSeed + seed, false, timer.stream());
  probes::fill(shared_->own() + copy_at_, static_cast<std::size_t>(limits.copy_bytes), kRowsSeed, true, timer.stream());
  check(cudaStreamSynchronize(timer.stream()), "cudaStreamSynchronize");
  timer.meeting().barrier();
}

void Probes::set_routing(const workload::Batch& batch) {
  const auto ranks = static_cast<std::size_t>(num_ranks_);
  std::vector<std::int32_t> places, source, token, rows(ranks, 0);
  for (int from = 0; from < num_ranks_; ++from) {
    for (std::int64_t i = 0; i < batch.num_tokens(from); ++i) {
      std::vector<std::int32_t> of_token(ranks, -1);
      for (int choice = 0; choice < batch.top_k; ++choice) {
        const std::int64_t id = batch.experts_of(from)[static_cast<std::size_t>(i * batch.top_k + choice)];
        if (id < 0) continue;
        const int to = core::rank_of_expert(batch.num_experts, num_ranks_, static_cast<int>(id));
        std::int32_t& row = of_token[static_cast<std::size_t>(to)];
        if (row < 0) row = rows[static_cast<std::size_t>(to)]++;
      }
      if (of_token[static_cast<std::size_t>(rank_)] >= 0) {
        source.push_back(from);
        token.push_back(static_cast<std::int32_t>(i));
      }
      if (from == rank_) places.insert(places.end(), of_token.begin(), of_token.end());
    }
  }
  num_tokens_ = static_cast<int>(batch.num_tokens(rank_));
  num_rows_ = static_cast<int>(source.size());
  std::vector<std::int32_t> before(static_cast<std::size_t>(probes::Places::kRanges) * ranks, 0);
  make_relative(places, before, num_ranks_, tokens_per_range(num_tokens_));
  places_ = uploaded(places);
  before_ = uploaded(before);
  source_ = uploaded(source);
  token_ = uploaded(token);
  timer_->meeting().barrier();
}

probes::Places Probes::places() const {
  return {places_.as<const std::int32_t>(),
          before_.as<const std::int32_t>(),
          num_tokens_,
          tokens_per_range(num_tokens_),
          num_ranks_,
          rank_};
}

probes::Push Probes::push_params(int row_bytes) const {
  probes::Push push;
  push.places = places();
  push.x = x_.data();
  push.out = shared_->at(rows_at_);
  push.row_bytes = row_bytes;
  push.counters = reinterpret_cast<probes::Counters*>(words_.data() + kCountersAt);
  return push;
}

probes::Gather Probes::gather_params(int row_bytes) const {
  probes::Gather gather;
  gather.places = places();
  gather.in = shared_->at(rows_at_);
  gather.out = out_.data();
  gather.row_bytes = row_bytes;
  gather.counters = reinterpret_cast<probes::Counters*>(words_.data() + kCountersAt);
  return gather;
}

std::vector<double> Probes::push(int row_bytes, probes::Order order, int sms) {
  const probes::Push params = push_params(row_bytes);
  return timer_->queued([&](int) { probes::push(params, order, sms, timer_->stream()); });
}

std::vector<double> Probes::gather(int row_bytes, probes::Order order, int sms) {
  const probes::Gather params = gather_params(row_bytes);
  return timer_->queued([&](int) { probes::gather(params, order, sms, timer_->stream()); });
}

double Probes::copy_gbs(int row_bytes, probes::Direction direction, int sms) {
  probes::Copy copy;
  copy.from = shared_->at(copy_at_);
  copy.to = shared_->at(copy_to_at_);
  copy.rank = rank_;
  copy.num_ranks = num_ranks_;
  copy.row_bytes = row_bytes;
  copy.num_rows = static_cast<int>(limits_.copy_bytes / row_bytes);
  const double us = median(timer_->queued([&](int) { probes::copy(copy, direction, sms, timer_->stream()); }));
  return static_cast<double>(copy.num_rows) * row_bytes / us * 1e-3;
}

std::vector<int> Probes::step_blocks(int rows, int num_ranks, int num_gpus) {
  constexpr int kMostRowsOfBlock = 16;  // with more to push one after another, a block is never best
  std::vector<int> blocks;
  for (const int count : {1, 8, 32, 128}) {
    const bool useful = (rows >= count || (rows <= 1 && count == 1)) && rows <= count * kMostRowsOfBlock;
    if (useful && count * num_ranks <= probes::Step::kMostBlocks * num_gpus) blocks.push_back(count);
  }
  return blocks;
}

cudaGraphExec_t Probes::step_graph(probes::StepForm form, int row_bytes, int rows, int blocks) {
  std::unique_ptr<Graph>& graph = steps_[{form, row_bytes, rows, blocks}];
  if (!graph) {
    probes::Step step;
    step.base = shared_->at(0);
    step.flags_at = flags_at_;
    step.data_at = data_at_;
    step.x = x_.data();
    step.epoch = reinterpret_cast<std::uint32_t*>(words_.data() + kEpochsAt);
    step.failed = reinterpret_cast<std::uint32_t*>(words_.data() + kFailedAt);
    step.rank = rank_;
    step.num_ranks = num_ranks_;
    step.num_rows = rows;
    step.row_bytes = row_bytes;
    graph = std::make_unique<Graph>(timer_->stream(), [&] {
      for (int i = 0; i < kStepsPerGraph; ++i) probes::step(step, form, blocks, timer_->stream());
    });
  }
  return graph->get();
}

double Probes::empty_step() {
  std::unique_ptr<Graph>& graph = steps_[{probes::StepForm::kTight, 0, 0, 0}];
  if (!graph) {
    graph = std::make_unique<Graph>(timer_->stream(), [&] {
      for (int i = 0; i < kStepsPerGraph; ++i) probes::empty_step(timer_->stream());
    });
  }
  return timer_->replayed(graph->get(), kStepsPerGraph);
}

unsigned long long Probes::wrong() const {
  unsigned long long wrong = 0;
  check(cudaMemcpy(&wrong, words_.data() + kWrongAt, sizeof wrong, cudaMemcpyDeviceToHost), "cudaMemcpy");
  check(cudaMemset(words_.data() + kWrongAt, 0, sizeof wrong), "cudaMemset");
  return wrong;
}

double Probes::wrong_push(int row_bytes, probes::Order order, int sms) {
  const std::size_t bytes = static_cast<std::size_t>(num_rows_) * static_cast<std::size_t>(row_bytes);
  check(cudaMemset(shared_->own() + rows_at_, 0xA5, bytes), "cudaMemset");
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  timer_->meeting().barrier();
  probes::push(push_params(row_bytes), order, sms, timer_->stream());
  check(cudaStreamSynchronize(timer_->stream()), "cudaStreamSynchronize");
  timer_->meeting().barrier();
  probes::RowCheck rows;
  rows.rows = shared_->own() + rows_at_;
  rows.source = source_.as<const std::int32_t>();
  rows.token = token_.as<const std::int32_t>();
  rows.num_rows = num_rows_;
  rows.row_bytes = row_bytes;
  rows.seed = kInputSeed;
  rows.wrong = reinterpret_cast<unsigned long long*>(words_.data() + kWrongAt);
  probes::count_wrong_rows(rows, timer_->stream());
  check(cudaStreamSynchronize(timer_->stream()), "cudaStreamSynchronize");
  return timer_->meeting().sum(rank_, static_cast<double>(wrong()));
}

double Probes::wrong_gather(int row_bytes, probes::Order order, int sms) {
  const auto seed = kRowsSeed + static_cast<std::uint64_t>(rank_);
  const std::size_t bytes = static_cast<std::size_t>(num_rows_) * static_cast<std::size_t>(row_bytes);
  probes::fill(shared_->own() + rows_at_, bytes, seed, false, timer_->stream());
  check(cudaStreamSynchronize(timer_->stream()), "cudaStreamSynchronize");
  timer_->meeting().barrier();
  const probes::Gather gather = gather_params(row_bytes);
  probes::gather(gather, order, sms, timer_->stream());
  probes::count_wrong_sums(gather, kRowsSeed, reinterpret_cast<unsigned long long*>(words_.data() + kWrongAt),
                           timer_->stream());
  check(cudaStreamSynchronize(timer_->stream()), "cudaStreamSynchronize");
  return timer_->meeting().sum(rank_, static_cast<double>(wrong()));
}

bool Probes::failed() {
  std::uint32_t failed = 0;
  check(cudaMemcpy(&failed, words_.data() + kFailedAt, sizeof failed, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return timer_->meeting().sum(rank_, failed) != 0;
}

}  // namespace anyep::bench
