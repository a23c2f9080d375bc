// The only place that names backends.
#include <algorithm>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "core/check.h"
#include "core/env.h"
#include "cpu/backend.h"
#if ANYEP_CUDA
#include "cuda/backend.h"
#endif

namespace anyep::backend {

std::unique_ptr<Backend> make_backend(const Budget& budget, const Topology& topology, const Tuning& tuning,
                                      Bootstrap& bootstrap) {
  // auto: as the topology says.
  const std::string wanted = core::env_choice("ANYEP_BACKEND").value_or("auto");
  if (wanted == "cuda" || (wanted == "auto" && topology.device >= 0)) {
#if ANYEP_CUDA
    Topology on_gpu = topology;
    on_gpu.device = std::max(topology.device, 0);
    return cuda::make_backend(budget, on_gpu, tuning, bootstrap);
#else
    core::throw_error(
        ErrorCode::kUnsupported, "create",
        "a rank on a GPU is asked for (topology.device or ANYEP_BACKEND = cuda), but this build has no CUDA "
        "backend. Build it with -DANYEP_CUDA=ON, or use CPU ranks.");
#endif
  }
  return std::make_unique<cpu::CpuBackend>(host::Group::create(budget, topology, tuning, bootstrap));
}

}  // namespace anyep::backend
