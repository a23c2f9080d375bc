// The only place that names backends.
#include <memory>

#include "backend/backend.h"
#include "core/check.h"
#include "core/env.h"
#include "cpu/backend.h"

namespace anyep::backend {

std::unique_ptr<Backend> make_backend(const Budget& budget, const Topology& topology, const Tuning& tuning,
                                      Bootstrap& bootstrap) {
  const std::string wanted = core::env_choice("ANYEP_BACKEND").value_or("auto");
  if (wanted == "cuda") {
    core::throw_error(ErrorCode::kUnsupported, "create",
                      "ANYEP_BACKEND = cuda, but this build has no CUDA backend. Use auto or cpu.");
  }
  return std::make_unique<cpu::CpuBackend>(host::Group::create(budget, topology, tuning, bootstrap));
}

}  // namespace anyep::backend
