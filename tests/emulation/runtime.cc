// The CUDA runtime's functions, over the emulated GPUs.
#include <cstring>
#include <map>
#include <mutex>

#include "include/cuda_runtime_api.h"
#include "machine.h"
#include "pages.h"

namespace emulation = anyep::emulation;
using anyep::emulation::Machine;
using anyep::emulation::Op;

struct EmulatedGraph {
  std::vector<Op> ops;
};
struct EmulatedEvent {
  std::uint64_t at_ns = 0;
};

namespace {

thread_local int current_gpu = 0;

/// Allocations end where their pages do.
class Memory {
 public:
  void* take(std::size_t bytes) {
    // Kernels copy 16 bytes at a time and more from aligned addresses: the last of them may be read as a whole.
    bytes = (bytes + 255) / 256 * 256;
    std::byte* const begin = emulation::map_pages(bytes);
    if (begin == nullptr) return nullptr;
    std::byte* const at = begin + (emulation::in_pages(bytes) - bytes);
    const std::lock_guard lock(mutex_);
    maps_[at] = {begin, bytes};
    return at;
  }
  void give_back(void* memory) {
    const std::lock_guard lock(mutex_);
    const auto found = maps_.find(memory);
    if (found == maps_.end()) return;
    emulation::unmap_pages(found->second.begin, found->second.bytes);
    maps_.erase(found);
  }

 private:
  struct Map {
    std::byte* begin;
    std::size_t bytes;
  };
  std::mutex mutex_;
  std::map<void*, Map> maps_;
};

Memory& memory() {
  static auto* const all = new Memory;
  return *all;
}

/// What is synchronous is in the default stream, which streams that do not block it do not wait for.
cudaError_t in_default_stream(const std::function<void()>& action) {
  Machine& machine = Machine::get();
  machine.wait(machine.default_stream(current_gpu));
  action();
  return cudaSuccess;
}

}  // namespace

void anyep::emulation::put(Stream* stream, const Launch& launch) {
  Machine& machine = Machine::get();
  machine.put(stream != nullptr ? stream : machine.default_stream(current_gpu), launch);
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorMemoryAllocation ? "out of memory" : "an error";
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = anyep::emulation::traits().num_gpus;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_gpu;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= anyep::emulation::traits().num_gpus) return cudaErrorInvalidValue;
  current_gpu = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  Machine::get().wait_for_gpu(current_gpu);
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** to, std::size_t bytes) {
  *to = memory().take(bytes);
  return *to == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* at) {
  Machine::get().wait_for_gpu(current_gpu);
  memory().give_back(at);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** to, std::size_t bytes, unsigned) {
  return cudaMalloc(to, bytes);
}
cudaError_t cudaFreeHost(void* at) {
  return cudaFree(at);
}
cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  return in_default_stream([&] { std::memset(to, value, bytes); });
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return in_default_stream([&] { std::memcpy(to, from, bytes); });
}
cudaError_t cudaMemcpy2D(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                         std::size_t height, cudaMemcpyKind) {
  return in_default_stream([&] {
    for (std::size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<std::byte*>(to) + row * to_pitch, static_cast<const std::byte*>(from) + row * from_pitch,
                  width);
    }
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  Machine::get().put(stream, std::function<void()>([=] { std::memset(to, value, bytes); }));
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = Machine::get().make_stream(current_gpu);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Machine::get().drop_stream(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Machine::get().wait(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->capture = new std::vector<Op>;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = new EmulatedGraph{std::move(*stream->capture)};
  delete std::exchange(stream->capture, nullptr);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new EmulatedGraph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const Op& op : exec->ops) Machine::get().put(stream, op);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new EmulatedEvent;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Machine::get().put(stream, std::function<void()>([event] { event->at_ns = Machine::get().clock_ns(); }));
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = static_cast<float>(to->at_ns - from->at_ns) * 1e-6f;
  return cudaSuccess;
}
