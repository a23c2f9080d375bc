// A barrier over the ranks of a domain that are not masked: for clean and tests; ops need none.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels/team.h"

namespace anyep::cuda {

struct BarrierParams {
  Team team;
};

/// With masks a rank that stays away is masked; without, the op fails and the record names it.
void launch_barrier(const BarrierParams& params, cudaStream_t stream);

/// Holds up the stream until the host has stored something else than 0, within the op's limit.
struct GateParams {
  Team team;
  std::uint64_t* open = nullptr;  ///< in pinned host memory
};

void launch_gate(const GateParams& params, cudaStream_t stream);

}  // namespace anyep::cuda
