#if ANYEP_CUDA
#include "support/gpu_rank.h"

#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <stdexcept>
#include <string>
#include <utility>

namespace anyep::test {
namespace {

void must(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class T>
T* device_array(std::size_t count) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
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

GpuRank::GpuRank(Bootstrap& bootstrap, std::chrono::milliseconds limit, int num_gpus) {
  Topology topology = Topology::discover(bootstrap);
  topology.device = topology.rank % num_gpus;
  must(cudaSetDevice(topology.device), "cudaSetDevice");
  must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  Budget budget;
  budget.rows_bytes = std::int64_t{128} << 20;
  Tuning tuning = Tuning::from_environment();
  tuning.timeout = limit;
  tuning.startup_timeout = std::max<std::chrono::nanoseconds>(limit, std::chrono::seconds(30));
  tuning.close_timeout = std::chrono::seconds(1);
  engine_ = Engine::create(budget, topology, tuning, bootstrap);

  const int ranks = engine_->num_ranks();
  num_experts_ = 4 * ranks;
  ids_ = device_array<std::int64_t>(kTokens * kTopK);
  x_ = device_array<std::uint16_t>(kTokens * kHidden);
  out_ = device_array<std::uint16_t>(kTokens * kHidden);
  change_inputs(0);
}

void GpuRank::change_inputs(unsigned salt) {
  std::vector<std::int64_t> ids(static_cast<std::size_t>(kTokens * kTopK));
  ranks_of_.clear();
  for (std::int64_t token = 0; token < kTokens; ++token) {
    unsigned at = 0;
    for (int choice = 0; choice < kTopK; ++choice) {
      const std::int64_t expert = (token * 7 + choice * 5 + engine_->rank() + salt * (token % 3)) % num_experts_;
      ids[static_cast<std::size_t>(token * kTopK + choice)] = expert;
      at |= 1u << (expert / 4);
    }
    ranks_of_.push_back(std::popcount(at));
  }
  host_x_.clear();
  for (std::int64_t i = 0; i < kTokens * kHidden; ++i) host_x_.push_back(bf16_of(static_cast<float>((i + salt) % 61)));
  must(cudaMemcpyAsync(ids_, ids.data(), ids.size() * 8, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
  must(cudaMemcpyAsync(x_, host_x_.data(), host_x_.size() * 2, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
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
  (void)cudaFree(ids_);
  (void)cudaFree(x_);
  (void)cudaFree(out_);
}

void GpuRank::launch_route() {
  handle_ = engine_->route(shape(), routing(), {stream_});
}

Fresh GpuRank::dispatch_into(const Rows& out, Surplus surplus) {
  return engine_->dispatch_fresh(shape(), routing(), input(), out, surplus, {stream_});
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
  CombineInput in;
  in.x = rows_.view().x;
  Rows out;
  out.x = TensorView::dense(out_, DType::kBF16, {kTokens, kHidden});
  done_ = engine_->combine(in, *handle_, out, {stream_});
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
  std::vector<std::uint16_t> out(host_x_.size());
  must(cudaMemcpyAsync(out.data(), out_, out.size() * 2, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
  must(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  for (std::size_t i = 0; i < out.size(); ++i) {
    const float want = float_of(host_x_[i]) * static_cast<float>(ranks_of_[i / kHidden]);
    if (float_of(out[i]) != want) {
      return "token " + std::to_string(i / kHidden) + " element " + std::to_string(i % kHidden) + ": " +
             std::to_string(float_of(out[i])) + " instead of " + std::to_string(want);
    }
  }
  return {};
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
