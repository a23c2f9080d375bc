// Ranks on GPUs for the tests of this folder: as processes, or as threads of a process that is forked for it.
#pragma once

#include <anyep/bootstrap.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "bootstrap/control.h"
#include "cuda/memory/pinned.h"
#include "cuda/memory/windows.h"
#include "cuda/runtime/check.h"
#include "cuda/runtime/device_guard.h"
#include "tests/unit/bootstrap_world.h"

namespace anyep::test {

/// GPUs of this machine. Asked by a child: a process that has started CUDA must not fork ranks.
inline int num_gpus() {
  static const int count = [] {
    if (!std::filesystem::exists("/dev/nvidiactl")) return 0;
    const pid_t child = ::fork();
    if (child == 0) {
      int found = 0;
      ::_exit(cudaGetDeviceCount(&found) == cudaSuccess ? found : 0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
  }();
  return count;
}

/// One way to run ranks.
struct Setting {
  const char* name;
  const char* memory;       ///< ANYEP_CUDA_MEMORY
  const char* peer_access;  ///< ANYEP_PEER_ACCESS
  bool threads;
  int num_ranks;
  int num_gpus;
  cuda::Sharing expected;
};
inline void PrintTo(const Setting& setting, std::ostream* out) {
  *out << setting.name;
}

inline cuda::WindowLayout layout_of(int num_ranks, std::int64_t rows_bytes = 32 << 20) {
  Budget budget;
  budget.rows_bytes = rows_bytes;
  budget.low_latency_bytes = 1 << 20;
  budget.max_experts = 64;
  return cuda::WindowLayout::make(budget, num_ranks);
}

/// What a rank has after create().
struct GpuRank {
  int rank, device;
  control::Control& control;
  const cuda::WindowLayout& layout;
  cudaStream_t stream;
  cuda::PinnedPages pinned;  ///< [0] counts differences

  void meet() { control.vote(nullptr, "test", in(20s)); }
  void sync() const { cuda::check(cudaStreamSynchronize(stream), "cudaStreamSynchronize", "test"); }
  std::uint32_t* words() const { return reinterpret_cast<std::uint32_t*>(pinned.data()); }
  std::shared_ptr<cuda::Windows> share() { return cuda::Windows::share(layout, device, rank, control, in(20s)); }
};

inline void run_ranks(const Setting& setting, const std::function<void(GpuRank&)>& body,
                      const std::vector<int>& killed = {}) {
  ::setenv("ANYEP_CUDA_MEMORY", setting.memory, 1);
  ::setenv("ANYEP_PEER_ACCESS", setting.peer_access, 1);
  const LocalGroup group(setting.num_ranks);
  const cuda::WindowLayout layout = layout_of(setting.num_ranks);
  const auto one = [&](int rank) {
    const int device = rank % setting.num_gpus;
    const cuda::DeviceGuard guard(device);
    const auto bootstrap = group.member(rank);
    const auto control = control::Control::connect(*bootstrap, "create", in(20s));
    GpuRank self{rank, device, *control, layout, nullptr, cuda::PinnedPages(4096)};
    cuda::check(cudaStreamCreateWithFlags(&self.stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    body(self);
    cuda::check(cudaStreamDestroy(self.stream), "cudaStreamDestroy");
  };
  if (setting.threads) {
    run_world(1, [&](int) { LocalGroup::run_threads(setting.num_ranks, one); });
  } else {
    run_world(setting.num_ranks, one, killed);
  }
  ::unsetenv("ANYEP_CUDA_MEMORY");
  ::unsetenv("ANYEP_PEER_ACCESS");
}

/// Runs `body` where CUDA may be started.
inline void in_a_child(const std::function<void()>& body) {
  run_world(1, [&](int) { body(); });
}

}  // namespace anyep::test
