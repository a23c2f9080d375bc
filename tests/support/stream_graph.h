// What a body puts on a stream, captured, to be replayed there.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <thread>

namespace anyep::test {

/// @throws std::runtime_error with the runtime's text
inline void must(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

/// Until everything on the stream is done. Looks, and holds no lock of the runtime while it waits: a kernel there may wait for
/// one that another thread has still to launch.
inline void finish(cudaStream_t stream) {
  cudaError_t status = cudaErrorNotReady;
  while ((status = cudaStreamQuery(stream)) == cudaErrorNotReady) std::this_thread::yield();
  must(status);
}

class StreamGraph {
 public:
  template <class Body>
  StreamGraph(cudaStream_t stream, const Body& body) : stream_(stream) {
    // Other ranks of this process go on meanwhile.
    must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    body();
    must(cudaStreamEndCapture(stream_, &graph_));
    must(cudaGraphInstantiate(&executable_, graph_, 0));
    must(cudaGraphUpload(executable_, stream_));
    must(cudaStreamSynchronize(stream_));
  }
  StreamGraph(const StreamGraph&) = delete;
  StreamGraph& operator=(const StreamGraph&) = delete;
  ~StreamGraph() {
    (void)cudaGraphExecDestroy(executable_);
    (void)cudaGraphDestroy(graph_);
  }
  void replay() const { must(cudaGraphLaunch(executable_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace anyep::test
