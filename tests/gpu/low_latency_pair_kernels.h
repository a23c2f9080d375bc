// The checker of low-latency pairs on the GPU; every launch may be captured.
#pragma once

#include <cuda_runtime.h>

#include "low_latency_pair.h"

namespace anyep::test {

/// Loads every kernel, so that none is loaded while another rank's waits on the same GPU.
void load_pair_kernels();
/// What this rank brings; outputs are overwritten: counts, ranges, sources and sums here, rows by check_dispatched().
void prepare_pair(const PairCall& call, const PairMemory& memory, cudaStream_t stream);
/// Every row of every local expert, and the answer to each.
void check_dispatched(const PairCall& call, const PairMemory& memory, cudaStream_t stream);
/// Every token's sum; counts the pair.
void check_combined(const PairCall& call, const PairMemory& memory, cudaStream_t stream);
/// This rank may be late here.
void linger(const PairCall& call, const PairMemory& memory, std::uint32_t place, cudaStream_t stream);
/// Changes one bit of what the op before has left, in the first row that there is; once more puts it back.
void damage(const PairCall& call, const PairMemory& memory, Field field, cudaStream_t stream);

}  // namespace anyep::test
