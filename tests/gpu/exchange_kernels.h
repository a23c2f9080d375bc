// The checker of exchanges on the GPU; every launch may be captured.
#pragma once

#include <cuda_runtime.h>

#include "exchange.h"

namespace anyep::test {

/// Loads every kernel, so that none is loaded while another rank's waits on the same GPU.
void load_exchange_kernels();
/// What this rank brings; `out` is overwritten.
void prepare_exchange(const Exchange& e, const ExchangeMemory& memory, cudaStream_t stream);
/// How many rows came from whom, every row, its source.
void check_received(const Exchange& e, const ExchangeMemory& memory, cudaStream_t stream);
/// Every token's sum; counts the exchange.
void check_sums(const Exchange& e, const ExchangeMemory& memory, cudaStream_t stream);
/// Changes one bit, so that a check must find it.
void damage(std::uint16_t* element, cudaStream_t stream);

}  // namespace anyep::test
