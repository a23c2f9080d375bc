#include "bench/gpu/company.h"

#include "bench/probes/check.h"

namespace anyep::bench {
namespace {

constexpr std::uint64_t kSeed = 300;

}  // namespace

Company::Company(Timer& timer) : timer_(&timer) {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  for (cudaEvent_t& mark : marks_) check(cudaEventCreate(&mark), "cudaEventCreate");
  constexpr std::size_t kElements = static_cast<std::size_t>(kEdge) * kEdge;
  a_ = DeviceMemory(kElements * 2);
  b_ = DeviceMemory(kElements * 2);
  sums_ = DeviceMemory(kElements * sizeof(float));
  probes::fill(a_.data(), kElements * 2, kSeed, false, stream_);
  probes::fill(b_.data(), kElements * 2, kSeed + 1, false, stream_);
  start();
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

Company::~Company() {
  for (const cudaEvent_t mark : marks_) (void)cudaEventDestroy(mark);
  (void)cudaStreamDestroy(stream_);
}

void Company::start() {
  probes::Product product;
  product.a = a_.data();
  product.b = b_.data();
  product.sums = sums_.as<float>();
  product.edge = kEdge;
  check(cudaEventRecord(marks_[0], stream_), "cudaEventRecord");
  for (int i = 0; i < kProducts; ++i) {
    probes::multiply_matrices(product, stream_);
    check(cudaEventRecord(marks_[i + 1], stream_), "cudaEventRecord");
  }
}

std::vector<double> Company::beside(const Timer::Put& op) {
  timer_->meeting().barrier();
  start();
  std::vector<double> us = timer_->queued(op);
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  return us;
}

double Company::with_calls() {
  float ms = 0;
  check(cudaEventElapsedTime(&ms, marks_[kWatched], marks_[kWatched + 1]), "cudaEventElapsedTime");
  return timer_->meeting().largest(timer_->rank(), static_cast<double>(ms) * 1e3);
}

double Company::alone() {
  timer_->meeting().barrier();
  start();
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  return with_calls();
}

}  // namespace anyep::bench
