#include "bench/probes/timer.h"

#include <chrono>

#include "bench/probes/check.h"

namespace anyep::bench {
namespace {

double now() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double between(cudaEvent_t begin, cudaEvent_t end) {
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
  return static_cast<double>(ms) * 1e3;
}

}  // namespace

Timer::Timer(Meeting& meeting, int rank, cudaStream_t stream) : meeting_(&meeting), rank_(rank), stream_(stream) {
  for (int i = 0; i < kBatch; ++i) {
    check(cudaEventCreate(&begin_[i]), "cudaEventCreate");
    check(cudaEventCreate(&end_[i]), "cudaEventCreate");
  }
}

Timer::~Timer() {
  for (int i = 0; i < kBatch; ++i) {
    (void)cudaEventDestroy(begin_[i]);
    (void)cudaEventDestroy(end_[i]);
  }
}

void Timer::put(int index, const Put& op) {
  check(cudaEventRecord(begin_[index], stream_), "cudaEventRecord");
  const double before = now();
  op(index);
  if (index >= kDropped) host_us_.push_back(now() - before);
  check(cudaEventRecord(end_[index], stream_), "cudaEventRecord");
}

std::vector<double> Timer::elapsed() {
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  std::vector<double> mine;
  for (int i = kDropped; i < kBatch; ++i) mine.push_back(between(begin_[i], end_[i]));
  return meeting_->largest(rank_, mine);
}

std::vector<double> Timer::queued(const Put& op, const Put& before, const Put& after) {
  host_us_.clear();
  meeting_->barrier();
  for (int i = 0; i < kBatch; ++i) {
    if (before) before(i);
    put(i, op);
    if (after) after(i);
  }
  return elapsed();
}

std::vector<double> Timer::from_idle(const Put& op) {
  host_us_.clear();
  for (int i = 0; i < kBatch; ++i) {
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    meeting_->barrier();
    put(i, op);
  }
  return elapsed();
}

double Timer::replayed_alone(cudaGraphExec_t graph) {
  check(cudaEventRecord(begin_[0], stream_), "cudaEventRecord");
  check(cudaGraphLaunch(graph, stream_), "cudaGraphLaunch");
  check(cudaEventRecord(end_[0], stream_), "cudaEventRecord");
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  return between(begin_[0], end_[0]);
}

double Timer::replayed(cudaGraphExec_t graph, int parts) {
  meeting_->barrier();
  return meeting_->largest(rank_, replayed_alone(graph) / parts);
}

Graph::Graph(cudaStream_t stream, const std::function<void()>& put) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  put();
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  const cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
  (void)cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
  check(cudaGraphUpload(exec_, stream), "cudaGraphUpload");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

Graph::~Graph() {
  (void)cudaGraphExecDestroy(exec_);
}

}  // namespace anyep::bench
