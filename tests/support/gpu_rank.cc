#if ANYEP_CUDA
#include "support/gpu_rank.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>
#include <utility>

namespace anyep::test {
namespace {

void must(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

std::uint16_t bf16_of(float value) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}
float float_of(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

}  // namespace

int gpus_seen_by_a_child() {
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    _exit(cudaGetDeviceCount(&count) == cudaSuccess ? count : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

GpuRank::GpuRank(Bootstrap& bootstrap, std::chrono::milliseconds limit, int num_gpus, Serves serves) {
  Topology topology = Topology::discover(bootstrap);
  topology.device = topology.rank % num_gpus;
  must(cudaSetDevice(topology.device), "cudaSetDevice");
  must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  ids_ = new_tensor(DType::kI64, {kTokens, kTopK}).as<std::int64_t>();
  x_ = new_tensor(DType::kBF16, {kTokens, kHidden}).as<std::uint16_t>();
  out_ = new_tensor(DType::kBF16, {kTokens, kHidden}).as<std::uint16_t>();
  num_experts_ = kExpertsPerRank * topology.num_ranks();
  Budget budget;
  budget.rows_bytes = std::int64_t{128} << 20;
  if (serves != Serves::kExchanges) {
    budget.low_latency_bytes = low_latency_bytes_for(pair_shape(), topology.num_ranks());
    budget.masks = serves == Serves::kPairsWithMasks;
    take_slabs(topology.num_ranks());
  }
  Tuning tuning = Tuning::from_environment();
  tuning.timeout = limit;
  tuning.startup_timeout = std::max<std::chrono::nanoseconds>(limit, std::chrono::seconds(30));
  tuning.close_timeout = std::chrono::seconds(1);
  engine_ = Engine::create(budget, topology, tuning, bootstrap);
  change_inputs(0);
}

void GpuRank::change_inputs(unsigned salt) {
  std::vector<std::int64_t>& ids = host_ids_;
  ids.resize(static_cast<std::size_t>(kTokens * kTopK));
  ranks_of_.clear();
  for (std::int64_t token = 0; token < kTokens; ++token) {
    unsigned at = 0;
    for (int choice = 0; choice < kTopK; ++choice) {
      const std::int64_t expert = (token * 7 + choice * 5 + engine_->rank() + salt * (token % 3)) % num_experts_;
      ids[static_cast<std::size_t>(token * kTopK + choice)] = expert;
      at |= 1u << (expert / kExpertsPerRank);
    }
    ranks_of_.push_back(std::popcount(at));
  }
  host_x_.clear();
  for (std::int64_t i = 0; i < kTokens * kHidden; ++i) host_x_.push_back(bf16_of(static_cast<float>((i + salt) % 61)));
  must(cudaMemcpyAsync(ids_, ids.data(), ids.size() * 8, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
  must(cudaMemcpyAsync(x_, host_x_.data(), host_x_.size() * 2, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
  must(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

TensorView GpuRank::new_tensor(DType type, const Extents& shape) {
  const TensorView view = TensorView::dense(nullptr, type, shape);
  void* memory = nullptr;
  must(cudaMalloc(&memory, static_cast<std::size_t>(view.num_elements()) * size_of(type)), "cudaMalloc");
  memory_.push_back(memory);
  return TensorView::dense(memory, type, shape);
}

void GpuRank::take_slabs(std::int64_t num_ranks) {
  const std::int64_t rows = num_ranks * kPairTokens;
  slabs_.x = new_tensor(DType::kBF16, {kExpertsPerRank, rows, kHidden});
  slabs_.counts = new_tensor(DType::kI32, {kExpertsPerRank});
  slabs_.source = new_tensor(DType::kI32, {kExpertsPerRank, rows});
  slabs_.range = new_tensor(DType::kI64, {kExpertsPerRank, num_ranks});
  slabs_.rows = new_tensor(DType::kI32, {num_ranks, kPairTokens, kTopK});
  weights_ = new_tensor(DType::kF32, {kPairTokens, kTopK});
  const std::vector<float> ones(static_cast<std::size_t>(kPairTokens * kTopK), 1.0F);
  must(cudaMemcpyAsync(weights_.data, ones.data(), ones.size() * sizeof(float), cudaMemcpyHostToDevice, stream_),
       "cudaMemcpyAsync");
  must(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

void GpuRank::take_worst_case_rows() {
  worst_case_rows_ = engine_->make_rows(kTokens * engine_->num_ranks(), Shape{num_experts_, 0, kHidden});
}

Routing GpuRank::routing() const {
  Routing routing;
  routing.experts = TensorView::dense(ids_, DType::kI64, {kTokens, kTopK});
  return routing;
}

Rows GpuRank::input() const {
  Rows in;
  in.x = TensorView::dense(x_, DType::kBF16, {kTokens, kHidden});
  return in;
}

void GpuRank::launch_without_host(Together together) {
  Rows out;
  out.x = worst_case_rows_.view().x;
  if (together == Together::kYes) {
    captured_.push_back(engine_->dispatch_fresh(shape(), routing(), input(), out, Surplus::kDropped, {stream_}).handle);
  } else {
    captured_.push_back(engine_->route(shape(), routing(), {stream_}));
    (void)engine_->dispatch(input(), captured_.back(), out, {stream_});
  }
  must(cudaMemsetAsync(out_, 0xFF, kTokens * kHidden * 2, stream_), "cudaMemsetAsync");
  CombineInput back;
  back.x = worst_case_rows_.view().x;
  Rows result;
  result.x = TensorView::dense(out_, DType::kBF16, {kTokens, kHidden});
  (void)engine_->combine(back, captured_.back(), result, {stream_});
}

GpuRank::~GpuRank() {
  for (void* const memory : memory_) (void)cudaFree(memory);
}

void GpuRank::launch_route() {
  handle_ = engine_->route(shape(), routing(), {stream_});
}

Fresh GpuRank::dispatch_into(const Rows& out, Surplus surplus) {
  return engine_->dispatch_fresh(shape(), routing(), input(), out, surplus, {stream_});
}

Fresh GpuRank::dispatch_into(const std::function<Rows()>& out) {
  return engine_->dispatch_fresh(shape(), routing(), input(), out, Surplus::kMovesLater, {stream_});
}

Fresh GpuRank::dispatch_fresh() {
  return engine_->dispatch_fresh(shape(), routing(), input(), {stream_});
}

void GpuRank::launch_fresh() {
  Fresh fresh = dispatch_fresh();
  handle_ = std::move(fresh.handle);
  rows_ = std::move(fresh.rows);
  must(cudaMemsetAsync(out_, 0xFF, host_x_.size() * 2, stream_), "cudaMemsetAsync");
  launch_combine();
}

void GpuRank::launch_combine() {
  launch_combine_of(rows_.view().x);
}

void GpuRank::launch_combine_of(const TensorView& rows) {
  CombineInput in;
  in.x = rows;
  Rows out;
  out.x = TensorView::dense(out_, DType::kBF16, {kTokens, kHidden});
  done_ = engine_->combine(in, *handle_, out, {stream_});
}

std::string GpuRank::exchange_back(Handle handle, TensorView rows) {
  handle_ = std::move(handle);
  rows.shape[0] = handle_->num_rows();
  must(cudaMemsetAsync(out_, 0xFF, host_x_.size() * 2, stream_), "cudaMemsetAsync");
  launch_combine_of(rows);
  return finish();
}

void GpuRank::launch() {
  launch_route();
  launch_with(std::move(*handle_));
}

void GpuRank::launch_with(Handle handle) {
  handle_ = std::move(handle);
  rows_ = engine_->make_rows(handle_->num_rows(), Shape{num_experts_, 0, kHidden});
  Rows out;
  out.x = rows_.view().x;
  (void)engine_->dispatch(input(), *handle_, out, {stream_});
  must(cudaMemsetAsync(out_, 0xFF, host_x_.size() * 2, stream_), "cudaMemsetAsync");
  launch_combine();
}

std::string GpuRank::finish() {
  done_.wait();
  return compare();
}

std::string GpuRank::compare() {
  return compare_rows(kTokens, [&](std::int64_t token) { return ranks_of_[static_cast<std::size_t>(token)]; });
}

template <class Times>
std::string GpuRank::compare_rows(std::int64_t num_rows, const Times& times) {
  std::vector<std::uint16_t> out(static_cast<std::size_t>(num_rows * kHidden));
  must(cudaMemcpyAsync(out.data(), out_, out.size() * 2, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
  must(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  constexpr int kNamed = 6;
  int wrong = 0;
  std::string first;
  for (std::int64_t token = 0; token < num_rows; ++token) {
    const auto begin = static_cast<std::size_t>(token * kHidden), end = begin + static_cast<std::size_t>(kHidden);
    const auto factor = static_cast<float>(times(token));
    std::size_t i = begin;
    while (i < end && float_of(out[i]) == float_of(host_x_[i]) * factor) ++i;
    if (i == end) continue;
    if (wrong++ < kNamed) {
      first += " token " + std::to_string(token) + " element " + std::to_string(i - begin) + ": " +
               std::to_string(float_of(out[i])) + " instead of " + std::to_string(float_of(host_x_[i]) * factor) + ";";
    }
  }
  return wrong == 0 ? "" : std::to_string(wrong) + " of " + std::to_string(num_rows) + " rows are wrong:" + first;
}

void GpuRank::launch_pair(Halves halves) {
  LowLatencyOptions options;
  options.hook = halves == Halves::kByHooks;
  const auto receive = [&](Pending pending) { done_ = pending.receive({stream_}); };
  Routing pairs;
  pairs.experts = TensorView::dense(ids_, DType::kI64, {kPairTokens, kTopK});
  receive(engine_->low_latency_dispatch(pair_shape(), TensorView::dense(x_, DType::kBF16, {kPairTokens, kHidden}),
                                        pairs, slabs_, {stream_}, options));
  must(cudaMemsetAsync(out_, 0xFF, kPairTokens * kHidden * 2, stream_), "cudaMemsetAsync");
  pairs.weights = weights_;
  receive(engine_->low_latency_combine(
      pair_shape(), slabs_, pairs, TensorView::dense(out_, DType::kBF16, {kPairTokens, kHidden}), {stream_}, options));
}

std::string GpuRank::finish_pair() {
  done_.wait();
  return compare_pair();
}

std::string GpuRank::compare_pair(unsigned gone) {
  return compare_rows(kPairTokens, [&](std::int64_t token) {
    const auto* const experts = host_ids_.data() + token * kTopK;
    return std::count_if(experts, experts + kTopK,
                         [&](std::int64_t expert) { return (gone >> (expert / kExpertsPerRank) & 1u) == 0; });
  });
}

bool GpuRank::computes() const {
  std::vector<std::uint16_t> back(host_x_.size());
  return cudaMemsetAsync(out_, 0x5A, back.size() * 2, stream_) == cudaSuccess &&
         cudaMemcpyAsync(back.data(), out_, back.size() * 2, cudaMemcpyDeviceToHost, stream_) == cudaSuccess &&
         cudaStreamSynchronize(stream_) == cudaSuccess && back.front() == 0x5A5A && back.back() == 0x5A5A &&
         cudaGetLastError() == cudaSuccess;
}

}  // namespace anyep::test
#endif
