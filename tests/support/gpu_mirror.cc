#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/mirror.h"

#if ANYEP_CUDA
#include <cuda_runtime.h>

namespace anyep::test {
namespace {

/// Test tensors of one rank in one scenario. Taken once and kept: memory is neither taken nor given back while peers' kernels
/// wait for each other on the same GPU.
constexpr std::size_t kArenaBytes = std::size_t{384} << 20;

void must(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct Arena {
  std::byte* memory = nullptr;
  /// Copies go through pinned memory: one of pageable memory that waits for a kernel holds up the copies of other threads,
  /// also of the rank that the kernel waits for.
  std::byte* pinned = nullptr;
  cudaStream_t stream = nullptr;
};

class Arenas {
 public:
  Arena take(int device) {
    const std::lock_guard lock(mutex_);
    auto& idle = idle_[device];
    if (idle.empty()) {
      Arena arena;
      void* memory = nullptr;
      must(cudaMalloc(&memory, kArenaBytes), "cudaMalloc");
      arena.memory = static_cast<std::byte*>(memory);
      must(cudaHostAlloc(&memory, kArenaBytes, cudaHostAllocDefault), "cudaHostAlloc");
      arena.pinned = static_cast<std::byte*>(memory);
      must(cudaStreamCreateWithFlags(&arena.stream, cudaStreamNonBlocking), "cudaStreamCreate");
      return arena;
    }
    const Arena arena = idle.back();
    idle.pop_back();
    return arena;
  }
  void give_back(int device, const Arena& arena) {
    const std::lock_guard lock(mutex_);
    idle_[device].push_back(arena);
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<Arena>> idle_;
};

Arenas& arenas() {
  static Arenas all;
  return all;
}

class GpuMirror final : public Mirror {
 public:
  explicit GpuMirror(int rank) : device_(rank % num_gpus()) {
    must(cudaSetDevice(device_), "cudaSetDevice");
    arena_ = arenas().take(device_);
  }
  ~GpuMirror() override { arenas().give_back(device_, arena_); }

  int device() const override { return device_; }
  StreamRef stream() const override { return {arena_.stream}; }

  using Mirror::at;
  TensorView at(const TensorView& view) const override {
    TensorView there = view;
    if (view.data != nullptr) there.data = const_cast<std::byte*>(find(view.as<std::byte>()));
    return there;
  }

  void upload(const Tensors& tensors) override {
    std::size_t staged = 0;
    for (const Guarded& one : tensors.memory()) {
      const std::span<std::byte> here = one.whole();
      const Place& place = place_of(here);
      const std::span<std::byte> from = place.body != nullptr ? one.bytes() : here;
      std::byte* const stage = stage_for(from.size(), staged);
      std::copy(from.begin(), from.end(), stage);
      copy(place.body != nullptr ? place.body : place.there, stage, from.size(), cudaMemcpyHostToDevice);
    }
    finish();
  }

  void download(const Tensors& tensors) override {
    struct Arrival {
      std::span<std::byte> here;
      const std::byte* stage;
    };
    std::vector<Arrival> arrivals;
    std::size_t staged = 0;
    for (const Guarded& one : tensors.memory()) {
      const auto found = places_.find(one.whole().data());
      if (found == places_.end()) continue;
      const Place& place = found->second;  // what stands for memory of the engine's has no guards there
      const std::span<std::byte> here = place.body != nullptr ? one.bytes() : one.whole();
      std::byte* const stage = stage_for(here.size(), staged);
      copy(stage, place.body != nullptr ? place.body : place.there, here.size(), cudaMemcpyDeviceToHost);
      arrivals.push_back({here, stage});
    }
    finish();
    for (const Arrival& one : arrivals) std::copy_n(one.stage, one.here.size(), one.here.data());
  }

  TensorView stand_in(Tensors& tensors, const TensorView& theirs) override {
    TensorView here = tensors.add(theirs.dtype, theirs.shape);
    if (here.data == nullptr) return here;
    const std::span<std::byte> whole = tensors.memory().back().whole();
    places_[whole.data()] = {nullptr, whole.size(), theirs.as<std::byte>(), here.as<std::byte>()};
    return here;
  }

  std::vector<std::byte> fetch(const TensorView& theirs) const override {
    std::vector<std::byte> here(static_cast<std::size_t>(theirs.num_elements()) * size_of(theirs.dtype));
    std::size_t staged = 0;
    std::byte* const stage = stage_for(here.size(), staged);
    copy(stage, theirs.data, here.size(), cudaMemcpyDeviceToHost);
    finish();
    std::copy_n(stage, here.size(), here.data());
    return here;
  }

  void zero(const TensorView& theirs) override {
    must(cudaMemsetAsync(theirs.data, 0, static_cast<std::size_t>(theirs.num_elements()) * size_of(theirs.dtype),
                         arena_.stream),
         "zero");
    finish();
  }

 private:
  struct Place {
    std::byte* there = nullptr;  ///< the copy of the whole, guards included
    std::size_t bytes = 0;
    std::byte* body = nullptr;  ///< or: memory of the engine's
    std::byte* body_here = nullptr;
  };

  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const {
    if (bytes != 0) must(cudaMemcpyAsync(to, from, bytes, kind, arena_.stream), "cudaMemcpyAsync");
  }

  std::byte* stage_for(std::size_t bytes, std::size_t& staged) const {
    if (staged + bytes > kArenaBytes) throw std::runtime_error("the scenario's tensors exceed the arena");
    std::byte* const stage = arena_.pinned + staged;
    staged = (staged + bytes + 63) / 64 * 64;
    return stage;
  }

  /// Looks, and holds no lock of the CUDA runtime while it waits.
  void finish() const {
    cudaError_t status = cudaErrorNotReady;
    while ((status = cudaStreamQuery(arena_.stream)) == cudaErrorNotReady) std::this_thread::yield();
    must(status, "the stream's work");
  }

  Place& place_of(std::span<std::byte> here) {
    Place& place = places_[here.data()];
    if (place.body != nullptr) return place;
    if (place.there == nullptr || place.bytes != here.size()) {
      // The same distance to a multiple of 256 as the host's, so that the tensors' alignment is what the test asked for.
      const std::size_t phase = reinterpret_cast<std::uintptr_t>(here.data()) % 256;
      used_ = (used_ + 255) / 256 * 256 + phase;
      if (used_ + here.size() > kArenaBytes) throw std::runtime_error("the scenario's tensors exceed the arena");
      place = {arena_.memory + used_, here.size(), nullptr, nullptr};
      used_ += here.size();
    }
    return place;
  }

  const std::byte* find(const std::byte* here) const {
    auto after = places_.upper_bound(const_cast<std::byte*>(here));
    if (after == places_.begin()) throw std::runtime_error("a tensor that was not uploaded");
    const auto& [begin, place] = *--after;
    if (here >= begin + place.bytes) throw std::runtime_error("a tensor that was not uploaded");
    return place.body != nullptr ? place.body + (here - place.body_here) : place.there + (here - begin);
  }

  int device_;
  Arena arena_;
  std::size_t used_ = 0;
  std::map<std::byte*, Place> places_;  ///< by the host address of the whole
};

}  // namespace

int num_gpus() {
  static const int count = [] {
    int found = 0;
    return cudaGetDeviceCount(&found) == cudaSuccess ? found : 0;
  }();
  return count;
}

std::unique_ptr<Mirror> gpu_mirror(int rank) {
  return std::make_unique<GpuMirror>(rank);
}

}  // namespace anyep::test

#else

namespace anyep::test {

int num_gpus() {
  return 0;
}

std::unique_ptr<Mirror> gpu_mirror(int) {
  throw std::runtime_error("built without CUDA");
}

}  // namespace anyep::test

#endif
